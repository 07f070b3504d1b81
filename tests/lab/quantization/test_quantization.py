import copy
import json
import operator
import shutil
from fnmatch import fnmatchcase

import click
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import validate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from torch import fx, nn

from uadtool.cli.calibrate import calibrate as calibrate_command
from uadtool.cli.quantize import quantize as command
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.lab.detectors.backbones import LayerNorm
from uadtool.lab.detectors.contract import STATISTICS
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.models import load_float_model, load_model
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d, QuantizedLinear, quantized_layer
from uadtool.lab.quantization.observers import MinMax
from uadtool.lab.quantization.ptq import half, layers_outside, matching_layers, quantize
from uadtool.lab.quantization.ranges import RangesFile
from uadtool.lab.quantization.sensitivity import layer_sensitivity, map_distance
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantize import Recipe, apply_recipe

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
NAMES = ["tf_efficientnet_lite0", "resnet18"]


class Point(nn.Identity):
    """What stands at a point, in place of a quantizer or an observer."""


@pytest.fixture(scope="module", params=NAMES)
def detector(request):
    torch.manual_seed(0)
    detector = STFPM(request.param, (64, 64), 2)
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d):  # else all biases are 0
            norm.running_mean.uniform_(-0.5, 0.5)
    return detector.fold_batch_norm()


@pytest.fixture(scope="module")
def marked(detector):
    return QuantizableGraph(detector).observed(lambda name: Point())


def images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def module(graph_module, node):
    return graph_module.get_submodule(node.target) if node.op == "call_module" else None


def nodes(graph_module, kind):
    return [node for node in graph_module.graph.nodes if isinstance(module(graph_module, node), kind)]


# Where


def test_every_convolution_reads_and_gives_quantized_values(marked, detector):
    convolutions = nodes(marked, nn.Conv2d)
    assert len(convolutions) == len([m for m in detector.modules() if isinstance(m, nn.Conv2d)])
    for conv in convolutions:
        source = conv.args[0]
        if isinstance(module(marked, source), nn.MaxPool2d):  # of quantized values
            source = source.args[0]
        assert isinstance(module(marked, source), Point)
        result = conv
        (reader,) = result.users
        if isinstance(module(marked, reader), ACTIVATIONS):
            result = reader
        assert [type(module(marked, reader)) for reader in result.users] == [Point]


def test_no_quantizer_stands_before_an_activation(marked):
    activations = nodes(marked, ACTIVATIONS)
    assert activations
    for activation in activations:
        assert not isinstance(module(marked, activation.args[0]), Point)
        assert [type(module(marked, reader)) for reader in activation.users] == [Point]


def test_residual_additions_are_integer(marked):
    modules = dict(marked.named_modules())
    additions = [node for node in marked.graph.nodes if node.target is operator.add
                 and any(isinstance(modules.get(str(n.target)), Point) for n in node.all_input_nodes)]
    assert len(additions) >= 10
    for addition in additions:
        assert [type(module(marked, node)) for node in addition.all_input_nodes] == [Point, Point]
        (reader,) = addition.users
        if isinstance(module(marked, reader), ACTIVATIONS):
            (reader,) = reader.users
        assert isinstance(module(marked, reader), Point)


def test_max_pooling_shares_the_range_of_its_input():
    marked = QuantizableGraph(STFPM("resnet18", (64, 64), 1).fold_batch_norm()).observed(lambda name: Point())
    pools = nodes(marked, nn.MaxPool2d)
    assert len(pools) == 2
    for pool in pools:
        assert {reader.target for reader in pool.users} == {pool.args[0].target}


def test_points_change_nothing_and_have_the_same_names_every_time(detector, marked):
    again = QuantizableGraph(detector).observed(lambda name: Point())
    assert list(marked.points) == list(again.points)
    assert len(set(marked.points)) == len(marked.points)
    with torch.inference_mode():
        for one, other in zip(detector(images(2)), marked(images(2))):
            assert torch.equal(one, other)


# Ranges


@given(st.lists(stn.arrays(np.float32, stn.array_shapes(max_dims=3, max_side=4),
                           elements=st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=5))
def test_minmax_is_that_of_all_batches(batches):
    observer = MinMax()
    for batch in batches:
        values = torch.from_numpy(batch)
        assert observer(values) is values
    together = np.concatenate([batch.ravel() for batch in batches])
    assert observer.range() == (together.min(), together.max())


class Recorder(fx.Interpreter):
    """The smallest and the largest value at every point, by its name."""

    def __init__(self, graph_module):
        super().__init__(graph_module)
        self.seen = {}

    def call_module(self, target, args, kwargs):
        result = super().call_module(target, args, kwargs)
        if target.startswith("points."):
            self.seen.setdefault(target.removeprefix("points."), []).extend(
                (result.min().item(), result.max().item()))
        return result


def test_calibration_sees_every_batch(detector, marked):
    batches = [images(3, seed) for seed in range(3)]
    ranges = calibrate(detector, batches, "minmax")
    recorder = Recorder(marked)
    with torch.inference_mode():
        for batch in batches:
            recorder.run(batch)
    assert ranges == {name: (min(values), max(values)) for name, values in recorder.seen.items()}
    assert list(ranges) == list(marked.points)
    one_by_one = calibrate(detector, torch.cat(batches).split(1), "minmax")
    np.testing.assert_allclose(list(one_by_one.values()), list(ranges.values()), rtol=1e-4, atol=1e-4)


def test_calibration_needs_an_image(detector):
    with pytest.raises(UadtoolError, match="no image to calibrate on"):
        calibrate(detector, [])


# Activations

BOUNDS = st.floats(-1e3, 1e3, width=32)


@pytest.fixture(scope="module")
def reference():
    """QuantizeLinear and DequantizeLinear in ONNX Runtime: values, scale, zero point -> values."""
    types, info, node = onnx.TensorProto, onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [node("QuantizeLinear", ["values", "scale", "zero_point"], ["codes"]),
         node("DequantizeLinear", ["codes", "scale", "zero_point"], ["result"])], "reference",
        [info("values", types.FLOAT, ["N"]), info("scale", types.FLOAT, []), info("zero_point", types.UINT8, [])],
        [info("result", types.FLOAT, ["N"])])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda quantizer, values: session.run(None, {
        "values": values, "scale": quantizer.scale.numpy(), "zero_point": quantizer.zero_point.numpy()})[0]


@given(bounds=st.tuples(BOUNDS, BOUNDS).map(sorted), shares=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=20))
def test_activations_are_rounded_as_onnx_rounds_them(reference, bounds, shares):
    low, high = min(bounds[0], 0), max(bounds[1], 0)
    quantizer = ActivationQuantizer.from_range(*bounds)
    values = np.array([low + share * (high - low) for share in shares], np.float32)
    scale = quantizer.scale.item()
    ties = np.abs(np.mod(values.astype(np.float64) / scale, 1) - 0.5) < 1e-3  # either neighbour will do
    found = quantizer(torch.from_numpy(values)).numpy()
    expected = reference(quantizer, values)
    np.testing.assert_allclose(found[~ties], expected[~ties], rtol=1e-6)
    np.testing.assert_allclose(found[ties], expected[ties], atol=scale * 1.001)


@given(st.tuples(BOUNDS, BOUNDS).map(sorted), st.floats(0, 1))
def test_the_codes_span_the_range_and_hold_zero(bounds, share):
    quantizer = ActivationQuantizer.from_range(*bounds)
    low, high = min(bounds[0], 0), max(bounds[1], 0)
    scale = quantizer.scale.item()
    inside = low + share * (high - low)
    values = quantizer(torch.tensor([0.0, low, high, inside, -1e9, 1e9]))
    assert values[0] == 0  # padding stays exact
    tolerance = scale * (1 + 1e-4)  # half a code, and half a one that the zero point moved
    np.testing.assert_allclose(values[1:4], [low, high, inside], atol=tolerance)
    assert values[5] - values[4] == pytest.approx(255 * scale, rel=1e-5)
    if low == 0:
        assert quantizer.zero_point == 0  # the lowest code, so that a ReLU can be absorbed


# Weights


@given(weights=stn.arrays(np.float32, (4, 2, 3, 3), elements=st.floats(-100, 100, width=32)))
def test_weights_are_rounded_per_channel(weights):
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.data = torch.from_numpy(weights)
    quantized = QuantizedConv2d(conv)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.abs().max() <= 127
    scale = np.maximum(np.abs(weights).max((1, 2, 3)), 1e-8) / 127
    np.testing.assert_allclose(quantized.weight_scale, scale, rtol=1e-6)
    unit = quantized.weight_scale.double().view(-1, 1, 1, 1)
    assert ((quantized.weight * unit - torch.from_numpy(weights)).abs() <= unit / 2 * (1 + 1e-4)).all()


@given(stn.arrays(np.float32, 4, elements=st.floats(-10, 10, width=32)), st.floats(2 ** -10, 1, width=32))
def test_biases_are_whole_numbers_of_their_unit(biases, input_scale):
    conv = nn.Conv2d(2, 4, 3)
    conv.bias.data = torch.from_numpy(biases)
    quantized = QuantizedConv2d(conv)
    quantized.round_bias(torch.tensor(input_scale))
    unit = quantized.weight_scale.double().numpy() * input_scale
    codes = quantized.bias.double().numpy() / unit
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3 + 1e-6 * np.abs(codes).max())
    np.testing.assert_allclose(quantized.bias, biases, atol=unit.max() / 2 * 1.001, rtol=1e-6)


def test_a_channel_without_weights_keeps_its_bias():
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.data[1] *= 1e-12
    conv.weight.data[2] *= 1e-4
    conv.bias.data = torch.tensor([0.5, -5.0, 3.0, 0.25])
    quantized, before = QuantizedConv2d(conv), QuantizedConv2d(conv)
    quantized.round_bias(torch.tensor(1e-3))
    torch.testing.assert_close(quantized.bias, conv.bias.data, rtol=1e-6, atol=1e-4)
    codes = quantized.bias.double() / (1e-3 * quantized.weight_scale.double())
    assert (codes.abs() <= 2 ** 30 + 1000).all()
    others = [0, 3]
    assert torch.equal(quantized.weight[others], before.weight[others])
    assert torch.equal(quantized.weight_scale[others], before.weight_scale[others])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_padding_that_integer_kernels_do_not_know_is_refused(options):
    with pytest.raises(UadtoolError, match="pad by numbers, with zeros"):
        quantized_layer(nn.Conv2d(4, 8, 3, **options))


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4, bias=False),
    nn.Conv2d(4, 8, 3, dilation=2), nn.Linear(12, 7), nn.Linear(12, 5, bias=False),
])
def test_a_quantized_layer_computes_what_the_float_one_does(layer):
    torch.manual_seed(0)
    values = torch.randn(2, 4, 16, 12)
    with torch.inference_mode():
        expected, found = layer(values), quantized_layer(layer)(values)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


# Models


def test_all_convolutions_are_quantized_and_scores_stay_close(detector):
    quantized = quantize(detector, calibrate(detector, [images(8)]))
    assert not [m for m in quantized.modules() if isinstance(m, nn.Conv2d)]
    assert len(nodes(quantized, QuantizedConv2d)) == len([m for m in detector.modules() if isinstance(m, nn.Conv2d)])
    with torch.inference_mode():
        one, other = detector(images(4, seed=1)), quantized(images(4, seed=1))
    assert (one.score - other.score).abs().max() < 0.1 * one.score.abs().max()
    assert not torch.equal(one.score, other.score)


def test_all_biases_are_whole_numbers_of_their_unit(detector):
    quantized = quantize(detector, calibrate(detector, [images(2)]))
    for node in nodes(quantized, QuantizedConv2d):
        conv, point = module(quantized, node), module(quantized, node.args[0])
        codes = conv.bias.double() / (point.scale.double() * conv.weight_scale.double())
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)


def test_quantizing_leaves_the_float_detector_alone(detector):
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    quantize(detector, calibrate(detector, [images(2)]))
    after = detector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_point_without_a_range_is_refused(detector):
    ranges = calibrate(detector, [images(1)])
    name, _ = ranges.popitem()
    with pytest.raises(UadtoolError, match=f"the ranges lack '{name}': they were made from another model"):
        quantize(detector, ranges)
    with pytest.raises(UadtoolError, match="the ranges have 'another': they were made from another model"):
        quantize(detector, {**ranges, name: (0, 1), "another": (0, 1)})


# Targets, scope, layers that stay float


def quantizers(model, node):
    """Whether each input of the node comes from a quantizer."""
    return [isinstance(module(model, source), ActivationQuantizer) for source in node.all_input_nodes]


@pytest.fixture(scope="module")
def ranges(detector):
    return calibrate(detector, [images(8)])


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_only_what_integer_kernels_read_is_quantized(detector, ranges, target):
    model = quantize(detector, ranges, TARGETS[target])
    modules = dict(model.named_modules())
    for node in nodes(model, QuantizedConv2d):
        assert quantizers(model, node) == [True]
    additions = [node for node in model.graph.nodes if node.target is operator.add and any(quantizers(model, node))]
    assert len(additions) >= 10
    for addition in additions:  # nothing stands between the last convolution and its addition
        (fused,) = [node for node, quantized in zip(addition.all_input_nodes, quantizers(model, addition))
                    if not quantized]
        assert isinstance(module(model, fused), QuantizedConv2d)
    for node in nodes(model, ActivationQuantizer):
        for reader in node.users:
            assert isinstance(modules.get(str(reader.target)), QuantizedConv2d) or reader in additions


def test_tensorrt_has_symmetric_activations(detector, ranges):
    for quantizer in quantize(detector, ranges, TARGETS["tensorrt"]).points.values():
        assert (quantizer.zero_point.dtype, quantizer.zero_point.item()) == (torch.int8, 0)


@given(st.tuples(BOUNDS, BOUNDS).map(sorted))
def test_a_symmetric_range_reaches_as_far_as_the_longer_side(bounds):
    quantizer = ActivationQuantizer.from_range(*bounds, signed=True)
    longer = max(-bounds[0], bounds[1], 0)
    values = quantizer(torch.tensor([0.0, longer, -longer, bounds[0], bounds[1]]))
    np.testing.assert_allclose(values, [0, longer, -longer, *np.minimum(bounds, longer).clip(-longer)],
                               atol=quantizer.scale.item() * 0.51)


def test_scope_student_leaves_the_teacher_alone(detector, ranges):
    kept = layers_outside(detector, "student")
    assert kept == [name for name in QuantizableGraph(detector).layers if name.startswith("teacher.")]
    assert layers_outside(detector, "all") == []
    for target in TARGETS.values():
        if target.half:  # the teacher computes in fp16 there
            continue
        model = quantize(detector, ranges, target, kept)
        teacher, student = ([node for node in model.graph.nodes if str(node.target).startswith(f"{name}.")
                             and isinstance(module(model, node), (nn.Conv2d, QuantizedConv2d))]
                            for name in ("teacher", "student"))
        assert {type(module(model, node)) for node in student} == {QuantizedConv2d}
        assert not any(isinstance(module(model, node), QuantizedConv2d) for node in teacher)
        assert not any(any(quantizers(model, node)) for node in teacher)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_layer_that_stays_float_reads_float(detector, ranges, target):
    layer = QuantizableGraph(detector).layers[3]
    model = quantize(detector, ranges, TARGETS[target], [layer])
    (node,) = nodes(model, nn.Conv2d)
    assert node.target == layer
    if target == "openvino":
        assert quantizers(model, node) == [False]


def test_what_stays_float_for_tensorrt_is_half(detector, ranges):
    layer = QuantizableGraph(detector).layers[3]
    model = quantize(detector, ranges, TARGETS["tensorrt"], [layer])
    (node,) = nodes(model, nn.Conv2d)
    assert module(model, node).weight.dtype == torch.float16
    assert detector.get_submodule(layer).weight.dtype == torch.float32
    with torch.inference_mode():
        output = model(images(2))
    assert output.score.dtype == torch.float32
    assert output.score.isfinite().all()


def test_half_networks_score_as_float_ones(detector):
    model = half(detector)
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.Conv2d)} == {torch.float16}
    with torch.inference_mode():
        one, other = detector(images(4)), model(images(4))
    torch.testing.assert_close(other.score, one.score, rtol=0.02, atol=0.02)
    assert not torch.equal(one.score, other.score)


def test_layers_by_pattern(detector):
    layers = QuantizableGraph(detector).layers
    assert matching_layers(detector, ["student.*"]) == [name for name in layers if name.startswith("student.")]
    assert matching_layers(detector, [layers[2], layers[0]]) == [layers[0], layers[2]]
    assert matching_layers(detector, []) == []
    with pytest.raises(UadtoolError, match=r"no layer is named 'blocks\.9'; the model has"):
        matching_layers(detector, ["student.*", "blocks.9"])


class Shortcut(nn.Module):
    """Adds after an activation, as DarkNet and the first stage of EfficientNetV2; nothing of a detector."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, pixels):
        values = torch.relu(self.first(pixels))
        return self.last(values + torch.relu(self.second(values)))


@pytest.mark.parametrize(("target", "expected"), [("onnxruntime", [True, True]), ("tensorrt", [False, False])])
def test_an_addition_that_no_convolution_computes_is_float_for_tensorrt(target, expected):
    torch.manual_seed(0)
    network, pixels = Shortcut().eval(), torch.rand(4, 3, 8, 8)
    model = quantize(network, calibrate(network, [pixels], "minmax"), TARGETS[target])
    (addition,) = (node for node in model.graph.nodes if node.target is operator.add)
    sources = [source if source.target not in ("float", "half") else source.all_input_nodes[0]
               for source in addition.all_input_nodes]
    assert [isinstance(module(model, source), ActivationQuantizer) for source in sources] == expected
    assert [quantizers(model, node) for node in nodes(model, QuantizedConv2d)] == [[True]] * 3
    with torch.inference_mode():
        assert (model(pixels) - network(pixels)).abs().max() < 0.05 * network(pixels).abs().max()


# Linear layers


class Perceptron(nn.Module):
    """Linear layers on tokens [N, L, C], a residual sum and a layer norm between them; nothing of a detector."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        self.activation, self.norm = nn.GELU(), LayerNorm(8)

    def forward(self, tokens):
        return self.last(self.norm(tokens + self.second(self.activation(self.first(tokens)))))


@pytest.fixture(scope="module")
def perceptron():
    torch.manual_seed(0)
    return Perceptron().eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(16, 9, 8, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("target", TARGETS)
def test_linear_layers_read_quantized_values_and_write_float_ones(perceptron, tokens, target):
    model = quantize(perceptron, calibrate(perceptron, [tokens], "minmax"), TARGETS[target])
    layers = nodes(model, QuantizedLinear)
    assert [node.target for node in layers] == ["first", "second", "last"]
    assert all(quantizers(model, node) == [True] for node in layers)
    assert [reader.target for point in nodes(model, ActivationQuantizer) for reader in point.users] == [
        node.target for node in layers]
    with torch.inference_mode():
        expected, found = perceptron(tokens), model(tokens)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_linear_layers_that_stay_float_read_float_values(perceptron, tokens):
    ranges = calibrate(perceptron, [tokens], "minmax")
    model = quantize(perceptron, ranges, TARGETS["onnxruntime"], ["second"])
    (node,) = nodes(model, nn.Linear)
    assert (node.target, quantizers(model, node)) == ("second", [False])
    model = quantize(perceptron, ranges, TARGETS["tensorrt"], ["second"])
    assert model.get_submodule("second").weight.dtype == torch.float16
    assert model.get_submodule("norm").weight.dtype == torch.float32


def test_bias_correction_keeps_the_mean_of_every_channel_of_a_linear_layer(perceptron, tokens):
    ranges = calibrate(perceptron, [tokens], "minmax")
    with torch.inference_mode():
        expected, *found = (model(tokens).mean((0, 1)) for model in (
            perceptron, quantize(perceptron, ranges), quantize(perceptron, ranges, images=tokens)))
    plain, corrected = ((means - expected).abs().sum() for means in found)
    assert corrected < 0.05 * plain


# Bias correction, sensitivity


def test_bias_correction_keeps_the_mean_of_every_channel(detector, ranges):
    pixels = images(8)
    plain, corrected = quantize(detector, ranges, TARGETS["openvino"]), quantize(detector, ranges, TARGETS["openvino"],
                                                                                  images=pixels)

    def means(model):
        found = {}

        class Means(fx.Interpreter):
            def call_module(self, target, args, kwargs):
                result = super().call_module(target, args, kwargs)
                if isinstance(self.module.get_submodule(target), (nn.Conv2d, QuantizedConv2d)):
                    found[target] = result.mean((0, 2, 3))
                return result

        with torch.inference_mode():
            Means(model).run(pixels)
        return found

    expected, before, after = means(QuantizableGraph(detector).module), means(plain), means(corrected)
    assert expected.keys() == before.keys() == after.keys()
    off = [sum((found[name] - mean).abs().sum() for name, mean in expected.items()) for found in (before, after)]
    assert off[0] > 0.1
    assert off[1] < 0.05 * off[0]  # sums that lie between two codes may be rounded either way


def test_corrected_biases_are_whole_numbers_of_their_unit(detector, ranges):
    quantized = quantize(detector, ranges, images=images(4))
    for node in nodes(quantized, QuantizedConv2d):
        conv, point = module(quantized, node), module(quantized, node.args[0])
        codes = conv.bias.double() / (point.scale.double() * conv.weight_scale.double())
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)


def test_sensitivity_finds_the_layer_that_is_bad_at_int8(detector, ranges):
    layers = QuantizableGraph(detector).layers
    chosen = [layers[0], layers[-1]]
    pixels = [images(4)]
    before = dict(layer_sensitivity(detector, ranges, TARGETS["openvino"], pixels, chosen))
    assert list(before) == chosen
    narrow = copy.deepcopy(detector)
    with torch.no_grad():  # one large weight per channel leaves few codes to the others; the input there is 0
        conv = narrow.get_submodule(layers[0])
        conv.weight.view(len(conv.weight), -1)[:, 0] = 20 * conv.weight.abs().max()
    after = dict(layer_sensitivity(narrow, calibrate(narrow, pixels), TARGETS["openvino"], pixels, chosen))
    assert after[layers[0]] > 2 * before[layers[0]]


def test_map_distance_is_the_root_mean_square():
    one, other = torch.zeros(2, 3, 3), torch.full((2, 3, 3), 2.0)
    assert map_distance(one, other) == 2
    assert map_distance(one, one) == 0


def test_int8_files_are_a_fifth_to_a_third_of_the_float_ones(trained, quantized, fp32, int8):
    for one, other in ((trained, quantized), (fp32, int8)):
        assert 1 / 5 < other.path.stat().st_size / one.path.stat().st_size < 1 / 3


# The file

FINITE = st.floats(-1e30, 1e30)
RANGES = st.dictionaries(st.text(min_size=1), st.tuples(FINITE, FINITE).map(lambda pair: tuple(sorted(pair))))


@given(ranges=RANGES)
def test_ranges_survive_being_written_and_read(tmp_path_factory, ranges):
    path = str(tmp_path_factory.getbasetemp() / "ranges.json")
    file = RangesFile("sha256:0", "minmax", {"kind": "good-training-images"}, ranges, "uadtool 0.1.0")
    file.write(path)
    assert RangesFile.read(path) == file


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": "uadtool.bench/1"}, "is not a uadtool.ranges/1 file"),
    ({"ranges": {"a": [0, float("nan")]}}, "has the range 0.0 to nan for a; run calibrate again"),
    ({"ranges": {"a": [0, float("inf")]}}, "has the range 0.0 to inf for a"),
    ({"ranges": {"a": [2, 1]}}, "has the range 2.0 to 1.0 for a"),
    ({"ranges": {"a": [0, 1e300]}}, "has the range 0.0 to 1e.300 for a"),
    ({"ranges": {"a": [1]}}, "is damaged"),
    ({"ranges": {"a": 1}}, "is damaged"),
    ({"ranges": {"a": ["low", "high"]}}, "is damaged"),
    ({"ranges": {"a": [None, 1]}}, "is damaged"),
    ({"ranges": [[0, 1]]}, "is damaged"),
    ({"source": 3}, "is damaged"),
])
def test_damaged_ranges_are_refused(calibrated, tmp_path, change, message):
    record = {**json.loads(calibrated.path.read_text()), **change}
    (tmp_path / "ranges.json").write_text(json.dumps(record))
    with pytest.raises(UadtoolError, match=message) as error:
        RangesFile.read(str(tmp_path / "ranges.json"))
    assert str(tmp_path / "ranges.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_ranges_that_lack_a_part_are_refused(calibrated, tmp_path):
    record = json.loads(calibrated.path.read_text())
    for key in record:
        (tmp_path / "ranges.json").write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(UadtoolError, match=r"is damaged|is not a uadtool.ranges/1 file"):
            RangesFile.read(str(tmp_path / "ranges.json"))


def run(*arguments):
    command.main([str(argument) for argument in arguments], standalone_mode=False)


def test_ranges_of_another_file_are_refused_with_both_digests(trained, calibrated, tmp_path):
    record = json.loads(calibrated.path.read_text())
    (tmp_path / "ranges.json").write_text(json.dumps({**record, "model_digest": "sha256:1234"}))
    with pytest.raises(UadtoolError, match="run calibrate with this model") as error:
        run(trained.path, "--ranges", tmp_path / "ranges.json", "-o", tmp_path / "int8.safetensors")
    assert "sha256:1234" in str(error.value)
    assert trained.record["digest"] in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.json"]


def test_what_is_quantized_already_is_refused(quantized, calibrated, tmp_path):
    record = json.loads(calibrated.path.read_text())
    (tmp_path / "ranges.json").write_text(json.dumps({**record, "model_digest": quantized.record["digest"]}))
    with pytest.raises(UadtoolError, match="is quantized already; give the float model"):
        run(quantized.path, "--ranges", tmp_path / "ranges.json", "-o", tmp_path / "int8.safetensors")


def test_the_quantized_file_tells_where_its_ranges_come_from(trained, calibrated, quantized):
    float_metadata = load_float_model(trained.path)[1]
    metadata = load_model(quantized.path)[1]
    assert (metadata.precision, metadata.target) == ("int8", "onnxruntime")
    *earlier, step = metadata.provenance
    assert earlier == float_metadata.provenance
    assert (step["command"], step["model_digest"]) == ("quantize", trained.record["digest"])
    source = json.loads(calibrated.path.read_text())["source"]
    assert {"method": "mse", "source": source}.items() <= step["calibration"].items()
    assert metadata.threshold == float_metadata.threshold


# The command


@pytest.mark.parametrize(("options", "message"), [
    (["--steps", "200"], "--steps and --resume require --qat"), (["--resume"], "--steps and --resume require --qat"),
    (["--no-bias-correction"], "--no-bias-correction requires int8 and DATA"),
])
def test_options_that_would_do_nothing(trained, calibrated, tmp_path, options, message):
    with pytest.raises(click.UsageError, match=message):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "int8.safetensors", *options)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "moved"])
def test_images_that_the_model_was_not_trained_on_are_refused(trained, calibrated, textures, tmp_path, change):
    shutil.copytree(textures, tmp_path / "elsewhere")
    image = sorted((tmp_path / "elsewhere").glob("*/train/good/*"))[0]
    output = tmp_path / "int8.safetensors"
    options = [trained.path, tmp_path / "elsewhere", "--ranges", calibrated.path, "-o", output]
    run(*options)  # the same data set under another path
    output.unlink()
    if change == "added":
        shutil.copy(image, image.with_name("new.png"))
    elif change == "moved":  # another order, and so others would be held out
        (image.parent / "z").mkdir()
        image.rename(image.parent / "z" / image.name)
    else:
        image.rename(image.with_name("new.png") if change == "renamed" else tmp_path / "removed.png")
    with pytest.raises(UadtoolError, match="these are not the good images that the model was trained on"):
        run(*options)
    assert not output.exists()


def printed(capsys, *arguments):
    run(*arguments)
    record = json.loads(capsys.readouterr().out)
    validate(record, "quantize")
    return record


def test_data_keeps_the_maps_closer(trained, calibrated, textures, tmp_path, capsys):
    output = tmp_path / "int8.safetensors"
    options = [trained.path, textures, "--ranges", calibrated.path, "-o", output]
    corrected, plain = printed(capsys, *options), printed(capsys, *options, "--no-bias-correction")
    assert 0 < corrected["map_distance"] < plain["map_distance"]
    assert load_model(output)[1].provenance[-1]["bias_correction"] is False


@pytest.mark.parametrize("target", TARGETS)
def test_files_of_every_target_and_precision_load_again(trained, calibrated, tmp_path, capsys, target):
    float_model, metadata = load_float_model(trained.path)
    layers = QuantizableGraph(float_model).layers
    output = tmp_path / "quantized.safetensors"
    options = {
        "int8": ["--ranges", calibrated.path], "fp16": ["--precision", "fp16"],
        "mixed": ["--ranges", calibrated.path, "--keep-float", "student.*.conv_dw", "--keep-float", layers[0]],
    }
    for precision, chosen in options.items():
        record = printed(capsys, trained.path, "--target", target, "-o", output, *chosen)
        assert (record["target"], record["precision"]) == (target, precision)
        model, loaded = load_model(output)
        assert (loaded.target, loaded.precision, loaded.threshold) == (target, precision, metadata.threshold)
        if precision == "mixed":
            expected = [name for name in layers if name == layers[0] or fnmatchcase(name, "student.*.conv_dw")]
            assert record["float_layers"] == loaded.quantization.float_layers == expected
        with torch.inference_mode():
            one, other = float_model(images(2)), model(images(2))
        assert (one.score - other.score).abs().max() < 0.3 * one.score.abs().max()


def test_the_most_sensitive_layers_stay_float(trained, calibrated, textures, tmp_path, capsys):
    record = printed(capsys, trained.path, textures, "--ranges", calibrated.path, "--scope", "student", "--keep-float",
                     "auto:2", "-o", tmp_path / "mixed.safetensors")
    distances = [entry["map_distance"] for entry in record["sensitivity"]]
    assert distances == sorted(distances, reverse=True)
    worst = {entry["layer"] for entry in record["sensitivity"][:2]}
    assert worst < set(record["float_layers"])
    assert {name for name in record["float_layers"] if name.startswith("student.")} == worst
    quantization = load_model(tmp_path / "mixed.safetensors")[1].quantization
    assert (quantization.scope, quantization.method, quantization.calibration) == ("student", "ptq", "mse")


def test_the_float_model_keeps_its_statistics(trained, calibrated, textures, tmp_path):
    detector, metadata = load_float_model(trained.path)
    before = {name: detector.get_buffer(name).clone() for name in STATISTICS}
    result = apply_recipe(detector, metadata, file_digest(trained.path), RangesFile.read(str(calibrated.path)),
                          str(textures), Recipe(), tmp_path / "checkpoint")
    for name, value in before.items():
        assert torch.equal(detector.get_buffer(name), value)
        assert not torch.equal(result.model.get_buffer(name), value)


def test_fine_tuning_ends_in_the_same_kind_of_file(trained, calibrated, textures, tmp_path, capsys):
    output = tmp_path / "int8.safetensors"
    options = [trained.path, textures, "--ranges", calibrated.path, "-o", output]
    plain = printed(capsys, *options)
    tuned = printed(capsys, *options, "--qat", "--steps", 8)
    assert (plain["method"], tuned["method"]) == ("ptq", "qat")
    assert tuned["map_distance"] < 1.5 * plain["map_distance"]  # a few steps; that more help is in test_qat
    model, metadata = load_model(output)
    assert (metadata.precision, metadata.quantization.method) == ("int8", "qat")
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [path.name for path in tmp_path.iterdir()] == ["int8.safetensors"]  # the checkpoint is gone


@pytest.mark.parametrize(("options", "message"), [
    (["--keep-float", "auto:0"], "auto:N takes one positive integer"),
    (["--keep-float", "auto:2"], "Missing argument 'DATA'"),
    (["--sensitivity"], "Missing argument 'DATA'"),
    (["--qat"], "Missing argument 'DATA'"),
    (["--precision", "fp16"], "require int8"),
])
def test_options_that_do_not_fit_are_wrong_usage(trained, calibrated, tmp_path, options, message):
    with pytest.raises(click.UsageError, match=message):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", *options)


def test_int8_needs_ranges(trained, tmp_path):
    with pytest.raises(click.UsageError, match="Missing option '--ranges'"):
        run(trained.path, "-o", tmp_path / "a.safetensors")


@pytest.mark.parametrize("pattern", ["teacher.nothing", "*.conv_9"])
def test_an_unknown_layer_pattern_is_refused(trained, calibrated, tmp_path, pattern):
    with pytest.raises(UadtoolError, match="no layer is named"):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float", pattern)
    with pytest.raises(UadtoolError, match="every layer would stay float"):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float", "*")


def test_too_many_sensitive_layers_are_refused_before_they_are_measured(trained, calibrated, textures, tmp_path,
                                                                        monkeypatch):
    monkeypatch.delattr("uadtool.lab.quantize.layer_sensitivity")
    with pytest.raises(UadtoolError, match="every layer would stay float"):
        run(trained.path, textures, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float",
            "auto:999")


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18", set()), ("mobilenetv2_035", set()), ("mobilenetv3_small_050", {"Hardswish"}),
    ("efficientnet_b0", {"SiLU"}),
])
def test_activations_that_integer_convolutions_do_not_compute_are_known(name, expected):
    graph = QuantizableGraph(STFPM(name, (64, 64), 1).fold_batch_norm())
    assert graph.smooth_activations() == expected


def test_a_slow_combination_of_activation_and_runtime_is_told(trained, calibrated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(QuantizableGraph, "smooth_activations", lambda graph: {"SiLU"})
    for target in ("openvino", "onnxruntime"):
        assert "SiLU" not in caplog.text
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--target", target)
    assert "ONNX Runtime computes SiLU in float" in caplog.text


def test_the_data_set_is_not_overwritten(trained, calibrated, tmp_path):
    manifest = tmp_path / "parts.csv"
    manifest.write_text("path,label\n")
    with pytest.raises(UadtoolError, match="is an input of this command"):
        run(trained.path, manifest, "--ranges", calibrated.path, "-o", manifest)
    for arguments in ([manifest], ["--source", f"images:{manifest}"]):
        with pytest.raises(UadtoolError, match="is an input of this command"):
            calibrate_command.main([str(a) for a in (trained.path, *arguments, "-o", manifest)], standalone_mode=False)
    assert manifest.read_text() == "path,label\n"
