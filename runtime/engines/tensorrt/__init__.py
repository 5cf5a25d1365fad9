"""Engines that TensorRT or TensorRT-RTX built: checked before they are loaded, and run over cuda-python."""
