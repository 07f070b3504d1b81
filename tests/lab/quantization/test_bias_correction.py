import graphs
import torch
from graphs import images, perceptron
from torch import fx, nn

from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.modules import QuantizedConv2d
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.targets import TARGETS

TARGET = TARGETS["openvino"]

plan = graphs.plan


def test_bias_correction_keeps_the_mean_of_every_channel(plan):
    pixels = images(8)
    ranges = calibrate(plan, [pixels])
    plain, corrected = (quantize(plan, ranges, TARGET, correction=correction)
                        for correction in (None, BiasCorrection(plan, pixels)))

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

    expected, before, after = means(plan.traced), means(plain), means(corrected)
    assert expected.keys() == before.keys() == after.keys()
    off = [sum((found[name] - mean).abs().sum() for name, mean in expected.items()) for found in (before, after)]
    assert off[0] > 0.1
    assert off[1] < 0.05 * off[0]  # sums that lie between two codes may be rounded either way


def test_bias_correction_keeps_the_mean_of_every_channel_of_a_linear_layer():
    plan, tokens = perceptron()
    ranges = calibrate(plan, [tokens], "minmax")
    with torch.inference_mode():
        expected, *found = (model(tokens).mean((0, 1)) for model in (
            plan.traced, quantize(plan, ranges), quantize(plan, ranges, correction=BiasCorrection(plan, tokens))))
    plain, corrected = ((means - expected).abs().sum() for means in found)
    assert corrected < 0.05 * plain


def test_correcting_one_layer_runs_only_the_layers_before_it(plan):
    """``--sensitivity`` corrects each layer by itself."""
    pixels, called = images(2), []
    first, chosen, *_ = plan.layers
    float_layers = [name for name in plan.layers if name != chosen]
    correction = BiasCorrection(plan, pixels)
    quantized = quantize(plan, calibrate(plan, [pixels]), TARGET, float_layers)
    before = quantized.get_submodule(chosen).bias.clone()
    hooks = [quantized.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
             for name in float_layers]
    correction.apply(quantized)
    for hook in hooks:  # the plan shares the float layers
        hook.remove()
    assert called == [first]
    assert not torch.equal(quantized.get_submodule(chosen).bias, before)
