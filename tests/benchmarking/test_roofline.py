import json

import numpy as np
import pytest
from conftest import run_after, validate

from uadtool.benchmarking.roofline import graph_bytes, require_peak, roofline
from uadtool.errors import UadtoolError
from uadtool.runtimes.opening import open_model

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_bench_sets_models_against_the_peak(uadtool, fp32, int8, runtime):
    pytest.importorskip(runtime)
    done = uadtool("bench", fp32.path, int8.path, "--roofline", "--repetitions", 1, "--duration", 0.1, "--threads", 1,
                   "--batch-sizes", 1, "--runtime", runtime)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    validate(record, "bench")
    for model, kind in zip(record["models"], ("fp32", "int8")):
        found = model["roofline"]
        assert found["peak_of"] == kind
        assert found["macs"] == model["macs"]
        rate = 1000 * model["macs"] / model["latency_ms"]["p50"]
        assert found["macs_per_second"] == pytest.approx(rate, rel=0.01)
        assert found["share_of_peak"] == pytest.approx(rate / found["peak_macs_per_second"], rel=0.01)
        assert found["peak_macs_per_second"] > 1e8


def test_the_int8_peak_is_that_of_integers(detector, int8, fp32):
    """It is a multiple of the float peak on processors with int8 instructions, and never lower."""
    peaks = [roofline(open_model(str(model.path), 1, "onnxruntime"), 1.0)["peak_macs_per_second"]
             for model in (fp32, int8)]
    assert peaks[1] > 0.8 * peaks[0]


def test_bytes_of_a_graph(tmp_path):
    """A convolution with 3 x 3 x 3 x 4 weights on 8 x 8 pixels and a ReLU, in float and with int8 around it."""
    helper, types = onnx.helper, onnx.TensorProto
    weights = np.zeros((4, 3, 3, 3), np.float32)
    scale, zero = np.array(1, np.float32), np.array(0, np.int8)
    around = {name: [helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_codes"]),
                     helper.make_node("DequantizeLinear", [f"{name}_codes", "scale", "zero"], [f"{name}_rounded"])]
              for name in ("x", "y")}
    for quantized in (False, True):
        nodes = [helper.make_node("Conv", ["x_rounded" if quantized else "x", "w"], ["y"], pads=[1, 1, 1, 1]),
                 helper.make_node("Relu", ["y_rounded" if quantized else "y"], ["z"])]
        if quantized:
            nodes = [*around["x"], nodes[0], *around["y"], nodes[1]]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", types.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("z", types.FLOAT, ["N", 4, 8, 8])],
            [onnx.numpy_helper.from_array(value, name)
             for name, value in (("w", weights), ("scale", scale), ("zero", zero))])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
                  str(tmp_path / "g.onnx"))
        x, w, y = 3 * 64, weights.size, 4 * 64
        expected = x + 4 * w + y + y + 4 * y if quantized else 4 * (x + w + y + y + y)
        assert graph_bytes(str(tmp_path / "g.onnx")) == expected


def test_other_runtimes_are_refused(trained):
    with pytest.raises(UadtoolError, match="--roofline supports ONNX Runtime and OpenVINO, not torch"):
        require_peak(open_model(str(trained.path), 1, "torch"))


def test_without_onnx_the_install_line_is_given(detector):
    done = run_after("sys.modules['onnx'] = None", "bench", "-q", detector, "--roofline", "--repetitions", 1,
                     "--duration", 0.01)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "uadtool: error: onnx is not installed; pip install 'uadtool[roofline]'\n"
