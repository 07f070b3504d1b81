import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from flavours import operators, session
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import uadtool
from uadtool.cli.export import export as command
from uadtool.data.images import read_image
from uadtool.errors import UadtoolError
from uadtool.lab import export
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.models import load_model
from uadtool.lab.onnx_export.parity import check_parity, parity_images
from uadtool.lab.onnx_export.writer import _scale, lower_opset, save_onnx, to_onnx
from uadtool.lab.quantization.modules import QuantizedConv2d
from uadtool.metadata import KEY, Metadata, Reading
from uadtool.runtimes.opening import open_model

SIZE = (64, 64)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def proto(exported):
    return onnx.load(exported.path)


def test_the_file_is_valid_onnx_that_older_runtimes_read(proto):
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
    assert proto.ir_version == 8
    assert proto.producer_name == "uadtool"
    assert not proto.functions
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in proto.graph.initializer)


def test_inputs_and_outputs_honour_the_contract(proto):
    def signature(values):
        return [(value.name, value.type.tensor_type.elem_type,
                 [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]) for value in values]

    (image,), outputs = signature(proto.graph.input), signature(proto.graph.output)
    batch = image[2][0]
    assert isinstance(batch, str)
    assert image == ("image", TensorProto.UINT8, [batch, *SIZE, 3])
    assert outputs == [("score", TensorProto.FLOAT, [batch]), ("raw_score", TensorProto.FLOAT, [batch]),
                       ("anomaly_map", TensorProto.FLOAT, [batch, 16, 16]),
                       ("nearest_class", TensorProto.INT32, [batch]), ("class_distance", TensorProto.FLOAT, [batch])]


def test_metadata_travel_inside(exported, proto, trained, quantized):
    (entry,) = proto.metadata_props
    assert entry.key == KEY
    metadata = Metadata.from_json(entry.value, "model")
    source = load_model((trained if metadata.precision == "fp32" else quantized).path)[1]
    *earlier, step = metadata.provenance
    assert metadata.replace(provenance=earlier) == source
    assert (step["command"], step["model_digest"]) == ("export", exported.record["model_digest"])


def test_nothing_of_this_machine_is_inside(exported, proto, textures):
    data = exported.path.read_bytes()
    for trace in (str(Path.home()), sys.prefix, str(Path(uadtool.__file__).parent), str(textures), ".py"):
        assert trace.encode() not in data
    parts = (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output)
    assert not [part for part in parts if part.doc_string]
    assert not [part for part in parts[1:] if part.metadata_props]


def test_batches_change_nothing(exported, textures):
    images = parity_images(str(textures), Reading(SIZE))[:3]
    runtime = open_model(str(exported.path), 1)
    together = runtime.run(images)
    for index in range(3):
        alone = runtime.run(images[index:index + 1])
        np.testing.assert_allclose(alone.score[0], together.score[index], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-3, atol=1e-2)
        assert alone.nearest_class[0] == together.nearest_class[index]


def test_padding_belongs_to_the_convolutions(proto):
    count = operators(proto)
    assert count["Conv"] == 2 * 33
    assert "Pad" not in count
    pads = [list(attribute.ints) for node in proto.graph.node if node.op_type == "Conv"
            for attribute in node.attribute if attribute.name == "pads"]
    assert [0, 0, 1, 1] in pads  # TensorFlow's "same"


def test_weights_and_biases_of_the_quantized_graph_are_integers(int8):
    graph = onnx.load(int8.path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for conv in convolutions:
        values, weight, bias = (producers[name] for name in conv.input)
        assert {values.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert constants[weight.input[0]].data_type == TensorProto.INT8
        assert constants[bias.input[0]].data_type == TensorProto.INT32
        scales = [numpy_helper.to_array(constants[node.input[1]]) for node in (values, weight, bias)]
        np.testing.assert_allclose(scales[0] * scales[1], scales[2], rtol=1e-5)
        assert scales[1].shape == scales[2].shape == (constants[weight.input[0]].dims[0],)
    largest_float = max((np.prod(t.dims) for t in graph.initializer if t.data_type == TensorProto.FLOAT), default=0)
    assert largest_float <= 1280  # scales and prototypes, no weights


def changed(graph, change):
    """A model of opset 17 with the changed graph."""
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    change(model.graph)
    return onnx_ir.to_proto(model)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_resize_has_the_size_that_it_had(before, after):
    """However a runtime multiplies before it rounds down."""
    scale = _scale(before, after)
    assert int(np.float32(before) * scale) == int(before * float(scale)) == after
    assert float(scale) == pytest.approx(after / before, rel=3e-7)


class Batched(torch.nn.Module):
    """A detector whose shapes depend on the number of images in every way that an exporter writes."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.arange(6.0).view(1, 2, 3))

    def forward(self, image):
        count, height, width, _ = image.shape
        pixels = image.float()
        tokens = torch.cat([self.token.expand(count, -1, -1), torch.ones(count, 1, 3), pixels.flatten(1, 2)], dim=1)
        # As attention does: images and heads are one dimension.
        heads = tokens.unsqueeze(2).expand(-1, -1, 4, -1).permute(0, 2, 1, 3).reshape(count * 4, -1, 3)
        level = torch.bmm(heads, heads.mean(1, keepdim=True).transpose(1, 2)).view(count, 4, -1).mean((1, 2))
        anomaly_map = pixels.mean(3) + level.view(-1, 1, 1)
        return level, level * 2, anomaly_map.expand(count, height, width), level.int() % 2, level.sqrt()


class Interleaved(torch.nn.Module):
    """Its rows hold pixels of all images."""

    def forward(self, image):
        pixels = image.float()
        level = pixels.mean((1, 2, 3)) + pixels.permute(1, 0, 2, 3).reshape(SIZE[0], -1).amax(1).mean()
        return level, level * 2, pixels.mean(3), level.int() % 2, level * 3


def test_a_model_that_mixes_the_images_is_refused():
    metadata = Metadata("stfpm", "none", ["a", "b"], SIZE, SIZE, 3.0, 0.01, 1, 1)
    with pytest.raises(UadtoolError, match=r"cannot compute 16 images in onnxruntime; .* first dimension, or a factor "
                                           r"of it; nothing was written: "):
        check_parity(Interleaved(), to_onnx(Interleaved(), metadata), metadata, parity_images(None, Reading(SIZE)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_images(count):
    proto = to_onnx(Batched(), Metadata("stfpm", "none", ["a", "b"], SIZE, SIZE, 3.0, 0.01, 1, 1))
    images = np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    expected = Batched()(torch.from_numpy(images))
    for found, tensor in zip(session(proto.SerializeToString()).run(None, {"image": images}), expected):
        np.testing.assert_allclose(found, tensor.detach(), rtol=1e-4)
    assert [dim.dim_param for value in (*proto.graph.input, *proto.graph.output)
            for dim in value.type.tensor_type.shape.dim[:1]] == ["batch"] * 6
    onnx.checker.check_model(proto, full_check=True)


def test_resizes_depend_on_no_shape(proto):
    """Nor do those of other sizes than these, see above."""
    assert operators(proto)["Shape"] == 0
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    resizes = [node for node in proto.graph.node if node.op_type == "Resize"]
    assert [constants[node.input[2]].tolist() for node in resizes[:2]] == [[1, 1, 2, 2], [1, 1, 4, 4]]


def test_an_operator_that_opset_17_lacks_is_not_written(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("BitwiseNot", ["x"], ["y"])], "new in 18",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [4])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    model = onnx_ir.from_proto(proto)
    lower_opset(model)
    with pytest.raises(UadtoolError, match="the exported graph is not valid ONNX: No Op registered for BitwiseNot"):
        save_onnx(onnx_ir.to_proto(model), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Splitting(torch.nn.Module):
    """A detector that splits channels, as some teachers do."""

    def forward(self, image):
        red, green, blue = image.float().permute(0, 3, 1, 2).chunk(3, 1)
        anomaly_map = (red - green).square()[:, 0]
        score, distance = anomaly_map.amax((1, 2)), blue.mean((1, 2, 3))
        return score, 2 * score, anomaly_map, (distance > 300).int(), distance


def test_split_channels_are_exported_in_silence(capfd):
    """Opset 18 gives Split the number of parts, 17 does not have that."""
    metadata = Metadata("stfpm", "none", ["a"], SIZE, SIZE, 3.0, 0.01, 1, 1)
    proto = to_onnx(Splitting(), metadata)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("uadtool").isEnabledFor(logging.WARNING)
    onnx.checker.check_model(proto, full_check=True)
    assert operators(proto)["Split"] > 0
    assert check_parity(Splitting(), proto, metadata, parity_images(None, Reading(SIZE)))["score_difference"] < 1e-3


@pytest.mark.slow
def test_a_teacher_that_splits_channels_is_exported():
    torch.manual_seed(0)
    detector = STFPM("skresnet18", SIZE, 1).fold_batch_norm()
    metadata = Metadata("stfpm", "skresnet18", ["a"], SIZE, (16, 16), 3.0, 0.01, 1, 1)
    proto = to_onnx(detector, metadata)
    onnx.checker.check_model(proto, full_check=True)
    assert operators(proto)["Split"] > 0
    assert check_parity(detector, proto, metadata, parity_images(None, Reading(SIZE)))["score_difference"] < 1e-3


def test_exports_report_their_parity(fp32, int8, textures):
    assert fp32.record["parity"]["source"] == str(textures)
    assert fp32.record["parity"]["score_difference"] < 1e-3
    assert int8.record["parity"]["source"] == "synthetic"


# What must not be exported


def spoilt(proto, kind):
    """A graph that gives other scores or other classes."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    if kind == "classes":
        (node,) = (node for node in proto.graph.node if node.op_type.startswith("Arg"))
        node.op_type = {"ArgMax": "ArgMin", "ArgMin": "ArgMax"}[node.op_type]
        return proto
    conv = [node for node in proto.graph.node if node.op_type == "Conv"][-1]
    weight = constants[conv.input[1]]
    values = numpy_helper.to_array(weight).copy()
    values[0] = np.nan if kind == "nan" else values[0] + 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return proto


@pytest.mark.parametrize(("kind", "message"), [
    ("weights", r"is not the model: a score in onnxruntime .* is off by .*, more than 0.01; nothing was written"),
    ("nan", r"is not the model: a score in onnxruntime .* is off by nan"),
    ("classes", r"is not the model: onnxruntime .* finds another nearest class for 16 of 16 images"),
])
def test_a_graph_that_is_not_the_model_is_not_written(trained, fp32, tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(export, "to_onnx", lambda *_: spoilt(onnx.load(fp32.path), kind))
    with pytest.raises(UadtoolError, match=message):
        command.main([str(trained.path), "-o", str(tmp_path / "model.onnx")], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_graph_is_not_written(fp32, tmp_path):
    proto = onnx.load(fp32.path)
    proto.graph.node[0].input[0] = "missing"
    with pytest.raises(UadtoolError, match="the exported graph is not valid ONNX") as error:
        save_onnx(proto, tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("differing", "accepted"), [(4, True), (5, False)])
def test_few_images_may_lie_between_two_classes(int8, quantized, textures, differing, accepted):
    model, metadata = load_model(quantized.path)

    class Undecided(torch.nn.Module):
        """Finds the other class, and a score in units of it, for the first images."""

        def forward(self, images):
            score, raw_score, anomaly_map, nearest, distance = model(images)
            first = torch.arange(len(images)) < differing
            return (torch.where(first, score + 100, score), raw_score, anomaly_map,
                    torch.where(first, 1 - nearest, nearest), torch.where(first, distance + 100, distance))

    images = parity_images(str(textures), Reading(SIZE))
    if accepted:
        assert check_parity(Undecided(), onnx.load(int8.path), metadata, images)["score_difference"] <= 0.25
    else:
        with pytest.raises(UadtoolError, match="finds another nearest class for 5 of 16 images"):
            check_parity(Undecided(), onnx.load(int8.path), metadata, images)


@pytest.mark.parametrize("spoil", [
    lambda model: model.expected_maps.zero_(),
    lambda model: model.distance_std.mul_(2),
    lambda model: [module.bias.zero_() for name, module in model.named_modules()
                   if name.startswith("student") and isinstance(module, QuantizedConv2d)],
])
def test_the_default_images_show_differences(int8, quantized, spoil):
    model, metadata = load_model(quantized.path)
    images = parity_images(None, Reading(SIZE))
    assert check_parity(model, onnx.load(int8.path), metadata, images)["score_difference"] <= 0.25
    with torch.no_grad():
        spoil(model)
    with pytest.raises(UadtoolError, match=r"is off by .*, more than 0\.5; nothing was written"):
        check_parity(model, onnx.load(int8.path), metadata, images)


# Images for the check


def test_synthetic_images_are_the_same_every_time():
    images = parity_images(None, Reading((64, 96)))
    assert (images.shape, images.dtype) == ((16, 64, 96, 3), np.uint8)
    assert np.array_equal(images, parity_images(None, Reading((64, 96))))
    assert len({image.tobytes() for image in images}) == 16


def test_images_of_all_classes_take_turns(textures):
    images = parity_images(str(textures), Reading(SIZE))
    of_class = {image.tobytes(): name for name in ("dots", "stripes")
                for image in (read_image(str(path), SIZE) for path in (textures / name / "test").rglob("*.png"))}
    assert Counter(of_class[image.tobytes()] for image in images) == {"dots": 8, "stripes": 8}


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UadtoolError, match="no images to score in"):
        parity_images(str(tmp_path), Reading(SIZE))
