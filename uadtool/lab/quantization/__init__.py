"""Calibration, post-training quantization, bias correction, quantization-aware training, targets."""
