"""How the operators of `galerne.export.ops` are spelled in ONNX: one module for each dialect."""
