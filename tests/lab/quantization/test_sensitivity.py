import copy

import torch
from graphs import images, small_plan

from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.sensitivity import layer_sensitivity, map_distance
from uadtool.lab.quantization.targets import TARGETS


def test_sensitivity_finds_the_layer_that_is_bad_at_int8():
    plan, pixels = small_plan("resnet18"), [images(4)]
    chosen = [plan.layers[0], plan.layers[-1]]
    ranges = calibrate(plan, [images(8)])
    before = dict(layer_sensitivity(plan, ranges, TARGETS["openvino"], pixels, chosen))
    assert list(before) == chosen
    narrow = copy.deepcopy(plan.detector)
    with torch.no_grad():  # one large weight per channel leaves few codes to the others; the input there is 0
        conv = narrow.get_submodule(chosen[0])
        conv.weight.view(len(conv.weight), -1)[:, 0] = 20 * conv.weight.abs().max()
    plan = QuantizationPlan(narrow)
    after = dict(layer_sensitivity(plan, calibrate(plan, pixels), TARGETS["openvino"], pixels, chosen))
    assert after[chosen[0]] > 2 * before[chosen[0]]


def test_map_distance_is_the_root_mean_square():
    one, other = torch.zeros(2, 3, 3), torch.full((2, 3, 3), 2.0)
    assert map_distance(one, other) == 2
    assert map_distance(one, one) == 0
