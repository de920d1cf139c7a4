"""Engines from ONNX with TensorRT and TensorRT-RTX."""
