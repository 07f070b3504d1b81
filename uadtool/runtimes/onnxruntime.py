"""ONNX Runtime on the CPU."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List

import numpy as np

from uadtool.errors import require
from uadtool.host import adds_int8_exactly
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import LayerTime, Output, Runtime, TensorSpec, check_signature
from uadtool.terminal import log

FATAL = 4
"""Log severity. ONNX Runtime raises errors; its messages on stderr only repeat them."""

PRECISE = "session.x64quantprecision"
"""Option of a session, with which weights become u8. onnxruntime_session_options_config_keys.h"""

TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}
"""ONNX Runtime's names of a detector's types -> NumPy's."""


class OnnxRuntime(Runtime):
    """A detector in an ONNX file."""

    name = "onnxruntime"

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int = 1) -> None:
        super().__init__(path, metadata, threads, streams)
        self._ort = require("onnxruntime", "onnxruntime")
        self._ort.set_default_logger_severity(FATAL)
        self.version = self._ort.__version__
        self._session = self._open(self._options())
        self.outputs = check_signature(
            self, map(_tensor, self._session.get_inputs()), map(_tensor, self._session.get_outputs()))

    def run(self, images: np.ndarray) -> Output:
        return Output.of(self._session.run(self.outputs, {"image": images}))

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        with TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = self._open(options)
            for _ in range(1 + runs):
                session.run(self.outputs, {"image": images})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: Dict[str, List[float]] = {}
        kinds = {}
        for event in events:
            name, _, measure = event["name"].rpartition("_kernel_")
            if event["cat"] == "Node" and measure == "time":
                times.setdefault(name, []).append(event["dur"] / 1000)
                kinds[name] = event["args"]["op_name"]
        # The first run, which is slower, does not count.
        return [LayerTime(name, kinds[name], sum(durations[1:]) / runs) for name, durations in times.items()]

    def close(self) -> None:
        self._session = None

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = max(1, self.threads // self.streams)
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL
        return options

    def _open(self, options: Any) -> Any:
        """On x86 processors without VNNI, int8 products overflow unless weights become u8, as PRECISE asks for.

        ONNX Runtime cannot do that where layers share a constant, as in files of earlier versions. On processors with
        VNNI, it would do so as well, and the layers would take 2.5 times as long.
        """
        def session(precise: str) -> Any:
            options.add_session_config_entry(PRECISE, precise)
            return self._ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

        if adds_int8_exactly():
            return session("0")
        try:
            return session("1")
        except Exception:  # its errors have no common base
            inexact = session("0")
        log.warning("%s gives inexact scores on this processor; export the model again", self.path)
        return inexact


def _tensor(value: Any) -> TensorSpec:
    return value.name, TYPES.get(value.type, value.type), value.shape
