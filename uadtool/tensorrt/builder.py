"""From an exported graph to an engine, which runs on the GPU and TensorRT version that it was built for."""

import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.metadata import Metadata
from uadtool.tensorrt.gpu import current_gpu
from uadtool.tensorrt.logger import make_logger
from uadtool.tensorrt.versions import (
    create_network,
    describe_error,
    import_tensorrt,
    is_rtx,
    use_types_of_graph,
    version,
)

MIB = 1 << 20

log = logging.getLogger("uadtool")


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    ``workspace`` is in MiB, None: as much as there is. Batches have 1 to ``max_batch`` images. ``timing_cache`` is a
    file that is read, if it is there, and written: so the next build is faster. ``dla`` is the number of a DLA core,
    which takes batches of ``max_batch`` alone; ``gpu_fallback`` lets the GPU compute what that cannot.
    ``compute_capability`` is that of the GPU, None: of the one that is here; only TensorRT-RTX builds for others.
    """

    workspace: Optional[int] = None
    max_batch: int = 8
    timing_cache: Optional[str] = None
    dla: Optional[int] = None
    gpu_fallback: bool = False
    compute_capability: Optional[str] = None


class Engine(NamedTuple):
    """A serialized engine; and the package, its version, the GPU and the options that made it, and the layers that the
    GPU runs although a DLA core was wanted.
    """

    plan: bytes
    build: Dict[str, Any]


def build_engine(onnx: str, metadata: Metadata, options: BuildOptions) -> Engine:
    """Build an engine from the graph in the file ``onnx``.

    Raises:
        UadtoolError: the graph is not for TensorRT, there is no GPU to build for, or TensorRT refuses something; with
            the reason.
        MissingPackage: there is no TensorRT.
    """
    trt = import_tensorrt()
    precision = _precision(onnx, metadata)
    gpu = current_gpu()
    capability = options.compute_capability or (gpu.compute_capability if gpu else None)
    if capability is None:
        raise UadtoolError("there is no GPU to build an engine for; run this on the device" + (
            ", or name its compute capability: --compute-capability 8.6" if is_rtx(trt) else ""))
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(onnx).read_bytes()):
        errors = [describe_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise UadtoolError(f"TensorRT {trt.__version__} does not take {onnx}: {errors[0] if errors else 'no reason'}")
    config = builder.create_builder_config()
    if options.compute_capability:
        _build_for(trt, config, options.compute_capability)
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * MIB)
    use_types_of_graph(trt, network, config, metadata.precision)
    on_gpu = [] if options.dla is None else _use_dla(trt, builder, network, config, options, precision)
    profile = builder.create_optimization_profile()
    least, most = ((count, *metadata.image_size, 3) for count in (1 if options.dla is None else options.max_batch,
                                                                  options.max_batch))
    profile.set_shape("image", least, most, most)
    config.add_optimization_profile(profile)
    cache = Path(options.timing_cache) if options.timing_cache else None
    timing = _use_timing_cache(config, cache) if cache else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UadtoolError(f"TensorRT {trt.__version__} cannot build {onnx}: {logger.reason}")
    if cache and timing is not None:
        with atomic_write(cache) as temporary:
            temporary.write_bytes(bytes(timing.serialize()))
    return Engine(bytes(plan), {
        "package": trt.__name__, "version": trt.__version__, "gpu": gpu.name if gpu else None,
        "precision": precision, **asdict(options), "compute_capability": capability, "dla_fallback": on_gpu})


def _precision(onnx: str, metadata: Metadata) -> str:
    """The precision of the graph, which TensorRT must support."""
    precision = "int8" if metadata.precision == "mixed" else metadata.precision
    if precision == "int8" and metadata.target != "tensorrt":
        raise UadtoolError(f"{onnx} was quantized for {metadata.target}, which TensorRT refuses; quantize the float "
                           "model with --target tensorrt")
    return precision


def _use_timing_cache(config: Any, path: Path) -> Any:
    """Let the build use what the file knows; nothing, where that is damaged or of another TensorRT or GPU."""
    known = path.read_bytes() if path.exists() else b""
    timing = config.create_timing_cache(known)
    if timing is None or not config.set_timing_cache(timing, False):
        log.warning("%s is damaged, or of another TensorRT or GPU: it is measured and written anew", path)
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)
    return timing


def _build_for(trt: Any, config: Any, capability: str) -> None:
    name = f"SM{capability.replace('.', '')}"
    if not is_rtx(trt):
        raise UadtoolError("only TensorRT-RTX builds for another GPU than the one that is here; leave out "
                           "--compute-capability")
    if not re.fullmatch(r"\d+\.\d", capability) or not hasattr(trt.ComputeCapability, name):
        known = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in dir(trt.ComputeCapability) if one.startswith("SM"))
        raise UadtoolError(f"TensorRT-RTX {trt.__version__} cannot build for {capability}; it can for {known}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, options: BuildOptions, precision: str) -> List[str]:
    """Let the DLA core run the network; returns the names of the layers that it cannot run."""
    if options.dla is None or options.dla >= builder.num_DLA_cores:
        raise UadtoolError(f"there is no DLA core {options.dla}; this device has {builder.num_DLA_cores}")
    if precision == "int8" and version(trt) < (11, 0):
        # https://developer.nvidia.com/blog/tensorrt-deep-learning-accelerator-cn
        raise UadtoolError("a DLA takes no graph with ranges in it (explicit quantization); give it the fp16 one")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    others = [layer.name for layer in layers if not config.can_run_on_DLA(layer)]
    if options.gpu_fallback:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    elif others:
        raise UadtoolError(f"the DLA cannot run {len(others)} of {len(layers)} layers, first {others[0]}; let the GPU "
                           "run those: --gpu-fallback")
    return others
