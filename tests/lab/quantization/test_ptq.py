import graphs
import pytest
import torch
from graphs import images, module, nodes, perceptron, quantizers
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import in_half_precision, observe
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d, QuantizedLinear
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.targets import TARGETS

plan, ranges = graphs.plan, graphs.ranges


def test_plan_and_detector_stay_as_they_are(plan, ranges):
    """Nothing that is made from a plan changes what is made next."""
    first, float_state = quantize(plan, ranges).state_dict(), plan.detector.state_dict()
    float_state = {name: tensor.clone() for name, tensor in float_state.items()}
    code, points = plan.traced.code, dict(plan.points)
    for target in TARGETS.values():
        quantize(plan, ranges, target, plan.layers[:1], BiasCorrection(plan, images(2)))
    in_half_precision(plan)
    observe(plan, lambda name: nn.Identity())
    assert (plan.traced.code, plan.points) == (code, points)
    for before, after in ((first, quantize(plan, ranges).state_dict()), (float_state, plan.detector.state_dict())):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("corrected", [False, True])
def test_biases_are_whole_numbers_of_their_unit(plan, ranges, corrected):
    model = quantize(plan, ranges, correction=BiasCorrection(plan, images(4)) if corrected else None)
    for node in nodes(model, QuantizedConv2d):
        conv, point = module(model, node), module(model, node.args[0])
        codes = conv.bias.double() / (point.scale.double() * conv.weight_scale.double())
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)


def test_all_convolutions_are_quantized_and_scores_stay_close(plan, ranges):
    quantized = quantize(plan, ranges)
    assert not [m for m in quantized.modules() if isinstance(m, nn.Conv2d)]
    assert [node.target for node in nodes(quantized, QuantizedConv2d)] == list(plan.layers)
    with torch.inference_mode():
        one, other = plan.detector(images(4, seed=1)), quantized(images(4, seed=1))
    assert (one.score - other.score).abs().max() < 0.1 * one.score.abs().max()
    assert not torch.equal(one.score, other.score)


def test_a_point_without_a_range_is_refused(plan, ranges):
    ranges = dict(ranges)
    name, _ = ranges.popitem()
    with pytest.raises(UadtoolError, match=f"the ranges lack '{name}': they were made from another model"):
        quantize(plan, ranges)
    with pytest.raises(UadtoolError, match="the ranges have 'another': they were made from another model"):
        quantize(plan, {**ranges, name: (0, 1), "another": (0, 1)})


def test_tensorrt_has_symmetric_activations(plan, ranges):
    for quantizer in quantize(plan, ranges, TARGETS["tensorrt"]).points.values():
        assert (quantizer.zero_point.dtype, quantizer.zero_point.item()) == (torch.int8, 0)


# Linear layers


@pytest.mark.parametrize("target", TARGETS)
def test_linear_layers_read_quantized_values_and_write_float_values(target):
    plan, tokens = perceptron()
    model = quantize(plan, calibrate(plan, [tokens], "minmax"), TARGETS[target])
    layers = nodes(model, QuantizedLinear)
    assert [node.target for node in layers] == ["first", "second", "last"]
    assert all(quantizers(model, node) == [True] for node in layers)
    assert [reader.target for point in nodes(model, ActivationQuantizer) for reader in point.users] == [
        node.target for node in layers]
    with torch.inference_mode():
        expected, found = plan.detector(tokens), model(tokens)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_linear_layers_that_stay_float_read_float_values():
    plan, tokens = perceptron()
    ranges = calibrate(plan, [tokens], "minmax")
    model = quantize(plan, ranges, TARGETS["onnxruntime"], ["second"])
    (node,) = nodes(model, nn.Linear)
    assert (node.target, quantizers(model, node)) == ("second", [False])
    model = quantize(plan, ranges, TARGETS["tensorrt"], ["second"])
    assert model.get_submodule("second").weight.dtype == torch.float16
    assert model.get_submodule("norm").weight.dtype == torch.float32
