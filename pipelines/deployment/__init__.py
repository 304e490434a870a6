"""A trained model leaves: ONNX, its parity, its speed."""
