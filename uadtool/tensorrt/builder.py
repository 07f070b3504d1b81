"""Builds an engine from an exported graph, for one GPU and one version of TensorRT."""
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.metadata import Metadata
from uadtool.tensorrt import versions
from uadtool.tensorrt.driver import Gpu, current_gpu
from uadtool.tensorrt.logger import make_logger
from uadtool.tensorrt.weights import with_float_weights
from uadtool.terminal import log

MIB = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    ``workspace`` is in MiB, None for no limit. Batches have 1 to ``max_batch`` images, and the kernels are those that
    are fastest for ``optimal_batch``. ``timing_cache`` is a file that speeds up the next build; it is read if it
    exists, and written. ``dla`` is the number of a DLA core, which runs only batches of ``max_batch``;
    ``gpu_fallback`` lets the GPU run layers that the core cannot. ``compute_capability`` is that of the target GPU,
    None for the GPU of this machine; only TensorRT-RTX builds for other GPUs.
    """

    workspace: Optional[int] = None
    max_batch: int = 8
    optimal_batch: int = 1
    timing_cache: Optional[str] = None
    dla: Optional[int] = None
    gpu_fallback: bool = False
    compute_capability: Optional[str] = None


class Engine(NamedTuple):
    """A serialized engine, and the ``build`` object of its record (schemas/engine.json)."""

    plan: bytes
    build: Dict[str, Any]


def build_engine(onnx: str, metadata: Metadata, options: BuildOptions) -> Engine:
    """Build an engine from the graph in the file ``onnx``.

    Raises:
        UadtoolError: the graph is not for TensorRT, no GPU to build for was found, or TensorRT refuses something; the
            message has the reason.
        MissingPackage: TensorRT is not installed.
    """
    trt = versions.import_tensorrt()
    precision = "int8" if metadata.precision == "mixed" else metadata.precision
    if precision == "int8" and metadata.target != "tensorrt":
        raise UadtoolError(f"{onnx} was quantized for {metadata.target}, which TensorRT does not support; quantize "
                           "the float model with --target tensorrt")
    gpu = current_gpu()
    capability = _target(trt, gpu, options.compute_capability)
    logger = make_logger(trt)
    builder = versions.start(trt, trt.Builder, logger)
    network = versions.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    model = Path(onnx).read_bytes()
    try:
        if not versions.takes_int8_constants(trt):
            model = with_float_weights(model)
    except ValueError as error:
        raise UadtoolError(f"{onnx} is damaged: {error}") from error
    if not parser.parse(model):
        reason = versions.describe_error(parser.get_error(0)) if parser.num_errors else "no reason given"
        raise UadtoolError(f"TensorRT {trt.__version__} does not support {onnx}: {reason}")
    config = builder.create_builder_config()
    if options.compute_capability:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # engines tell the types of their layers
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * MIB)
    versions.use_types_of_graph(trt, network, config)
    versions.use_own_kernels(trt, config)
    dla_fallback, optimal_batch = [], min(options.optimal_batch, options.max_batch)
    if options.dla is not None:
        # First, because no layer of variable shape can run there.
        optimal_batch = options.max_batch
        network.get_input(0).shape = (optimal_batch, *metadata.image_size, 3)
        dla_fallback = _use_dla(trt, builder, network, config, options, precision)
    else:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *((count, *metadata.image_size, 3) for count in (
            1, optimal_batch, options.max_batch)))
        config.add_optimization_profile(profile)
    timing = _use_timing_cache(config, Path(options.timing_cache)) if options.timing_cache else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UadtoolError(f"TensorRT {trt.__version__} cannot build {onnx}: {logger.reason}")
    if options.timing_cache and timing is not None:
        with atomic_write(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(timing.serialize()))
    return Engine(bytes(plan), {
        "package": trt.__name__, "version": trt.__version__, "gpu": gpu.name if gpu else None,
        "multiprocessors": gpu.multiprocessors if gpu else None, "precision": precision, **asdict(options),
        "optimal_batch": optimal_batch, "compute_capability": capability, "dla_fallback": dla_fallback})


def _use_timing_cache(config: Any, path: Path) -> Any:
    """Let the build use the timings in a file; none if it is damaged or from another TensorRT or GPU."""
    timing = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if timing is None or not config.set_timing_cache(timing, False):
        log.warning("%s is damaged or from another TensorRT or GPU; it is measured and written anew", path)
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)
    return timing


def _target(trt: Any, gpu: Optional[Gpu], chosen: Optional[str]) -> str:
    """The compute capability to build for: the chosen one, or that of this machine's GPU."""
    if not versions.is_rtx(trt):
        if chosen:
            raise UadtoolError("only TensorRT-RTX builds for other GPUs than this machine's; leave out "
                               "--compute-capability")
        if not gpu:
            raise UadtoolError("no GPU to build an engine for was found; run this on the device")
        return gpu.compute_capability
    known = sorted((int(name[2:-1]), int(name[-1])) for name in dir(trt.ComputeCapability) if re.match(r"SM\d", name))
    supported = ", ".join(f"{major}.{minor}" for major, minor in known)
    if chosen:
        capability, target = chosen, chosen
    elif gpu:
        capability, target = gpu.compute_capability, f"this {gpu.name}, which has {gpu.compute_capability}"
    else:
        raise UadtoolError("no GPU to build an engine for was found; run this on the device, or name its compute "
                           f"capability, one of {supported}: --compute-capability 8.6")
    if capability not in supported.split(", "):
        raise UadtoolError(f"TensorRT-RTX {trt.__version__} cannot build for {target}; it supports {supported}")
    return capability


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, options: BuildOptions, precision: str) -> List[str]:
    """Let the DLA core run the network, and return the names of the layers that it cannot run."""
    if options.dla is None or options.dla >= builder.num_DLA_cores:
        # https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html
        hint = ""
        if versions.version(trt) > (10, 7):
            hint = "; after TensorRT 10.7 only 11.4.1 and later support one, that of an AGX Orin"
        raise UadtoolError(f"DLA core {options.dla} does not exist; this device has {builder.num_DLA_cores}{hint}")
    if precision == "int8" and versions.version(trt) < (11, 0):
        # https://developer.nvidia.com/blog/tensorrt-deep-learning-accelerator-cn
        raise UadtoolError("a DLA does not support graphs with ranges in them (explicit quantization); give it the "
                           "fp16 graph")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    unsupported = [layer.name for layer in layers if not config.can_run_on_DLA(layer)]
    if options.gpu_fallback:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    elif unsupported:
        raise UadtoolError(f"the DLA cannot run {len(unsupported)} of {len(layers)} layers, first {unsupported[0]}; "
                           "let the GPU run them: --gpu-fallback")
    return unsupported
