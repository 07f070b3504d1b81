"""Stand-ins for ``tensorrt`` and ``pycuda.driver`` where there is no GPU: memory is the host's, an engine is an ONNX
file that ONNX Runtime runs. What they cannot show, `make test-gpu` does on a machine that has one.
"""

from types import ModuleType, SimpleNamespace
from typing import Any, Dict, List, Set

import numpy as np
import onnxruntime

VERSION = "8.5.2.2"
MAX_BATCH = 4
DTYPES = {"tensor(uint8)": "UINT8", "tensor(int32)": "INT32", "tensor(float)": "FLOAT"}


class Gpu:
    """Its memory by address, and what is on it."""

    def __init__(self) -> None:
        self.memory: Dict[int, np.ndarray] = {}
        self.current = 0  # contexts pushed and not popped
        self.allocations = 0
        self.shapes_set = 0
        self.synchronized = True
        self.min_batch = 1
        self.page_locked: Set[int] = set()

    def driver(self) -> ModuleType:
        """A stand-in for ``pycuda.driver``."""
        gpu = self

        class Allocation:
            def __init__(self, size: int) -> None:
                assert gpu.current
                gpu.allocations += 1
                gpu.memory[id(self)] = np.zeros(size, np.uint8)

            def __int__(self) -> int:
                return id(self)

            def __del__(self) -> None:
                del gpu.memory[id(self)]

        class Stream:
            handle = 7

            def synchronize(self) -> None:
                assert gpu.current
                gpu.synchronized = True

        class Context:
            def push(self) -> None:
                gpu.current += 1

            def pop(self) -> None:
                gpu.current -= 1

        def pagelocked_empty(shape: Any, dtype: Any) -> np.ndarray:
            array = np.empty(shape, dtype)
            gpu.page_locked.add(array.ctypes.data)
            return array

        def htod(device: Any, host: np.ndarray, stream: Any) -> None:
            assert gpu.current
            assert host.ctypes.data in gpu.page_locked
            gpu.memory[int(device)][:host.nbytes] = host.view(np.uint8).ravel()
            gpu.synchronized = False

        def dtoh(host: np.ndarray, device: Any, stream: Any) -> None:
            assert gpu.current
            assert host.ctypes.data in gpu.page_locked
            host[...] = gpu.memory[int(device)][:host.nbytes].view(host.dtype).reshape(host.shape)
            gpu.synchronized = False

        driver = ModuleType("pycuda.driver")
        vars(driver).update(
            init=lambda: None, mem_alloc=Allocation, Stream=Stream, pagelocked_empty=pagelocked_empty,
            memcpy_htod_async=htod, memcpy_dtoh_async=dtoh,
            mem_get_info=lambda: (1_000_000_000 - sum(len(part) for part in gpu.memory.values()), 1_000_000_000),
            Device=lambda index: SimpleNamespace(retain_primary_context=Context))
        return driver

    def tensorrt(self) -> ModuleType:
        """A stand-in for ``tensorrt``."""
        gpu = self

        class ILogger:
            ERROR, WARNING = 1, 2

        class IProfiler:
            pass

        class Execution:
            def __init__(self, session: Any) -> None:
                self.session = session
                self.addresses: Dict[str, int] = {}
                self.shape: Any = None
                self.profiler: Any = None

            def set_tensor_address(self, name: str, address: int) -> None:
                self.addresses[name] = address

            def set_input_shape(self, name: str, shape: Any) -> bool:
                gpu.shapes_set += 1
                self.shape = tuple(shape)
                return gpu.min_batch <= shape[0] <= MAX_BATCH

            def execute_async_v3(self, handle: int) -> bool:
                assert gpu.current
                if not gpu.min_batch <= self.shape[0] <= MAX_BATCH:
                    return False
                image = gpu.memory[self.addresses["image"]][:int(np.prod(self.shape))].reshape(self.shape)
                names = [output.name for output in self.session.get_outputs()]
                for name, value in zip(names, self.session.run(names, {"image": image})):
                    gpu.memory[self.addresses[name]][:value.nbytes] = value.view(np.uint8).ravel()
                for layer in ("convolution", "reduction") if self.profiler else ():
                    self.profiler.report_layer_time(layer, 0.25 if layer == "reduction" else 1.5)
                return True

        class Engine:
            def __init__(self, plan: bytes) -> None:
                self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
                self.tensors: List[Any] = [*self.session.get_outputs(), *self.session.get_inputs()]
                self.num_io_tensors = len(self.tensors)

            def get_tensor_name(self, index: int) -> str:
                return str(self.tensors[index].name)

            def _named(self, name: str) -> Any:
                return next(tensor for tensor in self.tensors if tensor.name == name)

            def get_tensor_dtype(self, name: str) -> Any:
                return SimpleNamespace(name=DTYPES[self._named(name).type])

            def get_tensor_shape(self, name: str) -> Any:
                return [size if isinstance(size, int) else -1 for size in self._named(name).shape]

            def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
                shape = tuple(self.get_tensor_shape(name)[1:])
                return [(gpu.min_batch, *shape), (MAX_BATCH, *shape), (MAX_BATCH, *shape)]

            def create_execution_context(self) -> Execution:
                return Execution(self.session)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                if not plan.startswith(b"\x08"):
                    self.logger.log(ILogger.ERROR, "magic tag does\n not match")
                    self.logger.log(ILogger.ERROR, "Assertion engine != nullptr failed.")  # and says nothing
                    return None
                return Engine(plan)

        trt = ModuleType("tensorrt")
        vars(trt).update(__version__=VERSION, ILogger=ILogger, IProfiler=IProfiler, Runtime=Runtime)
        return trt
