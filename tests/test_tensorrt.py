"""TensorRT's own parser and builder on what is exported for it; TensorRT-RTX builds ahead of time, without a GPU."""

import onnx
import pytest
from flavours import DETECTORS, TENSORRT, flavour

trt = pytest.importorskip("tensorrt_rtx")

MAXIMUM_BATCH = 8


class Log(trt.ILogger):
    """Keeps errors, prints nothing."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


@pytest.fixture(scope="module")
def log():
    return Log()


@pytest.fixture(scope="module")
def builder(log):
    return trt.Builder(log)


def parse(builder, log, proto):
    """The network, or None; and what the parser says of it."""
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(proto.SerializeToString())
    return network if parsed else None, [parser.get_error(index).desc() for index in range(parser.num_errors)]


def build(builder, network):
    """A serialized engine for a GPU of compute capability 8.6."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    batch, *size = network.get_input(0).shape
    if batch < 0:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, *size), (1, *size), (MAXIMUM_BATCH, *size))
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def with_batch_size(proto, size):
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    return fixed


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("precision", TENSORRT)
@pytest.mark.parametrize("teacher", DETECTORS)
def test_tensorrt_builds_an_engine(builder, log, teacher, precision, batch):
    proto = flavour(teacher, "tensorrt", precision).proto
    network, errors = parse(builder, log, with_batch_size(proto, batch) if batch else proto)
    assert errors == []
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    assert {name: tensor.dtype for name, tensor in outputs.items()} == {
        "score": trt.float32, "raw_score": trt.float32, "anomaly_map": trt.float32, "nearest_class": trt.int32}
    assert network.get_input(0).dtype == trt.uint8
    assert network.get_input(0).shape[0] == (batch or -1)
    engine = build(builder, network)
    assert engine is not None, log.errors
    assert engine.nbytes > 100_000


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.6), ("int8", 0.45)])
def test_engines_shrink_with_the_precision(builder, log, precision, share):
    sizes = [build(builder, parse(builder, log, flavour("resnet18", "tensorrt", one).proto)[0]).nbytes
             for one in ("fp32", precision)]
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_tensorrt_refuses_other_flavours(builder, log, target):
    network, errors = parse(builder, log, flavour("resnet18", target, "int8").proto)
    assert network is None
    assert any("Non-zero zero point is not supported" in error for error in errors)
