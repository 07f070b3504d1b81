"""OpenVINO on the CPU."""

import sys
import threading
from collections import defaultdict
from types import ModuleType
from typing import Any, Dict, List

import numpy as np

from uadtool.errors import require
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import LayerTime, Output, Runtime, TensorSpec, check_signature

SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",  # not bf16 or f16, even if the processor supports it; integers stay integers
    "ENABLE_CPU_PINNING": False,  # it would pin several processes to the same core
}

TYPES = {"u8": "uint8", "i32": "int32", "f32": "float32"}
"""OpenVINO's names of a detector's types -> NumPy's."""


class OpenVino(Runtime):
    """A detector in an ONNX file."""

    name = "openvino"

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int = 1) -> None:
        super().__init__(path, metadata, threads, streams)
        openvino = import_openvino()
        self.version = openvino.__version__.partition("-")[0]  # without commit and branch
        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self.outputs = check_signature(
            self, map(_tensor, self._model.inputs), map(_tensor, self._model.outputs))
        self._compiling = threading.Lock()
        self._compiled: Dict[int, Any] = {}
        self._idle: Dict[int, List[Any]] = defaultdict(list)  # requests by batch size
        self._detector(1)

    def run(self, images: np.ndarray) -> Output:
        idle = self._idle[len(images)]
        try:
            request = idle.pop()
        except IndexError:
            request = self._detector(len(images)).create_infer_request()
        result = request.infer({"image": images})
        idle.append(request)
        return Output.of([result[name] for name in self.outputs])

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        request = self._compile(len(images), PERF_COUNT=True).create_infer_request()
        times: Dict[str, float] = {}
        kinds = {}
        for run in range(1 + runs):
            request.infer({"image": images})
            for layer in request.profiling_info if run else []:  # the first run is slower
                if layer.status.name == "EXECUTED":
                    milliseconds = layer.real_time.total_seconds() * 1000
                    times[layer.node_name] = times.get(layer.node_name, 0.0) + milliseconds / runs
                    kinds[layer.node_name] = layer.node_type
        return [LayerTime(name, kinds[name], time) for name, time in times.items()]

    def close(self) -> None:
        self._idle.clear()
        self._compiled.clear()
        self._model = self._core = None

    def _detector(self, batch_size: int) -> Any:
        """The detector compiled for this batch size, which makes a small one up to a fifth faster."""
        with self._compiling:
            if batch_size not in self._compiled:
                self._compiled[batch_size] = self._compile(batch_size)
            return self._compiled[batch_size]

    def _compile(self, batch_size: int, **settings: Any) -> Any:
        self._model.reshape([batch_size, *self.metadata.image_size, 3])
        settings = {**SETTINGS, "INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": self.streams, **settings}
        return self._core.compile_model(self._model, "CPU", settings)


def import_openvino() -> ModuleType:
    """Import the package without its converter, which would send telemetry and write to the home folder."""
    converter = "openvino.tools.ovc"
    if converter in sys.modules:
        return require("openvino", "openvino")
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        return require("openvino", "openvino")
    finally:
        del sys.modules[converter]


def _tensor(value: Any) -> TensorSpec:
    kind = value.element_type.get_type_name()
    shape = [size.get_length() if size.is_static else None for size in value.partial_shape]
    return value.any_name, TYPES.get(kind, kind), shape
