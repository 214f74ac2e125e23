"""Run a bundle: ONNX Runtime, TensorRT."""
