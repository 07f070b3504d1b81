"""The contract of an exported detector that is ready to run."""

import dataclasses
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from uadtool.errors import UadtoolError
from uadtool.files import file_digest, file_identity
from uadtool.metadata import Metadata


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
