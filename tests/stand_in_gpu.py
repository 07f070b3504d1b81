"""Stand-ins for NVIDIA's driver and ``tensorrt`` where there is no GPU. An engine is an ONNX file for ONNX Runtime.

The driver is a real library (stand_in_driver.c), which uadtool calls as it calls NVIDIA's. What the stand-ins cannot
show, `make test-gpu` does on a machine that has a GPU.
"""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Dict, List
from unittest.mock import MagicMock

import numpy as np
import onnxruntime
import pytest

VERSION = "8.5.2.2"
MAX_BATCH = 4
DTYPES = {"tensor(uint8)": "UINT8", "tensor(int32)": "INT32", "tensor(float)": "FLOAT"}
HELD = ("contexts", "current", "streams", "graphs", "device_blocks", "device_bytes", "host_blocks", "launches")
KERNEL = ctypes.CFUNCTYPE(None)


def headers() -> List[str]:
    """Where cuda.h lies: with the CUDA toolkit, or with torch for CUDA."""
    patterns = ((Path("/usr/local"), "cuda*"), (Path(sys.prefix), "lib/python3*/site-packages/nvidia/*"))
    return sorted(str(path) for root, pattern in patterns for path in root.glob(f"{pattern}/include/cuda.h"))


def compile_driver(folder: Path, *options: str) -> str:
    """The path of the stand-in for libcuda.so.1."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc on this machine")
    library = str(folder / "libcuda.so.1")
    source = Path(__file__).with_name("stand_in_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", *options, str(source), "-o", library], check=True)
    return library


class Gpu:
    """What the stand-ins hold and count.

    ``memory_limit`` is in bytes. ``recordable`` is whether TensorRT can be recorded into a graph, ``has_context``
    whether it can create a context.
    """

    def __init__(self, library: str) -> None:
        self.driver = ctypes.CDLL(library)
        self.driver.stand_in_limit.argtypes = [ctypes.c_size_t]
        for name in ("stand_in_recording", "stand_in_break"):
            getattr(self.driver, name).argtypes = [ctypes.c_void_p]
        self.driver.stand_in_kernel.argtypes = [ctypes.c_void_p, KERNEL]
        self.shapes_set = 0
        self.min_batch = 1
        self.recordable = self.has_context = True
        self.kernels: List[Any] = []  # the driver has only their addresses
        self.memory_limit(0)
        self._launches = self.driver.stand_in_held(HELD.index("launches"))

    def held(self) -> Dict[str, int]:
        """What is not given back; ``launches`` counts those of graphs, and ``current`` is of this thread."""
        counts = {name: self.driver.stand_in_held(index) for index, name in enumerate(HELD)}
        return {**counts, "launches": counts["launches"] - self._launches}

    def memory_limit(self, size: int) -> None:
        self.driver.stand_in_limit(size)

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

            def __del__(self) -> None:
                assert gpu.held()["current"], "destroyed while no context was current"

            def set_tensor_address(self, name: str, address: int) -> None:
                assert address % 256 == 0
                self.addresses[name] = address

            def set_input_shape(self, name: str, shape: Any) -> bool:
                gpu.shapes_set += 1
                self.shape = tuple(shape)
                return bool(gpu.min_batch <= shape[0] <= MAX_BATCH)

            def execute_async_v3(self, stream: int) -> bool:
                if not gpu.min_batch <= self.shape[0] <= MAX_BATCH:
                    return False
                if gpu.driver.stand_in_recording(stream) and not gpu.recordable:
                    gpu.driver.stand_in_break(stream)
                    return False
                gpu.kernels.append(KERNEL(self._kernel(self.shape, dict(self.addresses))))
                assert gpu.driver.stand_in_kernel(stream, gpu.kernels[-1]) == 0
                for layer in ("convolution", "reduction") if self.profiler else ():
                    self.profiler.report_layer_time(layer, 0.25 if layer == "reduction" else 1.5)
                return True

            def _kernel(self, shape: Any, addresses: Dict[str, int]) -> Any:
                session = self.session

                def at(address: int, size: int) -> np.ndarray:
                    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)

                def run() -> None:
                    image = at(addresses["image"], int(np.prod(shape))).reshape(shape)
                    names = [output.name for output in session.get_outputs()]
                    for name, value in zip(names, session.run(names, {"image": image})):
                        at(addresses[name], value.nbytes)[:] = np.frombuffer(value.tobytes(), np.uint8)

                return run

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

            def create_engine_inspector(self) -> Any:
                layers = [{"Name": "conv", "Outputs": [{"Format/Datatype": "Channel major INT8 format (kCHW32)"}]},
                          {"Name": "head", "Outputs": [{"Datatype": "Float", "Format": "Row major linear format"}]},
                          {"Name": "wait", "Outputs": []}, "a name alone"]
                return SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": layers}))

            def create_execution_context(self) -> Any:
                return Execution(self.session) if gpu.has_context else None

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                if not plan.startswith(b"\x08"):
                    self.logger.log(ILogger.ERROR, "magic tag does\n not match")
                    self.logger.log(ILogger.ERROR, "Assertion engine != nullptr failed.")  # and says nothing
                    return None
                return Engine(plan)

        class OnnxParser:
            num_errors = 0

            def __init__(self, network: Any, logger: Any) -> None:
                self.network = network

            def parse(self, model: bytes) -> bool:
                self.network.model = model
                return True

        class Builder:
            def __init__(self, logger: Any) -> None:
                pass

            def create_network(self, flags: int) -> Any:
                return SimpleNamespace(num_layers=0)

            def create_builder_config(self) -> Any:
                return MagicMock()

            def create_optimization_profile(self) -> Any:
                return MagicMock()

            def build_serialized_network(self, network: Any, config: Any) -> bytes:
                return bytes(network.model)

        trt = ModuleType("tensorrt")
        vars(trt).update(
            __version__=VERSION, ILogger=ILogger, IProfiler=IProfiler, Runtime=Runtime, OnnxParser=OnnxParser,
            Builder=Builder, BuilderFlag=SimpleNamespace(TF32=0), LayerInformationFormat=SimpleNamespace(JSON=1),
            NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
            ProfilingVerbosity=SimpleNamespace(DETAILED=2))
        return trt
