"""What runs the graph: ONNX Runtime, or an engine that was built for a target."""
