"""Where observers, quantizers and fp16 are put."""

import operator

import graphs
import pytest
import torch
from graphs import images, module, nodes, quantizers, small_plan
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import in_half_precision, observe
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.targets import TARGETS

ACTIVATIONS = (nn.ReLU, nn.ReLU6)

plan, ranges = graphs.plan, graphs.ranges


@pytest.fixture(scope="module")
def marked(plan):
    return observe(plan, lambda name: Point())


class Point(nn.Identity):
    """Stands at a point in place of a quantizer or an observer."""


# Points


def test_every_convolution_reads_and_gives_quantized_values(marked, plan):
    convolutions = nodes(marked, nn.Conv2d)
    assert len(convolutions) == len([m for m in plan.detector.modules() if isinstance(m, nn.Conv2d)])
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
    marked = observe(small_plan("resnet18"), lambda name: Point())
    pools = nodes(marked, nn.MaxPool2d)
    assert len(pools) == 2
    for pool in pools:
        assert {reader.target for reader in pool.users} == {pool.args[0].target}


def test_points_change_nothing_and_have_the_same_names_every_time(plan, marked):
    again = observe(QuantizationPlan(plan.detector), lambda name: Point())
    assert list(marked.points) == list(again.points)
    assert len(set(marked.points)) == len(marked.points)
    with torch.inference_mode():
        for one, other in zip(plan.detector(images(2)), marked(images(2))):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18", set()), ("mobilenetv2_035", set()), ("mobilenetv3_small_050", {"Hardswish"}),
    ("efficientnet_b0", {"SiLU"}),
])
def test_activations_that_integer_convolutions_do_not_compute_are_known(name, expected):
    plan = QuantizationPlan(STFPM(name, (64, 64), 1).fold_batch_norm())
    assert plan.smooth_activations() == expected


def test_layers_by_pattern(plan):
    layers = plan.layers
    assert plan.matching_layers(["student.*"]) == [name for name in layers if name.startswith("student.")]
    assert plan.matching_layers([layers[2], layers[0]]) == [layers[0], layers[2]]
    assert plan.matching_layers([]) == []
    with pytest.raises(UadtoolError, match=r"no layer is named 'blocks\.9'; the model has"):
        plan.matching_layers(["student.*", "blocks.9"])


# Targets and layers that stay float


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_only_what_integer_kernels_read_is_quantized(plan, ranges, target):
    model = quantize(plan, ranges, TARGETS[target])
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


def test_float_layers_of_the_teacher_leave_it_alone(plan, ranges):
    float_layers = plan.layers_outside("student")
    assert float_layers == [name for name in plan.layers if name.startswith("teacher.")]
    for target in TARGETS.values():
        if target.half:  # the teacher computes in fp16 there
            continue
        model = quantize(plan, ranges, target, float_layers)
        teacher, student = ([node for node in model.graph.nodes if str(node.target).startswith(f"{name}.")
                             and isinstance(module(model, node), (nn.Conv2d, QuantizedConv2d))]
                            for name in ("teacher", "student"))
        assert {type(module(model, node)) for node in student} == {QuantizedConv2d}
        assert not any(isinstance(module(model, node), QuantizedConv2d) for node in teacher)
        assert not any(any(quantizers(model, node)) for node in teacher)


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_that_stays_float(plan, ranges, target):
    model = quantize(plan, ranges, TARGETS[target], [plan.layers[3]])
    (node,) = nodes(model, nn.Conv2d)
    assert node.target == plan.layers[3]
    assert quantizers(model, node) == [target == "onnxruntime"]  # which quantizes what integer kernels write
    assert module(model, node).weight.dtype == (torch.float16 if target == "tensorrt" else torch.float32)
    assert plan.detector.get_submodule(node.target).weight.dtype == torch.float32
    with torch.inference_mode():
        score = model(images(2)).score
    assert score.dtype == torch.float32
    assert score.isfinite().all()


def test_half_networks_score_as_float_networks(plan):
    model = in_half_precision(plan)
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.Conv2d)} == {torch.float16}
    with torch.inference_mode():
        one, other = plan.detector(images(4)), model(images(4))
    torch.testing.assert_close(other.score, one.score, rtol=0.02, atol=0.02)
    assert not torch.equal(one.score, other.score)


class Shortcut(nn.Module):
    """Adds after an activation, as DarkNet and the first stage of EfficientNetV2; not a detector."""

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
    plan = QuantizationPlan(network)
    model = quantize(plan, calibrate(plan, [pixels], "minmax"), TARGETS[target])
    (addition,) = (node for node in model.graph.nodes if node.target is operator.add)
    sources = [source if source.target not in ("float", "half") else source.all_input_nodes[0]
               for source in addition.all_input_nodes]
    assert [isinstance(module(model, source), ActivationQuantizer) for source in sources] == expected
    assert [quantizers(model, node) for node in nodes(model, QuantizedConv2d)] == [[True]] * 3
    with torch.inference_mode():
        assert (model(pixels) - network(pixels)).abs().max() < 0.05 * network(pixels).abs().max()
