"""TensorRT on an NVIDIA GPU."""

import weakref
from typing import List

import numpy as np

from uadtool.metadata import Metadata
from uadtool.runtimes.contract import LayerTime, Output, Runtime, check_signature
from uadtool.tensorrt.engine_file import engine_package
from uadtool.tensorrt.execution import Execution
from uadtool.tensorrt.versions import import_tensorrt


class TensorRt(Runtime):
    """A detector in an engine.

    It shares the GPU's primary context with other users in the process. It allocates all its memory at the start, for
    the engine's largest batch, and frees it in ``close``, or when it is dropped. Host memory is page-locked, which
    saves the driver a copy.
    """

    name = "tensorrt"
    execution: Execution
    """The engine on the GPU."""

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int = 1) -> None:
        # One stream keeps the GPU busy while other threads decode.
        super().__init__(path, metadata, threads, streams=1)
        trt = import_tensorrt(engine_package(path))
        self.version = trt.__version__
        self.execution = Execution(trt, path)
        self._close = weakref.finalize(self, self.execution.close)
        try:
            tensors = self.execution.tensors
            self.outputs = check_signature(self, [tensor for tensor in tensors if tensor[0] == "image"],
                                           [tensor for tensor in tensors if tensor[0] != "image"])
            self.gpu_bytes = self.execution.allocate(self.outputs)
        except BaseException:
            self.close()
            raise

    def run(self, images: np.ndarray) -> Output:
        size = self.execution.max_batch
        parts = [Output.of(self.execution.run(images[start:start + size])) for start in range(0, len(images), size)]
        return parts[0] if len(parts) == 1 else Output(*map(np.concatenate, zip(*parts)))

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        return [LayerTime(name, "", time) for name, time in self.execution.layer_times(images, runs).items()]

    def close(self) -> None:
        self._close()
