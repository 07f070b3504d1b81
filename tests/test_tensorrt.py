"""TensorRT's own parser and builder on what is exported for it; TensorRT-RTX builds ahead of time, without a GPU."""

import onnx
import pytest
from flavours import DETECTORS, TENSORRT, flavour

from uadtool.errors import UadtoolError
from uadtool.onnx_export import save_onnx
from uadtool.tensorrt.builder import BuildOptions, build_engine

trt = pytest.importorskip("tensorrt_rtx")

SM86 = "8.6"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of a flavour."""
    folder = tmp_path_factory.mktemp("onnx")

    def exported(detector, target, precision, batch=None):
        path = folder / f"{detector}-{target}-{precision}-{batch}.onnx"
        if not path.exists():
            proto = onnx.ModelProto()
            proto.CopyFrom(flavour(detector, target, precision).proto)
            for value in (*proto.graph.input, *proto.graph.output) if batch else ():
                value.type.tensor_type.shape.dim[0].dim_value = batch
            save_onnx(proto, path)
        return str(path)

    return exported


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("precision", TENSORRT)
@pytest.mark.parametrize("detector", DETECTORS)
def test_tensorrt_builds_an_engine(exported, detector, precision, batch):
    engine = build_engine(exported(detector, "tensorrt", precision, batch),
                          flavour(detector, "tensorrt", precision).metadata,
                          BuildOptions(compute_capability=SM86, max_batch=batch or 8))
    assert len(engine.plan) > 100_000
    assert engine.build["precision"] == ("int8" if precision == "mixed" else precision)


@pytest.mark.parametrize("precision", TENSORRT)
def test_tensorrt_sees_the_inputs_and_outputs_of_a_detector(exported, precision):
    log = trt.Logger()
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(exported("resnet18", "tensorrt", precision))
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    assert {name: tensor.dtype for name, tensor in outputs.items()} == {
        "score": trt.float32, "raw_score": trt.float32, "anomaly_map": trt.float32, "nearest_class": trt.int32}
    assert network.get_input(0).dtype == trt.uint8
    assert network.get_input(0).shape[0] == -1


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.6), ("int8", 0.45)])
def test_engines_shrink_with_the_precision(exported, precision, share):
    sizes = [len(build_engine(exported("resnet18", "tensorrt", one), flavour("resnet18", "tensorrt", one).metadata,
                              BuildOptions(compute_capability=SM86)).plan) for one in ("fp32", precision)]
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_tensorrt_refuses_other_flavours(exported, target):
    metadata = flavour("resnet18", target, "int8").metadata.replace(target="tensorrt")  # so that it comes to the parser
    with pytest.raises(UadtoolError, match=r"does not take .*: \w+ .*: .*Non-zero zero point is not supported"):
        build_engine(exported("resnet18", target, "int8"), metadata, BuildOptions(compute_capability=SM86))
