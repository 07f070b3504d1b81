"""The differences between TensorRT 8.5 (JetPack 5), 8.6, 10, 11 and TensorRT-RTX."""

import importlib
import platform
from typing import Any, List, Optional, Tuple

from uadtool.errors import MissingPackage, UadtoolError

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""Packages in order of preference. The second also builds without a GPU."""

FLOAT_MARK = "fp32/"
"""Beginning of the names of nodes that compute in fp32, in graphs for TensorRT."""

ADDED = ("(Unnamed Layer", "ONNXTRT_")
"""Beginnings of the names of layers that the importer adds to those of the nodes."""


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


def start(trt: Any, kind: Any, logger: Any) -> Any:
    """A Builder or Runtime.

    Raises:
        UadtoolError: TensorRT cannot use the GPU.
    """
    try:
        return kind(logger)
    except TypeError as error:  # of pybind11, for TensorRT returned nothing
        raise UadtoolError(f"TensorRT {trt.__version__} cannot use the GPU; check that its driver is new enough for "
                           "this version (-v shows TensorRT's messages)") from error


def takes_int8_constants(trt: Any) -> bool:
    """Whether weights may be stored as s8; otherwise the importer requires ``with_float_weights``."""
    return is_rtx(trt) or version(trt) >= (10, 0)


def create_network(trt: Any, builder: Any) -> Any:
    """An empty network with a batch dimension. Its tensors have the types of the graph if TensorRT supports that."""
    flags = trt.NetworkDefinitionCreationFlag
    if is_rtx(trt) or version(trt) >= (11, 0):
        return builder.create_network(0)
    return builder.create_network(1 << int(flags.STRONGLY_TYPED if version(trt) >= (10, 0) else flags.EXPLICIT_BATCH))


def use_types_of_graph(trt: Any, network: Any, config: Any) -> None:
    """Let the builder compute only in the types of the graph.

    Before version 10, networks have no types, and flags allow a type for any layer. Where the graph has fp16 or int8,
    fp16 is allowed: without it, the layers of an int8 graph for which there are no integer kernels would be fp32. But
    the builder would also compute the score head in fp16, which cannot hold its squares and small differences.
    Therefore the layers that ``fp32_layers`` finds are set to fp32, and the builder must obey.

    Raises:
        UadtoolError: an earlier version exported the graph, without the names of these layers.
    """
    config.clear_flag(trt.BuilderFlag.TF32)  # layers are float for accuracy
    if is_rtx(trt) or version(trt) >= (10, 0):
        return
    layers = _layers(network)
    quantized = any(layer.type == trt.LayerType.QUANTIZE for layer in layers)
    if not quantized and all(layer.get_output(0).dtype != trt.DataType.HALF for layer in layers):
        return
    if quantized:
        config.set_flag(trt.BuilderFlag.INT8)
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    floats = fp32_layers(trt, network)
    if not floats:
        raise UadtoolError("the graph does not name the layers that must compute in fp32, because an earlier version "
                           "exported it; export it again")
    for layer in floats:
        layer.precision = trt.DataType.FLOAT
        for index in range(layer.num_outputs):
            if layer.get_output(index).dtype == trt.DataType.FLOAT:
                layer.set_output_type(index, trt.DataType.FLOAT)


def fp32_layers(trt: Any, network: Any) -> List[Any]:
    """The layers of the nodes that ``FLOAT_MARK`` names, and the layers that the importer adds before them."""
    found, marked = [], False
    for layer in reversed(_layers(network)):
        if not layer.name.startswith(ADDED):
            marked = layer.name.startswith(FLOAT_MARK)
        if marked and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE) and trt.DataType.FLOAT in (
                tensor.dtype for tensor in (layer.get_input(0), layer.get_output(0)) if tensor is not None):
            found.append(layer)
    return found[::-1]


def use_own_kernels(trt: Any, config: Any) -> None:
    """Let TensorRT 8.5 do without cuDNN and cuBLAS, as later versions do: they take 600 MB of memory on a Xavier NX.

    https://github.com/NVIDIA/TensorRT/issues/3376
    """
    feature = getattr(getattr(trt, "PreviewFeature", None), "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805", None)
    if feature is not None:
        config.set_preview_feature(feature, True)
        external = (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT, trt.TacticSource.CUDNN)
        config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(source) for source in external))


def _layers(network: Any) -> List[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def describe_error(error: Any) -> str:
    """A parser's error and its node."""
    place = f"node {error.node()}"
    if hasattr(error, "node_name"):  # 10 and later
        place = f"{error.node_operator()} {error.node_name()}"
    return f"{place}: {' '.join(error.desc().split())}"
