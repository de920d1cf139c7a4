"""Passes over an ONNX graph, each a function from a graph to the same graph, changed in place."""
