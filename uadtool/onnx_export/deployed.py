"""A model as a runtime computes it: with the kernels it will be deployed on, and faster than torch rounds in float."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from uadtool.detectors.base import STATISTICS
from uadtool.metadata import Metadata
from uadtool.onnx_export.writer import to_onnx
from uadtool.runtimes import Runtime, open_model


def open_proto(proto: ModelProto, runtime: str = "onnxruntime") -> Runtime:
    """``open_model`` for a graph that is in no file."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save_model(proto, path)
        return open_model(str(path), runtime=runtime)


def deployed_maps(model: nn.Module, metadata: Metadata) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The ``raw_map_and_class`` of a quantized graph, computed by ONNX Runtime.

    Args:
        model: a detector or what ``quantize`` or ``half`` made from one.
    """
    neutral = copy.deepcopy(model)
    for name, value in STATISTICS.items():
        neutral.get_buffer(name).fill_(value)
    runtime = open_proto(to_onnx(neutral, metadata))

    def raw_map_and_class(images: Tensor) -> tuple[Tensor, Tensor]:
        found = runtime.run(images.numpy())
        return torch.from_numpy(found.anomaly_map), torch.from_numpy(found.nearest_class).long()

    return raw_map_and_class
