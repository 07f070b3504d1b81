"""The contract of a detector that is ready to run."""

import dataclasses
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from uadtool.errors import UadtoolError
from uadtool.files import file_digest, file_identity
from uadtool.metadata import Metadata


class Output(NamedTuple):
    """A detector's results for N images.

    ``score`` is float32 [N], ``anomaly_map`` float32 [N, h, w], both in standard deviations of the good images of the
    nearest class. ``raw_score`` is float32 [N] in the method's own unit, ``nearest_class`` int32 [N], indices into
    ``Metadata.classes``. ``class_distance`` is float32 [N], the distance to that class, in standard deviations of its
    good images; NaN if the file was made before 2026-12 and has no such output.
    """

    score: np.ndarray
    raw_score: np.ndarray
    anomaly_map: np.ndarray
    nearest_class: np.ndarray
    class_distance: np.ndarray

    @classmethod
    def of(cls, tensors: Sequence[np.ndarray]) -> "Output":
        """The results of a graph: the values of its ``Runtime.outputs``."""
        missing = len(cls._fields) - len(tensors)
        return cls(*tensors, *[np.full(len(tensors[0]), np.nan, np.float32)] * missing)


class LayerTime(NamedTuple):
    """Time per run of a layer, as the runtime fused it. ``kind`` is the runtime's name for its operation."""

    name: str
    kind: str
    milliseconds: float


class Runtime:
    """A detector that is ready to run: ``path`` of its file, ``name`` and ``version`` of the runtime.

    ``close`` frees its memory, as does the end of a ``with`` block. A detector that is dropped is closed later.

    ``threads`` is the number of cores, ``streams`` the number of parallel runs that share them. ``gpu_bytes`` is the
    GPU memory that it holds, None without a GPU. ``identity`` is the ``file_identity`` that ``open_model`` read.
    ``outputs`` are the names of the graph's outputs, in the order of ``Output``.
    """

    name: str
    version: str
    gpu_bytes: Optional[int] = None
    identity: Tuple[int, ...] = ()
    outputs: Tuple[str, ...] = Output._fields

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int) -> None:
        self.path, self.metadata, self.threads, self.streams = path, metadata, threads, streams

    def run(self, images: np.ndarray) -> Output:
        """Score ``images``, uint8 [N, H, W, 3] RGB in ``metadata.image_size``. Any thread may call it."""
        raise NotImplementedError

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        """The mean time of each layer over ``runs`` runs, in network order. Measuring slows later runs."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the detector's memory; it cannot run afterwards. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


TensorSpec = Tuple[str, str, Sequence[Any]]
"""Name, NumPy's name of the type, and shape. A size that is not an int is variable."""


def check_signature(model: Runtime, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> Tuple[str, ...]:
    """Require that a graph has the inputs and outputs of a detector; returns its ``outputs``.

    Raises:
        UadtoolError: it does not; the message lists the actual and the expected tensors.
    """
    found_inputs, found_outputs = _described(inputs), _described(outputs)
    wanted_inputs = _described([("image", "uint8", ("N", *model.metadata.image_size, 3))])
    wanted_outputs = _described([("score", "float32", "N"), ("raw_score", "float32", "N"),
                                 ("anomaly_map", "float32", ("N", *model.metadata.map_size)),
                                 ("nearest_class", "int32", "N"), ("class_distance", "float32", "N")])
    if model.metadata.class_distance_limit is None and len(found_outputs) < len(Output._fields):  # before 2026-12
        wanted_outputs.pop()
    if found_inputs != wanted_inputs or sorted(found_outputs) != sorted(wanted_outputs):
        raise UadtoolError(f"{model.path} is not a complete detector: it has {', '.join(found_inputs)} -> "
                           f"{', '.join(found_outputs)}; expected {', '.join(wanted_inputs + wanted_outputs)}")
    return Output._fields[:len(wanted_outputs)]


def _described(tensors: Iterable[TensorSpec]) -> List[str]:
    shapes = [(name, kind, [size if isinstance(size, int) else "N" for size in shape]) for name, kind, shape in tensors]
    return [f"{name}: {kind} [{', '.join(map(str, shape))}]" for name, kind, shape in shapes]


def describe(runtime: Runtime) -> Dict[str, Any]:
    """The ``model`` and ``runtime`` objects of a record (schemas/common.json).

    Raises:
        UadtoolError: the file changed since it was opened.
    """
    digest = file_digest(runtime.path)
    if file_identity(runtime.path) != runtime.identity:
        raise UadtoolError(f"{runtime.path} was replaced while this ran; run it again")
    metadata = runtime.metadata
    model: Dict[str, Any] = {
        "path": runtime.path, "digest": digest, "method": metadata.method, "teacher": metadata.teacher,
        "precision": metadata.precision, "target": metadata.target, "classes": metadata.classes,
        "image_size": list(metadata.image_size)}
    trainings = [step for step in metadata.provenance if step.get("command") == "train"] or [{}]
    values = {"steps": trainings[0].get("steps"), "started": trainings[-1].get("started"),
              "base": trainings[-1].get("base")}
    if training := {name: value for name, value in values.items()
                    if isinstance(value, int if name == "steps" else str)}:
        model["training"] = training
    if isinstance(entries := metadata.options.get("entries"), int):
        model["entries"] = entries
    if metadata.quantization:
        model["quantization"] = {**dataclasses.asdict(metadata.quantization),
                                 "float_layers": len(metadata.quantization.float_layers)}
    return {"model": model, "runtime": {name: getattr(runtime, name)
                                        for name in ("name", "version", "threads", "streams")}}
