"""Building TensorRT engines, and what differs between versions of TensorRT."""
