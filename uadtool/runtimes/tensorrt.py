"""TensorRT on an NVIDIA GPU, with pycuda."""

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

import numpy as np

from uadtool.errors import UadtoolError, require
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import LayerTime, Output, Runtime, TensorSpec, check_signature
from uadtool.tensorrt.engine_file import engine_package
from uadtool.tensorrt.logger import make_logger
from uadtool.tensorrt.versions import import_tensorrt

TYPES = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}
"""TensorRT's names of a detector's types -> NumPy's. (TensorRT 8.5's ``nptype`` fails with NumPy 1.24 and later.)"""


class TensorRt(Runtime):
    """A detector in an engine.

    It shares the GPU's primary context with other users in the process. It allocates all its memory at the start, for
    the engine's largest batch, and frees it with the object. Host memory is page-locked, which saves the driver a copy.
    """

    name = "tensorrt"

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int = 1) -> None:
        # One stream keeps the GPU busy while other threads decode.
        super().__init__(path, metadata, threads, streams=1)
        self._trt = trt = import_tensorrt(engine_package(path))
        self._cuda = require("pycuda.driver", "jetson")
        self.version = trt.__version__
        self._running = threading.Lock()
        self._cuda.init()
        self._device = self._cuda.Device(0).retain_primary_context()
        with self._current():
            free, _ = self._cuda.mem_get_info()
            self._logger = make_logger(trt)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
            if self._engine is None:
                raise UadtoolError(f"TensorRT {self.version} cannot load {path}: {self._logger.reason}")
            names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
            tensors = [self._tensor(name) for name in names]
            self.outputs = check_signature(self, [tensor for tensor in tensors if tensor[0] == "image"],
                                           [tensor for tensor in tensors if tensor[0] != "image"])
            self._min_batch, _, self._max_batch = (
                shape[0] for shape in self._engine.get_tensor_profile_shape("image", 0))
            self._execution = self._engine.create_execution_context()
            self._stream = self._cuda.Stream()
            self._host = {name: self._cuda.pagelocked_empty((self._max_batch, *shape[1:]), kind)
                          for name, kind, shape in tensors}
            self._on_device = {name: self._cuda.mem_alloc(array.nbytes) for name, array in self._host.items()}
            for name, memory in self._on_device.items():
                self._execution.set_tensor_address(name, int(memory))
            self._batch = 0
            self.gpu_bytes = free - self._cuda.mem_get_info()[0]

    def run(self, images: np.ndarray) -> Output:
        with self._running:
            parts = [self._run(images[start:start + self._max_batch])
                     for start in range(0, len(images), self._max_batch)]
        return parts[0] if len(parts) == 1 else Output(*map(np.concatenate, zip(*parts)))

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        profiler = _profiler(self._trt)
        self._execution.profiler = profiler
        self.run(images)
        profiler.milliseconds.clear()  # the first run is slower
        for _ in range(runs):
            self.run(images)
        return [LayerTime(name, "", sum(times) / runs) for name, times in profiler.milliseconds.items()]

    def _run(self, images: np.ndarray) -> Output:
        count = len(images)
        batch = max(count, self._min_batch)  # results beyond the images are ignored
        with self._current():
            self._host["image"][:count] = images
            if batch != self._batch:  # setting a shape is slow
                self._execution.set_input_shape("image", (batch, *images.shape[1:]))
                self._batch = batch
            self._cuda.memcpy_htod_async(self._on_device["image"], self._host["image"][:batch], self._stream)
            if not self._execution.execute_async_v3(self._stream.handle):
                raise UadtoolError(f"TensorRT {self.version} cannot run {self.path}: {self._logger.reason}")
            for name in self.outputs:
                self._cuda.memcpy_dtoh_async(self._host[name][:count], self._on_device[name], self._stream)
            self._stream.synchronize()
        return Output.of([self._host[name][:count].copy() for name in self.outputs])

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the GPU's context current in this thread; CUDA keeps that state per thread."""
        self._device.push()
        try:
            yield
        finally:
            self._device.pop()

    def _tensor(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        shape = [size if size >= 0 else None for size in self._engine.get_tensor_shape(name)]
        return name, TYPES.get(kind, kind), shape


def _profiler(trt: Any) -> Any:
    """A profiler that keeps the times that TensorRT reports."""
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.milliseconds: Dict[str, List[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds.setdefault(layer_name, []).append(ms)

    return Profiler()
