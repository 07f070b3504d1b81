"""Teacher, bottleneck and decoder."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from uadtool.lab.detectors.reverse_distillation import ReverseDistillation, Student
from uadtool.lab.detectors.stfpm import cosine_distance
from uadtool.lab.quantization.plan import QuantizationPlan

SIZE = (64, 96)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return ReverseDistillation("mobilenetv2_035", SIZE, 2).eval()


@pytest.fixture(scope="module")
def pixels(detector):
    images = torch.randint(0, 256, (3, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return detector.normalize(images)


def test_the_raw_maps_are_smoothed(detector, pixels):
    with torch.inference_mode():
        features = detector.features(pixels)
        raw = detector.raw_maps(pixels, features, torch.zeros(3))
        maps = [nn.functional.interpolate(cosine_distance(t, s), size=detector.map_size, mode="bilinear")[:, 0].numpy()
                for t, s in zip(features, detector.student(*features))]
    assert raw.shape[1] == 3
    for index, expected in enumerate(maps):
        smooth = np.stack([gaussian_filter(one, 1.0, mode="nearest", truncate=3) for one in expected])
        np.testing.assert_allclose(raw[:, index], smooth, atol=1e-4)


def test_the_bottleneck_is_at_stride_32(detector, pixels):
    sizes = []
    hook = detector.student.squeeze.register_forward_hook(lambda module, inputs, result: sizes.append(result.shape[2:]))
    with torch.inference_mode():
        detector.raw_maps(pixels, detector.features(pixels), torch.zeros(3))
    hook.remove()
    assert sizes == [(SIZE[0] // 32, SIZE[1] // 32)]


def test_the_width_is_that_of_the_decoder():
    narrow, wide = (Student((8, 16, 24), width) for width in (1, 2.5))
    assert [module.out_channels for module in narrow.coarse.modules() if isinstance(module, nn.Conv2d)] == [24, 24]
    assert [module.out_channels for module in wide.coarse.modules() if isinstance(module, nn.Conv2d)] == [60, 60]


def test_enlarged_maps_share_the_range_of_their_input():
    plan = QuantizationPlan(ReverseDistillation("mobilenetv2_035", SIZE, 2).fold_batch_norm())
    enlarged = [node for node in plan.points if node.target is nn.functional.interpolate]
    assert len(enlarged) == 3
    for node in enlarged:
        assert plan.points[node] == plan.points[node.args[0]]
