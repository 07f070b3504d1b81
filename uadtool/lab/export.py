"""Export as a step: from a model to a complete ONNX detector with the same scores."""

from typing import Any, Optional

from onnx import ModelProto
from torch import nn

from uadtool import __version__
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import without_rois
from uadtool.lab.onnx_export.lint import lint
from uadtool.lab.onnx_export.parity import check_parity, parity_images
from uadtool.lab.onnx_export.resizing import ResizingDetector, check_resizing
from uadtool.lab.onnx_export.writer import to_onnx
from uadtool.metadata import Metadata


def export(model: nn.Module, metadata: Metadata, digest: str, images: Optional[str] = None,
           input_size: Optional[tuple[int, int]] = None) -> tuple[ModelProto, dict[str, Any]]:
    """The ONNX detector of a float or quantized model, and the difference of its scores from torch.

    Args:
        digest: of the model's file.
        images: folder or data set to compare on; None for synthetic images.
        input_size: (height, width) of the images that the graph takes, and resizes to the model's ``image_size``; the
            latter if None.

    Raises:
        UadtoolError: no images exist, TensorRT would refuse the graph, its scores differ from the model's, or its
            resized pixels from Pillow's.
    """
    model = without_rois(model)
    step: dict[str, Any] = {"command": "export", "tool_version": __version__, "model_digest": digest}
    if input_size:
        step["resized_to"] = list(metadata.image_size)
        model = ResizingDetector(model, input_size, metadata.image_size)
        metadata = metadata.replace(image_size=input_size, macs=metadata.macs + model.resizing.macs)
    pixels = parity_images(images, metadata.reading)
    metadata = metadata.replace(provenance=[*metadata.provenance, step], sizes=[])
    proto = to_onnx(model, metadata)
    if metadata.target == "tensorrt" and (findings := lint(proto)):
        raise UadtoolError(f"TensorRT would refuse the exported graph: {findings[0]}; nothing was written")
    parity = {"source": images or "synthetic", **check_parity(model, proto, metadata, pixels)}
    if isinstance(model, ResizingDetector):
        parity["pixel_difference"] = check_resizing(model.resizing, pixels)
    return proto, parity
