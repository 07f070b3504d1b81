"""The differences between TensorRT 8.5 (JetPack 5), 8.6, 10, 11 and TensorRT-RTX."""

import importlib
import platform
from typing import Any, List, Optional, Tuple

from uadtool.errors import MissingPackage

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""Packages in order of preference. The second also builds without a GPU."""


def import_tensorrt(package: Optional[str] = None) -> Any:
    """The installed TensorRT, or a certain one of ``PACKAGES``.

    Raises:
        MissingPackage: it is not installed; the message says how to install it on this machine.
    """
    for name in [package] if package else PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as reason:
            if reason.name != name:  # it is installed, but lacks a library
                raise MissingPackage(f"{name} cannot be imported: {reason}; reinstall it") from reason
    name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[package or "tensorrt"]
    if platform.machine() == "aarch64":
        raise MissingPackage(f"{name} is not installed; on a Jetson: sudo apt-get install python3-libnvinfer")
    raise MissingPackage(f"{name} is not installed; pip install 'uadtool[tensorrt-rtx]', or NVIDIA's tensorrt")


def version(trt: Any) -> Tuple[int, ...]:
    """Major and minor version of a TensorRT."""
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def is_rtx(trt: Any) -> bool:
    """Whether it is TensorRT-RTX, whose versions count from 1."""
    return bool(trt.__name__ == "tensorrt_rtx")


def create_network(trt: Any, builder: Any) -> Any:
    """An empty network with a batch dimension. Its tensors have the types of the graph if TensorRT supports that."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_rtx(trt) or version(trt) >= (11, 0):
        return builder.create_network(0)
    return builder.create_network(1 << int(flags.STRONGLY_TYPED if version(trt) >= (10, 0) else flags.EXPLICIT_BATCH))


def use_types_of_graph(trt: Any, network: Any, config: Any, precision: str) -> None:
    """Let the builder compute only in the types of the graph.

    Before version 10, networks have no types, and flags allow a type for any layer. With fp16 the builder would also
    compute the score head in fp16, which cannot hold its squares and small differences. Therefore its layers are set to
    fp32, and the builder must obey.

    Args:
        precision: the precision of the graph, as in its metadata: fp32, fp16, int8 or mixed.
    """
    config.clear_flag(trt.BuilderFlag.TF32)  # layers are float for accuracy
    if is_rtx(trt) or version(trt) >= (10, 0):
        return
    for flag in {"fp32": [], "fp16": ["FP16"], "int8": ["INT8"], "mixed": ["INT8", "FP16"]}[precision]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if precision not in ("fp16", "mixed"):
        return
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in fp32_layers(trt, network):
        layer.precision = trt.DataType.FLOAT


def fp32_layers(trt: Any, network: Any) -> List[Any]:
    """The layers that are fp32 in the graph and of a kind that matters in the score head.

    Layers that integer kernels compute are left out: those that read quantized values, and additions, which may be
    fused with a convolution before them.
    """
    kinds = trt.LayerType
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type == kinds.DEQUANTIZE}
    return [layer for layer in layers
            if layer.type in (kinds.ELEMENTWISE, kinds.UNARY, kinds.REDUCE, kinds.TOPK, kinds.MATRIX_MULTIPLY)
            and layer.get_output(0).dtype == trt.DataType.FLOAT and not _is_addition(trt, layer)
            and dequantized.isdisjoint(tensor.name for tensor in map(layer.get_input, range(layer.num_inputs)))]


def _is_addition(trt: Any, layer: Any) -> bool:
    if layer.type != trt.LayerType.ELEMENTWISE:
        return False
    elementwise = layer
    elementwise.__class__ = trt.IElementWiseLayer  # networks return every layer as its base type
    return bool(elementwise.op == trt.ElementWiseOperation.SUM)


def describe_error(error: Any) -> str:
    """A parser's error and its node."""
    place = f"node {error.node()}"
    if hasattr(error, "node_name"):  # 10 and later
        place = f"{error.node_operator()} {error.node_name()}"
    return f"{place}: {' '.join(error.desc().split())}"
