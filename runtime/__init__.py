"""Reads bundles and runs them. Imports no torch, onnx, transformers or polygraphy."""
