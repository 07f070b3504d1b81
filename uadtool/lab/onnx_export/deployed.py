"""A model in ONNX Runtime, which computes with integer kernels and is faster than rounded floats in torch."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from uadtool.files import atomic_write
from uadtool.lab.detectors.contract import OutputTensors, standardize
from uadtool.lab.onnx_export.writer import to_onnx
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.opening import open_model


def open_proto(proto: ModelProto, runtime: str = "onnxruntime") -> Runtime:
    """``open_model`` for a graph in memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        with atomic_write(path) as temporary:
            onnx.save_model(proto, temporary)
        return open_model(str(path), runtime=runtime)


def deployed_maps(model: nn.Module, metadata: Metadata) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The ``raw_maps_and_class`` of a quantized graph, computed by ONNX Runtime.

    Args:
        model: a detector, or the graph that ``quantize`` or ``in_half_precision`` made from it.
    """
    traced = copy.deepcopy(model) if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    raw = next(node.args[0] for node in traced.graph.nodes if node.target is standardize)
    output = next(node for node in traced.graph.nodes if node.target is OutputTensors)
    with traced.graph.inserting_before(output):
        stacked = traced.graph.call_method("flatten", (raw, 1, 2))
    output.update_arg(OutputTensors._fields.index("anomaly_map"), stacked)
    traced.recompile()
    height, width = metadata.map_size
    count = model.get_buffer("map_spreads").shape[1]
    runtime = open_proto(to_onnx(traced, metadata.replace(map_size=(count * height, width))))

    def raw_maps_and_class(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = runtime.run(images.numpy())
        maps = torch.from_numpy(outputs.anomaly_map).view(-1, count, height, width)
        return maps, torch.from_numpy(outputs.nearest_class).long()

    return raw_maps_and_class
