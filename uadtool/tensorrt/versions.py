"""What differs between TensorRT 8.5 (JetPack 5), 8.6, 10, 11 and TensorRT-RTX."""

import importlib
import platform
from typing import Any, List, Optional, Tuple

from uadtool.errors import MissingPackage

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""Imported in this order; the second builds without a GPU, too."""


def import_tensorrt(package: Optional[str] = None) -> Any:
    """The TensorRT that is installed; or this one of ``PACKAGES``.

    Raises:
        MissingPackage: there is none; with what installs it on this machine.
    """
    for name in [package] if package else PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as reason:
            if reason.name != name:  # it is there, but a library that it needs is not
                raise MissingPackage(f"{name} cannot be imported: {reason}; reinstall it") from reason
    name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[package or "tensorrt"]
    if platform.machine() == "aarch64":
        raise MissingPackage(f"{name} is not installed; on a Jetson: sudo apt-get install python3-libnvinfer")
    raise MissingPackage(f"{name} is not installed; pip install 'uadtool[tensorrt-rtx]', or NVIDIA's tensorrt")


def version(trt: Any) -> Tuple[int, ...]:
    """(major, minor) of it."""
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def is_rtx(trt: Any) -> bool:
    """Is it TensorRT-RTX, whose versions count from 1?"""
    return bool(trt.__name__ == "tensorrt_rtx")


def create_network(trt: Any, builder: Any) -> Any:
    """An empty network with a batch dimension, whose tensors have the types of the graph where TensorRT can do that."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_rtx(trt) or version(trt) >= (11, 0):
        return builder.create_network(0)
    return builder.create_network(1 << int(flags.STRONGLY_TYPED if version(trt) >= (10, 0) else flags.EXPLICIT_BATCH))


def use_types_of_graph(trt: Any, network: Any, config: Any, precision: str) -> None:
    """Let the builder compute in the types that the graph has, and in no others.

    Before version 10 networks have no types, but flags say what the builder may take for any layer. It would take fp16
    for the score head, too, whose squares and small differences that cannot hold: so it is told to obey, and which
    layers are fp32.

    Args:
        precision: of the graph, as in its metadata: fp32, fp16, int8 or mixed.
    """
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float is so for its accuracy
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
    """The layers, of kinds that count in the score head, that the graph has in fp32.

    Left out is what integer kernels compute: what reads quantized values, and additions, which may be fused with a
    convolution before them.
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
    elementwise.__class__ = trt.IElementWiseLayer  # networks give every layer the type of their base
    return bool(elementwise.op == trt.ElementWiseOperation.SUM)


def describe_error(error: Any) -> str:
    """A parser's error with the node that it is about."""
    place = f"node {error.node()}"
    if hasattr(error, "node_name"):  # 10 and later
        place = f"{error.node_operator()} {error.node_name()}"
    return f"{place}: {' '.join(error.desc().split())}"
