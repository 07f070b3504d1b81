"""Count what an engine launches and moves for one image, without a GPU: TensorRT-RTX lists its layers when it builds.

usage: python launches.py MODEL.onnx...

Prints a Markdown table. Bytes are those of all inputs, constants and outputs of all kernels, as if no cache held them.
The estimates for Jetsons are bytes / bandwidth + kernels x time of a launch, within a factor of about 2. TensorRT on a
Jetson fuses other layers than TensorRT-RTX for a GPU with compute capability 8.6.
"""

import re
import sys
from math import prod
from pathlib import Path
from typing import List, NamedTuple

import tensorrt_rtx as trt

from uadtool.runtimes.onnx_file import read_metadata
from uadtool.tensorrt import versions

SIZES = {"Float": 4, "Half": 2, "Int8": 1, "UInt8": 1, "Int32": 4, "Int64": 8, "Bool": 1}
"""Bytes of TensorRT's types, as the list names them."""
NO_KERNELS = ("signal", "wait", "shape_call")
"""Kinds of layers that compute nothing on the GPU."""
JETSONS = {"Xavier NX": 59.7, "Orin Nano": 68.0, "AGX Orin": 204.8}
"""Bandwidth of the memory in GB/s (NVIDIA's data sheets; Orin Nano 8 GB at 15 W, AGX Orin 64 GB)."""
LAUNCH, IN_GRAPH = 10, 3
"""Assumed microseconds from one kernel to the next: each launched by the processor, or within a CUDA graph."""
LAYER = re.compile(r"^Name: .*, LayerType: (\w+),")
TENSOR = re.compile(r"Dimensions: \[([^\]]*)\], Strides: \[[^\]]*\], StrideOrder: \[[^\]]*\], Datatype: (\w+)")


class Counts(NamedTuple):
    """Kernels of one image, and the megabytes that they read and write."""

    kernels: int
    megabytes: float


class Logger(trt.ILogger):
    """Keeps all messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []

    def log(self, severity: object, message: str) -> None:
        self.lines += message.split("\n")


def layers(path: str) -> List[str]:
    """The layers of an engine that is built from an exported detector, a line each."""
    logger = Logger()
    builder = trt.Builder(logger)
    network = versions.create_network(trt, builder)
    if not trt.OnnxParser(network, logger).parse(Path(path).read_bytes()):
        sys.exit(f"TensorRT-RTX {trt.__version__} does not support {path}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    versions.use_types_of_graph(trt, network, config)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *[(count, *read_metadata(path).image_size, 3) for count in (1, 1, 8)])
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        sys.exit(f"TensorRT-RTX {trt.__version__} cannot build {path}")
    return [line for line in logger.lines if LAYER.match(line)]


def count(lines: List[str]) -> Counts:
    """The kernels and bytes of these layers; a size that varies is 1, the number of images."""
    kernels = [line for line in lines if LAYER.match(line)[1] not in NO_KERNELS]
    tensors = [tensor for line in kernels for tensor in TENSOR.findall(line)]
    return Counts(len(kernels), sum(SIZES[kind] * prod(max(1, int(size)) for size in sizes.split(",") if size)
                                    for sizes, kind in tensors) / 1e6)


def row(path: str) -> List[str]:
    """A line of the table."""
    kernels, megabytes = count(layers(path))
    return [Path(path).stem, str(kernels), f"{megabytes:.1f}", *(
        " / ".join(f"{megabytes / bandwidth + kernels * launch / 1000:.1f}" for launch in (LAUNCH, IN_GRAPH))
        for bandwidth in JETSONS.values())]


def main(paths: List[str]) -> None:
    if not paths:
        sys.exit(__doc__)
    header = ["model", "kernels", "MB", *(f"{name}, ms (estimate)" for name in JETSONS)]
    for cells in (header, ["---"] * len(header), *map(row, paths)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
