"""A quantized model over many images, for which ONNX Runtime with its integer kernels is faster than torch."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from uadtool.files import atomic_write
from uadtool.lab.detectors.backbones import traced
from uadtool.lab.detectors.contract import OutputTensors, standardize
from uadtool.lab.onnx_export.writer import to_onnx
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.opening import open_model

EXPORT_PAYS = 400
"""Images from which an export takes less time than it saves: 8 to 12 s against 0.03 to 0.04 s per image at 256 px (two
int8 networks with ResNet-18 and Lite0, 2 cores)."""


def open_proto(proto: ModelProto, runtime: str = "onnxruntime") -> Runtime:
    """``open_model`` for a graph in memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        with atomic_write(path) as temporary:
            onnx.save_model(proto, temporary)
        return open_model(str(path), runtime=runtime)


def deployed_maps(model: nn.Module, metadata: Metadata, images: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The ``raw_maps_and_class`` of a quantized graph, computed by ONNX Runtime, or by torch for few images.

    Args:
        model: a detector, or the graph that ``quantize`` or ``in_half_precision`` made from it.
        images: number of images that it will compute.
    """
    graph = traced(model)
    raw = next(node.args[0] for node in graph.graph.nodes if node.target is standardize)
    output = next(node for node in graph.graph.nodes if node.target is OutputTensors)
    with graph.graph.inserting_before(output):
        stacked = graph.graph.call_method("flatten", (raw, 1, 2))
    output.update_arg(OutputTensors._fields.index("anomaly_map"), stacked)
    graph.recompile()
    height, width = metadata.map_size
    count = model.get_buffer("map_spreads").shape[1]

    def in_torch(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = OutputTensors(*graph(images))
        return outputs.anomaly_map.view(-1, count, height, width), outputs.nearest_class.long()

    if images < EXPORT_PAYS:
        return in_torch
    runtime = open_proto(to_onnx(graph, metadata.replace(map_size=(count * height, width))))

    def in_onnxruntime(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = runtime.run(images.numpy())
        maps = torch.from_numpy(outputs.anomaly_map).view(-1, count, height, width)
        return maps, torch.from_numpy(outputs.nearest_class).long()

    return in_onnxruntime
