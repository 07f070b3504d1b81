"""The calls of NVIDIA's driver that engines need: memory, copies, a stream, CUDA graphs.

ctypes calls the library that the driver installs. pycuda would have to be compiled on the device, with the CUDA toolkit
and for the NumPy that is installed there; it has no CUDA graphs, and it does not release contexts reliably. The process
may use pycuda or torch as well: all share the GPU's primary context.
"""

import ctypes
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np

from uadtool.errors import UadtoolError

LIBRARY = "libcuda.so.1"

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY of cuda.h."""
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR and _MINOR."""
NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: others, such as torch, may use the default stream while a graph is recorded."""
THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating memory."""

SIGNATURES: Dict[str, List[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
}
"""Function -> types of its arguments, as cuda.h declares them. The driver of JetPack 5 (CUDA 11.4) has all of them, and
a driver keeps what its predecessors had."""


class DriverError(UadtoolError):
    """A call that the driver refused, with the ``code`` of CUresult."""

    def __init__(self, function: str, code: int, reason: str) -> None:
        super().__init__(f"the GPU's driver refused {function.partition('_')[0]}: {reason} ({code})")
        self.code = code


class Gpu(NamedTuple):
    """A GPU's name, compute capability (``8.7`` for an Orin), and number of multiprocessors.

    The modules of a Jetson family have the same name; they differ in the number of multiprocessors.
    """

    name: str
    compute_capability: str
    multiprocessors: int


def current_gpu() -> Optional[Gpu]:
    """The first GPU, which this process would use; None without a GPU or driver."""
    try:
        device, name = _first_device(), ctypes.create_string_buffer(256)
    except UadtoolError:
        return None
    _call("cuDeviceGetName", name, len(name), device)
    multiprocessors, major, minor = (_number("cuDeviceGetAttribute", c_int, attribute, device)
                                     for attribute in (MULTIPROCESSORS, MAJOR, MINOR))
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", multiprocessors)


class Device:
    """The first GPU, with a stream. Its memory and ``stream`` stay until ``close``; then it is ``closed``.

    All methods except ``current``, ``on_close`` and ``close`` require that the context is current.

    Raises:
        UadtoolError: there is no driver or no GPU.
    """

    def __init__(self) -> None:
        device = _first_device()
        self._context = _number("cuDevicePrimaryCtxRetain", c_void_p, device)
        self.closed = False
        self._contents, self._retained = ExitStack(), ExitStack()
        self._retained.callback(_release, "cuDevicePrimaryCtxRelease_v2", device)
        try:
            with self.current():
                self.stream: int = _number("cuStreamCreate", c_void_p, NON_BLOCKING)
        except UadtoolError:
            self._retained.close()
            raise
        self._contents.callback(_release, "cuStreamDestroy_v2", self.stream)

    def close(self) -> None:
        """Free everything, in any thread, and call what ``on_close`` named. A second call does nothing."""
        if not self.closed:
            self.closed = True
            with self._retained, self.current():
                self._contents.close()

    def on_close(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function when the device is closed, before what was taken earlier is freed."""
        self._contents.callback(function, *arguments)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's primary context current in this thread; CUDA keeps that state per thread."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _number("cuCtxPopCurrent_v2", c_void_p)

    def free_memory(self) -> int:
        """Bytes that nobody uses."""
        total = c_size_t()
        return _number("cuMemGetInfo_v2", c_size_t, ctypes.byref(total))

    def allocate(self, size: int) -> int:
        """The address of new memory on the GPU."""
        address = _number("cuMemAlloc_v2", c_uint64, size)
        self._contents.callback(_release, "cuMemFree_v2", address)
        return address

    def allocate_on_host(self, size: int) -> np.ndarray:
        """New page-locked memory, uint8 [size], which the driver copies from and to directly."""
        address = _number("cuMemHostAlloc", c_void_p, size, 0)
        self._contents.callback(_release, "cuMemFreeHost", address)
        memory: Any = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(memory, np.uint8)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue the copy of a contiguous array to the GPU."""
        _call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue the copy of a contiguous array from the GPU."""
        _call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        _call("cuStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> int:
        """A graph of what ``work`` queues, which does not run now.

        Raises:
            UadtoolError: something cannot be recorded; the stream can be used as before.
        """
        recorded = c_void_p()
        with ExitStack() as stack:
            _call("cuStreamBeginCapture_v2", self.stream, THREAD_LOCAL)
            try:
                work()
            finally:  # also after an error the stream must leave this state
                code = _library().cuStreamEndCapture(self.stream, ctypes.byref(recorded))
                if recorded:
                    stack.callback(_release, "cuGraphDestroy", recorded)
            _check("cuStreamEndCapture", code)
            return _number("cuGraphInstantiateWithFlags", c_void_p, recorded, 0)

    def launch(self, graph: int) -> None:
        """Queue all that a graph recorded."""
        _call("cuGraphLaunch", graph, self.stream)

    def drop(self, graph: int) -> None:
        """Free a graph, which must not be running."""
        _release("cuGraphExecDestroy", graph)


def _first_device() -> int:
    _call("cuInit", 0)
    return _number("cuDeviceGet", c_int, 0)


def _number(function: str, kind: Any, *arguments: Any) -> int:
    """What a function writes where its first argument points to."""
    result = kind()
    _call(function, ctypes.byref(result), *arguments)
    return int(result.value or 0)


def _call(function: str, *arguments: Any) -> None:
    _check(function, getattr(_library(), function)(*arguments))


def _release(function: str, *arguments: Any) -> None:
    """Give something back. After an error on the GPU the driver refuses that, and frees everything with the process."""
    getattr(_library(), function)(*arguments)


def _check(function: str, code: int) -> None:
    if code:
        reason = c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(reason))
        raise DriverError(function, code, (reason.value or b"no reason given").decode(errors="replace"))


def _library() -> Any:
    return _load(LIBRARY)


@lru_cache(maxsize=None)
def _load(name: str) -> Any:
    try:
        library = ctypes.CDLL(name)
        for function, types in SIGNATURES.items():
            getattr(library, function).argtypes = types
    except (OSError, AttributeError) as error:
        raise UadtoolError(f"no GPU can be used, because its driver is missing or too old: {error}") from error
    return library
