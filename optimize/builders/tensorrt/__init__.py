"""Builds engines with TensorRT and TensorRT-RTX: `plan` on the machine that has onnx, `compile` on any that has the builder."""
