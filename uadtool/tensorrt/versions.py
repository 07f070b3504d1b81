"""What differs between TensorRT 8.5 (JetPack 5), 8.6, 10, 11 and TensorRT-RTX."""

import importlib
import platform
from typing import Any, Optional, Tuple

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


def takes_precision_from_graph(trt: Any) -> bool:
    """Is every network strongly typed? Others need a flag for each precision that the builder may use."""
    return is_rtx(trt) or version(trt) >= (11, 0)


def create_network(trt: Any, builder: Any) -> Any:
    """An empty network with a batch dimension."""
    if is_rtx(trt) or version(trt) >= (10, 0):
        return builder.create_network(0)
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def describe_error(error: Any) -> str:
    """A parser's error with the node that it is about."""
    place = f"node {error.node()}"
    if hasattr(error, "node_name"):  # 10 and later
        place = f"{error.node_operator()} {error.node_name()}"
    return f"{place}: {' '.join(error.desc().split())}"
