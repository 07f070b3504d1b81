"""Runs an engine on the GPU."""

import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from uadtool.errors import UadtoolError
from uadtool.tensorrt.driver import OUT_OF_MEMORY, Device, DriverError
from uadtool.tensorrt.logger import make_logger
from uadtool.tensorrt.versions import is_rtx, start
from uadtool.terminal import log

TYPES = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}
"""TensorRT's names of a detector's types -> NumPy's. (TensorRT 8.5's ``nptype`` fails with NumPy 1.24 and later.)"""

ALIGNMENT = 256
"""Of an output's address, as TensorRT requires."""


class Execution:
    """An engine on the GPU: ``tensors`` are the names, types and shapes of its inputs and outputs.

    ``allocate`` takes all memory, for the largest batch, and ``close`` frees it. Any thread may call ``run`` and
    ``close``. If ``graphs``, everything that a run queues is one CUDA graph from the second run in a row with the same
    number of images: one launch instead of one for each kernel and copy.

    Raises:
        UadtoolError: TensorRT cannot load the engine, or no GPU exists.
    """

    def __init__(self, trt: Any, path: str) -> None:
        self._trt, self._path = trt, path
        self._running = threading.Lock()
        self._device = Device()
        with self._closed_on_error():
            self._free_before = self._device.free_memory()
            # TensorRT's objects must be destroyed while the context is current: nothing else may refer to them, not
            # even a variable, which an exception keeps.
            self._objects: Dict[str, Any] = {}
            self._device.on_close(self._objects.clear)
            self._logger = make_logger(trt)
            self._objects["runtime"] = start(trt, trt.Runtime, self._logger)
            self._objects["engine"] = self._objects["runtime"].deserialize_cuda_engine(Path(path).read_bytes())
            if self._objects["engine"] is None:
                raise UadtoolError(f"TensorRT {trt.__version__} cannot load {path}: {self._logger.reason}")
            self.tensors = [self._tensor(self._objects["engine"].get_tensor_name(index))
                            for index in range(self._objects["engine"].num_io_tensors)]

    def allocate(self, outputs: Sequence[str]) -> int:
        """Take memory for the largest batch; returns the bytes that the engine uses on the GPU.

        Raises:
            UadtoolError: there is not enough memory.
        """
        with self._closed_on_error():
            shapes = {name: shape for name, _, shape in self.tensors}
            self._outputs = [(name, np.dtype(kind), shape[1:]) for wanted in outputs
                             for name, kind, shape in self.tensors if name == wanted]
            self.min_batch = self.max_batch = shapes["image"][0]
            if self.max_batch is None:  # variable, as it is but for a DLA
                smallest, _, largest = self._objects["engine"].get_tensor_profile_shape("image", 0)
                self.min_batch, self.max_batch = smallest[0], largest[0]
            self._objects["context"] = self._objects["engine"].create_execution_context()
            if self._objects["context"] is None:
                raise self._too_large()
            image = self.max_batch * int(np.prod(shapes["image"][1:]))
            _, size = self._places(self.max_batch)
            try:
                self._image, self._results = self._device.allocate(image), self._device.allocate(size)
                self._host_image = self._device.allocate_on_host(image)
                self._host_results = self._device.allocate_on_host(size)
            except DriverError as error:
                if error.code == OUT_OF_MEMORY:
                    raise self._too_large() from error
                raise
            self._objects["context"].set_tensor_address("image", self._image)
            self._batch, self._graph, self._repeated = 0, 0, False
            self.graphs = not is_rtx(self._trt)  # which replaces kernels by faster ones while it runs
            self._device.on_close(self._drop_graph)
            return self._free_before - self._device.free_memory()

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        """The outputs for uint8 [N, H, W, 3], N at most ``max_batch``.

        Raises:
            UadtoolError: TensorRT fails, or the execution was closed.
        """
        count = len(images)
        batch = max(count, self.min_batch)  # results beyond the images are ignored
        with self._running:
            if self._device.closed:
                raise UadtoolError(f"{self._path} was closed; open it again")
            with self._device.current():
                if batch != self._batch:
                    self._set_batch((batch, *images.shape[1:]))
                pixels = self._host_image[:batch * images[0].size]
                pixels[:images.size] = images.reshape(-1)
                self._launch(pixels)
                self._device.synchronize()
            return [self._host_results[place:place + batch * kind.itemsize * int(np.prod(shape))]
                    .view(kind).reshape(batch, *shape)[:count].copy()
                    for place, (_, kind, shape) in zip(self._offsets, self._outputs)]

    def layer_times(self, images: np.ndarray, runs: int) -> Dict[str, float]:
        """Mean milliseconds of each layer. Later runs are slower, because TensorRT goes on measuring."""
        with self._running, self._device.current():
            self.graphs = False  # it is not told of the layers in a graph
            profiler = self._objects["context"].profiler = self._objects["profiler"] = _profiler(self._trt)
        self.run(images)
        profiler.milliseconds.clear()  # the first run is slower
        for _ in range(runs):
            self.run(images)
        return {name: sum(times) / runs for name, times in profiler.milliseconds.items()}

    def layers(self) -> List[Dict[str, Any]]:
        """What TensorRT's inspector says of each layer: Name, LayerType, Inputs, Outputs and more, by version."""
        with self._running, self._device.current():
            self._objects["inspector"] = self._objects["engine"].create_engine_inspector()
            information = self._objects["inspector"].get_engine_information(self._trt.LayerInformationFormat.JSON)
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in json.loads(information)["Layers"]]

    def close(self) -> None:
        """Free all memory. A second call does nothing."""
        with self._running:
            self._device.close()

    def _launch(self, pixels: np.ndarray) -> None:
        """Queue a run, as a graph if the run before had the same batch."""
        if not self.graphs:
            self._drop_graph()
        elif self._repeated and not self._graph:
            try:
                self._graph = self._device.record(lambda: self._queue(pixels))
            except UadtoolError as error:
                self.graphs = False
                log.debug("%s runs without CUDA graphs: %s", self._path, error)
        if self._graph:
            self._device.launch(self._graph)
        else:
            self._queue(pixels)
        self._repeated = True

    def _queue(self, pixels: np.ndarray) -> None:
        self._device.upload(self._image, pixels)
        if not self._objects["context"].execute_async_v3(self._device.stream):
            raise UadtoolError(f"TensorRT {self._trt.__version__} cannot run {self._path}: {self._logger.reason}")
        self._device.download(self._host_results[:self._size], self._results)

    def _set_batch(self, shape: Tuple[int, ...]) -> None:
        """Set the shape of the input, and the addresses of the outputs, which lie side by side; this is slow."""
        self._drop_graph()
        self._batch, self._repeated = shape[0], False
        self._objects["context"].set_input_shape("image", shape)
        self._offsets, self._size = self._places(self._batch)
        for place, (name, _, _) in zip(self._offsets, self._outputs):
            self._objects["context"].set_tensor_address(name, self._results + place)

    def _places(self, batch: int) -> Tuple[List[int], int]:
        """Where each output begins in the memory of all, and the size of that memory, in bytes."""
        places, end = [], 0
        for _, kind, shape in self._outputs:
            places.append(-(-end // ALIGNMENT) * ALIGNMENT)
            end = places[-1] + batch * kind.itemsize * int(np.prod(shape))
        return places, end

    def _drop_graph(self) -> None:
        if self._graph:
            self._device.drop(self._graph)
        self._graph = 0

    def _tensor(self, name: str) -> Tuple[str, str, List[Any]]:
        kind = self._objects["engine"].get_tensor_dtype(name).name
        shape = self._objects["engine"].get_tensor_shape(name)
        return name, TYPES.get(kind, kind), [size if size >= 0 else None for size in shape]

    def _too_large(self) -> UadtoolError:
        free = self._device.free_memory() / 1e6
        return UadtoolError(f"{self._path} does not fit into the GPU's memory, of which {free:.0f} MB are free; end "
                            "other programs, or build it with a smaller --max-batch")

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            with self._device.current():
                yield
        except BaseException:
            self.close()
            raise


def _profiler(trt: Any) -> Any:
    """A profiler that keeps the times that TensorRT reports."""
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.milliseconds: Dict[str, List[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds.setdefault(layer_name, []).append(ms)

    return Profiler()
