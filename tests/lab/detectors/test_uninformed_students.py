"""Patch networks and their maps."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import pooled_descriptor
from uadtool.lab.detectors.uninformed_students import (
    PatchNetwork,
    UninformedStudents,
    _crop,
    joined,
    whitened_components,
)
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantization.teacher import quantized_teacher

TEACHER = "mobilenetv2_035"
SIZE = (64, 96)


def pixels(count=2):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return UninformedStudents(TEACHER, SIZE, 2).eval()


def test_a_descriptor_depends_only_on_its_patch():
    """A patch is 32 x 32 pixels around a cell. Without padding, the paper's layers give it one descriptor."""
    torch.manual_seed(0)
    network = PatchNetwork(0.1).eval()
    with torch.inference_mode():
        dense = network(pixels())
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                layer.padding = (0, 0)
        for row, column in ((4, 4), (7, 11), (11, 19)):
            top, left = 4 * row - 14, 4 * column - 14
            alone = network(pixels()[:, :, top:top + 32, left:left + 32])
            assert alone.shape == (2, 13, 1, 1)
            torch.testing.assert_close(dense[:, :, row, column], alone[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_width_1_is_the_papers_network():
    convolutions = [layer for layer in PatchNetwork(1) if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels, *layer.kernel_size) for layer in convolutions] == [
        (3, 128, 5, 5), (128, 256, 5, 5), (256, 256, 2, 2), (256, 128, 4, 4), (128, 128, 1, 1)]


def test_the_raw_maps_are_error_and_variance(detector):
    with torch.inference_mode():
        features = detector.features(pixels())
        raw = detector.raw_maps(pixels(), features, torch.zeros(2))
        teacher = detector.teacher(pixels()).double().numpy()
        students = np.stack([student(pixels()).double().numpy() for student in detector.student])
    error = ((students.mean(0) - teacher) ** 2).mean(1)
    variance = ((students ** 2).mean(0) - students.mean(0) ** 2).mean(1)
    assert variance.min() > 0
    assert raw.shape == (2, 2, *detector.map_size) == (2, 2, 16, 24)
    np.testing.assert_allclose(raw, np.stack([error, variance], axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled_descriptor(features), teacher.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_components_are_the_whitened_ones_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    features = [(torch.ones(6, 1, 48, 48), 2 + torch.randn(6, 4, 24, 24, generator=generator),
                 5 * torch.randn(6, 3, 12, 12, generator=generator)) for _ in range(3)]
    points = torch.cat([joined(part) for part in features]).permute(0, 2, 3, 1)
    seen = points[:, ::3, ::3].flatten(0, 2)
    components = whitened_components(seen, 3)
    found = torch.cat([components(part) for part in features])
    assert found.shape == (18, 3, 24, 24)
    scale = seen.numpy().std(0, ddof=1)
    reference = PCA(3, whiten=True).fit(seen.numpy() / scale)
    expected = reference.transform(points.flatten(0, 2).numpy() / scale)
    flat = found.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    signs = np.sign((flat * expected).sum(0))
    np.testing.assert_allclose(flat, signs * expected, atol=2e-3)


@pytest.mark.parametrize("size", [(64, 96), (208, 144)])
def test_crops_of_images_and_features_show_the_same(size):
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = [images.permute(0, 3, 1, 2)[:, :, ::stride, ::stride] for stride in (4, 8, 16)]
    seen = set()
    for seed in range(20):
        part, maps = _crop(images, features, np.random.default_rng(seed))
        assert part.shape[1:3] == (min(size[0], 128), min(size[1], 128))
        for stride, one in zip((4, 8, 16), maps):
            assert torch.equal(one, part.permute(0, 3, 1, 2)[:, :, ::stride, ::stride])
        seen.add(part.numpy().tobytes())
    assert len(seen) == 1 if max(size) <= 128 else len(seen) > 1


@pytest.mark.parametrize("width", [0.001, 0.4])
def test_a_width_without_descriptors_is_refused(width):
    with pytest.raises(UadtoolError, match=r"at width 0\.\d+; with mobilenetv2_035 take 0\.01 to 0\.38"):
        UninformedStudents(TEACHER, SIZE, 2, width)


def test_only_patch_networks_are_deployed():
    deployed = UninformedStudents(TEACHER, SIZE, 2).fold_batch_norm()
    assert {name.split(".")[0] for name, _ in deployed.named_parameters()} == {"teacher", "student"}


def test_ranges_of_a_patch_network_do_not_fit_the_backbone(detector):
    plan = QuantizationPlan(UninformedStudents(TEACHER, SIZE, 2).fold_batch_norm())
    images = torch.zeros(1, *SIZE, 3, dtype=torch.uint8)
    with pytest.raises(UadtoolError, match="run calibrate again"):
        quantized_teacher(detector, calibrate(plan, [images]), TARGETS["onnxruntime"], images)
