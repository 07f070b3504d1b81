"""Engines: building them from exported graphs, on any TensorRT."""
