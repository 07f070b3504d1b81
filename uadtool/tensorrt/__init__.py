"""Building and running TensorRT engines, the GPU's driver, and what differs between versions of TensorRT."""
