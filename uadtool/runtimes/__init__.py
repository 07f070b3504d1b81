"""Running an exported detector: one interface, one module per runtime."""

import dataclasses
import importlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from uadtool.artifacts import file_digest, file_identity
from uadtool.errors import UadtoolError, require_lab
from uadtool.host import available_cores
from uadtool.metadata import Metadata
from uadtool.runtimes.onnx_metadata import read_metadata
from uadtool.tensorrt.files import read_engine_metadata, require_fit

RUNTIMES = {"onnxruntime": "OnnxRuntime", "openvino": "OpenVino", "tensorrt": "TensorRt", "torch": "Torch"}
"""Class of each, in the module here that has the name of the package it needs."""

OPENVINO_TARGETS = ("openvino", "tensorrt")
"""Targets of quantized graphs that OpenVINO runs in integers and ONNX Runtime mostly in float."""

ATTEMPTS = 10
"""To open a file that others replace."""

log = logging.getLogger("uadtool")


class Output(NamedTuple):
    """What a detector says about N images.

    ``score`` is float32 [N], ``anomaly_map`` float32 [N, h, w] in the same unit (standard deviations of the good images
    of the nearest class), ``raw_score`` float32 [N] in the method's own unit, ``nearest_class`` int32 [N], indices into
    ``Metadata.classes``.
    """

    score: np.ndarray
    raw_score: np.ndarray
    anomaly_map: np.ndarray
    nearest_class: np.ndarray


class LayerTime(NamedTuple):
    """What a layer, as the runtime fused it, takes in a run; ``kind`` is the runtime's name of its operation."""

    name: str
    kind: str
    milliseconds: float


class Runtime(Protocol):
    """A detector ready to run: ``path`` of its file, ``name`` and ``version`` of the runtime.

    It uses ``threads`` cores, shared by ``streams`` runs that go on at once. ``gpu_bytes`` is the memory that it holds
    on a GPU, None where it uses none. ``identity`` is that of the file (``file_identity``) which ``open_model`` read.
    """

    path: str
    name: str
    version: str
    threads: int
    streams: int
    metadata: Metadata
    gpu_bytes: Optional[int]
    identity: Tuple[int, ...]

    def run(self, images: np.ndarray) -> Output:
        """Score ``images``, uint8 [N, H, W, 3] RGB of the size that the metadata says. Any thread may call it."""

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        """The mean time of each layer over some runs, in the order of the network. Measuring slows later runs."""


def open_model(path: str, threads: Optional[int] = None, runtime: str = "auto", streams: int = 1) -> Runtime:
    """Open the model file ``path`` on ``threads`` cores (all available ones if None).

    A file that is replaced or written to meanwhile is opened anew.

    Args:
        streams: runs that share the cores; one is fastest for an image, as many as cores for many images.
        runtime: one of ``RUNTIMES``; "auto" takes the fastest for this kind of file of those that are installed, and
            says which where it had a choice.

    Raises:
        UadtoolError: there is no such file, it is damaged or not an exported detector, or is an engine that was not
            built for what is here.
        MissingPackage: the runtime, or any, is not installed.
    """
    if not Path(path).is_file():
        raise UadtoolError(f"{path}: no such model file")
    for _ in range(ATTEMPTS):
        identity = file_identity(path)
        try:
            model = _open(path, threads, runtime, streams)
        except UadtoolError:
            if identity == file_identity(path):
                raise
        else:
            model.identity = identity
            if identity == file_identity(path):
                return model
    raise UadtoolError(f"{path} was replaced whenever it was opened; run this again once it stays")


def _open(path: str, threads: Optional[int], runtime: str, streams: int) -> Runtime:
    metadata = _metadata(path, runtime)
    others: List[str] = []
    if runtime == "auto":
        runtime, *others = ["tensorrt"] if Path(path).suffix == ".engine" else _installed(metadata.target)
    module = importlib.import_module(f"uadtool.runtimes.{runtime}")
    try:
        model: Runtime = getattr(module, RUNTIMES[runtime])(path, metadata, threads or available_cores(), streams)
    except UadtoolError:
        raise
    except Exception as error:  # those of the runtimes have no common base
        raise UadtoolError(f"{path} cannot be loaded by {runtime}: {' '.join(str(error).split())}") from error
    if others:
        log.info("%s runs on %s (by its kind; --runtime %s runs it, too)", path, runtime, others[0])
    return model


def _metadata(path: str, runtime: str) -> Metadata:
    """Those of a model file that the runtime runs."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        if runtime != "torch":
            raise UadtoolError(f"{path} cannot be run as it is; export it first: uadtool export {path} -o model.onnx "
                               "(or take --runtime torch)")
        require_lab()
        from uadtool.models import read_metadata as of_safetensors

        return of_safetensors(path)
    if suffix not in (".onnx", ".engine"):
        raise UadtoolError(f"{path} is not a model that can be run: its name must end in .onnx, .engine or "
                           ".safetensors")
    if runtime == "torch":
        raise UadtoolError(f"torch runs .safetensors files, and not {path}")
    if suffix == ".engine":
        if runtime not in ("auto", "tensorrt"):
            raise UadtoolError(f"{path} is an engine, which {runtime} cannot run; give it the .onnx file")
        metadata, build = read_engine_metadata(path)
        require_fit(path, build)
        return metadata
    if runtime == "tensorrt":
        raise UadtoolError(f"TensorRT runs engines; first, on this device: uadtool export {path} -o "
                           f"{Path(path).with_suffix('.engine')}")
    return read_metadata(path)


def _installed(target: Optional[str]) -> List[str]:
    """The runtimes here that run an ONNX file of this target, the fastest first; ONNX Runtime if there is none.

    The order is a rule, from the latencies in the README; where neither is ahead throughout, ONNX Runtime is first. To
    measure here would take longer than to score an image, and two runs that chose differently could not be merged.
    """
    names = ["onnxruntime", "openvino"]
    if target in OPENVINO_TARGETS:
        names.reverse()
    return list(filter(find_spec, names)) or ["onnxruntime"]


TensorSpec = Tuple[str, str, Sequence[Any]]
"""Name, NumPy's name of the type, and shape; a size that is not an int is free."""


def check_signature(model: Runtime, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Require that a graph takes and gives what a detector does.

    Raises:
        UadtoolError: naming what it has and what was expected.
    """
    found_inputs, found_outputs = _lines(inputs), _lines(outputs)
    wanted_inputs = _lines([("image", "uint8", ("N", *model.metadata.image_size, 3))])
    wanted_outputs = _lines([
        ("score", "float32", "N"),
        ("raw_score", "float32", "N"),
        ("anomaly_map", "float32", ("N", *model.metadata.map_size)),
        ("nearest_class", "int32", "N"),
    ])
    if found_inputs != wanted_inputs or sorted(found_outputs) != sorted(wanted_outputs):
        raise UadtoolError(f"{model.path} is not a complete detector: it has {', '.join(found_inputs)} -> "
                           f"{', '.join(found_outputs)}; expected {', '.join(wanted_inputs + wanted_outputs)}")


def _lines(tensors: Iterable[TensorSpec]) -> List[str]:
    shapes = [(name, kind, [size if isinstance(size, int) else "N" for size in shape]) for name, kind, shape in tensors]
    return [f"{name}: {kind} [{', '.join(map(str, shape))}]" for name, kind, shape in shapes]


def describe(runtime: Runtime) -> Dict[str, Any]:
    """The ``model`` and ``runtime`` objects of a record.

    Raises:
        UadtoolError: the file is no longer the one that was opened.
    """
    metadata = runtime.metadata
    digest = file_digest(runtime.path)
    if file_identity(runtime.path) != runtime.identity:
        raise UadtoolError(f"{runtime.path} was replaced while this ran; run it again")
    quantization = metadata.quantization
    return {
        "model": {
            "path": runtime.path,
            "digest": digest,
            "method": metadata.method,
            "teacher": metadata.teacher,
            "precision": metadata.precision,
            "target": metadata.target,
            "classes": metadata.classes,
            "image_size": list(metadata.image_size),
            **({"quantization": {**dataclasses.asdict(quantization), "float_layers": len(quantization.float_layers)}}
               if quantization else {}),
        },
        "runtime": {"name": runtime.name, "version": runtime.version, "threads": runtime.threads,
                    "streams": runtime.streams},
    }
