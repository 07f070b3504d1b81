"""Running an exported detector: one interface, one module per runtime."""

from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Protocol

import numpy as np

from uadtool.artifacts import file_digest
from uadtool.errors import UadtoolError
from uadtool.host import available_cores
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


class Runtime(Protocol):
    """A detector ready to run: ``path`` of its file, ``name`` and ``version`` of the runtime, ``threads`` it uses."""

    path: str
    name: str
    version: str
    threads: int
    metadata: Metadata

    def run(self, images: np.ndarray) -> Output:
        """Score ``images``, uint8 [N, H, W, 3] RGB of the size that the metadata says."""


def open_model(path: str, threads: Optional[int] = None) -> Runtime:
    """Open the model file ``path`` with the runtime for its kind, on ``threads`` cores (all available ones if None).

    Raises:
        UadtoolError: there is no such file, it is not an exported detector, or its runtime is not installed.
    """
    if not Path(path).is_file():
        raise UadtoolError(f"{path}: no such model file")
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        raise UadtoolError(f"{path} cannot be run as it is; export it first: uadtool export {path} -o model.onnx")
    if suffix != ".onnx":
        raise UadtoolError(f"{path} is not a model that can be run: its name must end in .onnx")
    from uadtool.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(path, threads or available_cores())


def describe(runtime: Runtime) -> Dict[str, Any]:
    """The ``model`` and ``runtime`` objects of a record."""
    metadata = runtime.metadata
    return {
        "model": {
            "path": runtime.path,
            "digest": file_digest(runtime.path),
            "method": metadata.method,
            "teacher": metadata.teacher,
            "precision": metadata.precision,
            "target": metadata.target,
            "classes": metadata.classes,
            "image_size": list(metadata.image_size),
        },
        "runtime": {"name": runtime.name, "version": runtime.version, "threads": runtime.threads},
    }
