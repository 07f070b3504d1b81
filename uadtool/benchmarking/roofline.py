"""The share of the peak rate of a machine that a detector reaches (Williams et al., "Roofline", CACM 52, 2009)."""

import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np

from uadtool.errors import UadtoolError, require
from uadtool.runtimes.contract import Runtime

SIZE = 1024
"""Rows, columns and depth of the matrix product that measures the peak rate."""
ROUNDS = 10
INTEGERS = ("int8", "mixed")
"""Precisions that are compared with the peak rate of integers."""


def require_peak(runtime: Runtime) -> None:
    """Require that ``roofline`` supports the runtime, before any long work.

    Raises:
        UadtoolError: it does not.
        MissingPackage: onnx is not installed.
    """
    if runtime.name not in ("onnxruntime", "openvino"):
        raise UadtoolError(f"--roofline supports ONNX Runtime and OpenVINO, not {runtime.name}; leave it out")
    require("onnx", "roofline")


def roofline(runtime: Runtime, seconds: float) -> Dict[str, Any]:
    """The ``roofline`` of a bench record: the work for one image, and the share of the peak rate that it reaches.

    Args:
        seconds: latency of one image.
    """
    integers = runtime.metadata.precision in INTEGERS
    rate, peak = runtime.metadata.macs / seconds, _peak(runtime, integers)
    moved = graph_bytes(runtime.path)
    return {"macs": runtime.metadata.macs, "bytes": moved, "macs_per_byte": round(runtime.metadata.macs / moved, 2),
            "macs_per_second": round(rate), "peak_macs_per_second": round(peak),
            "peak_of": "int8" if integers else "fp32", "share_of_peak": round(rate / peak, 4)}


def graph_bytes(path: str) -> int:
    """Bytes that the operators of an ONNX file read and write for one image.

    The sum includes activations that a runtime keeps in cache or fuses away. Quantized tensors count as integers.
    """
    onnx = require("onnx", "roofline")
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {tensor.name: _bytes(tensor.data_type, tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        sizes[value.name] = _bytes(kind.elem_type, [dim.dim_value or 1 for dim in kind.shape.dim])
    nodes = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            sizes[node.input[0]] = sizes.get(node.output[0], 0)
        elif node.op_type == "DequantizeLinear":
            sizes[node.output[0]] = sizes.get(node.input[0], 0)
    return sum(sizes.get(name, 0) for node in nodes for name in (*node.input, *node.output))


def _bytes(kind: int, dims: Any) -> int:
    onnx = require("onnx", "roofline")
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * np.prod(dims, dtype=np.int64))


def _peak(runtime: Runtime, integers: bool) -> float:
    """Multiply-accumulates per second of a matrix product in the same runtime, on the same number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "product.onnx"))
        _write_product(path, integers)
        run, times = _product(runtime, path, np.ones((SIZE, SIZE), np.uint8 if integers else np.float32)), []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return float(SIZE**3 / min(times))


def _product(runtime: Runtime, path: str, values: np.ndarray) -> Callable[[], Any]:
    if runtime.name == "onnxruntime":
        ort = require("onnxruntime", "onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = runtime.threads
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": values})
    from uadtool.runtimes.openvino import SETTINGS, import_openvino

    settings = {**SETTINGS, "INFERENCE_NUM_THREADS": runtime.threads}
    request = import_openvino().Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer({"x": values})


def _write_product(path: str, integers: bool) -> None:
    """Write a product of floats or, as in a quantized detector, of u8 and s8 with a u8 result."""
    onnx = require("onnx", "roofline")
    helper, types = onnx.helper, onnx.TensorProto
    weights = np.random.default_rng(0).integers(-127, 128, (SIZE, SIZE))
    constants = {"w": weights.astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if integers:
        constants = {"codes": weights.astype(np.int8), "scale": np.array(0.01, np.float32),
                     "zero": np.array(0, np.uint8), "signed_zero": np.array(0, np.int8)}
        nodes = [helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["values"]),
                 helper.make_node("DequantizeLinear", ["codes", "scale", "signed_zero"], ["w"]),
                 helper.make_node("MatMul", ["values", "w"], ["product"]),
                 helper.make_node("QuantizeLinear", ["product", "scale", "zero"], ["y"])]
    kind = types.UINT8 if integers else types.FLOAT
    graph = helper.make_graph(
        nodes, "product", *([helper.make_tensor_value_info(name, kind, [SIZE, SIZE])] for name in "xy"),
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
