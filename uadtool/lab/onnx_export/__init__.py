"""Writing complete ONNX detectors, and proving that they give the scores that torch gives."""
