"""Writing complete ONNX detectors, and proving that they give the scores that were trained."""

from uadtool.onnx_export.lint import lint
from uadtool.onnx_export.parity import check_parity, parity_images
from uadtool.onnx_export.writer import save_onnx, to_onnx

__all__ = ["check_parity", "lint", "parity_images", "save_onnx", "to_onnx"]
