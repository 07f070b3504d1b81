"""ONNX Runtime on the CPU."""

from typing import Any

import numpy as np

from uadtool.errors import require
from uadtool.metadata import Metadata
from uadtool.runtimes import Output, Tensor, check_signature

FATAL = 4
"""Log severity. ONNX Runtime raises what went wrong; what it prints besides, on stderr, is noise."""

TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}
"""NumPy's names of the types that a detector has."""


class OnnxRuntime:
    """A detector in an ONNX file; see ``uadtool.runtimes.Runtime``."""

    name = "onnxruntime"

    def __init__(self, path: str, metadata: Metadata, threads: int) -> None:
        ort = require("onnxruntime", "onnxruntime")
        ort.set_default_logger_severity(FATAL)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL
        self.path = path
        self.version = ort.__version__
        self.threads = threads
        self.metadata = metadata
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        check_signature(self, map(_tensor, self._session.get_inputs()), map(_tensor, self._session.get_outputs()))

    def run(self, images: np.ndarray) -> Output:
        return Output(*self._session.run(Output._fields, {"image": images}))


def _tensor(value: Any) -> Tensor:
    return value.name, TYPES.get(value.type, value.type), value.shape
