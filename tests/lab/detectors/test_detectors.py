import numpy as np
import pytest
import torch
from conftest import METADATA
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from torch import nn
from torch.nn import functional as F

from uadtool.cli.train import train
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.complexity import count_macs, count_parameters
from uadtool.lab.detectors.contract import Detector, pooled_descriptor
from uadtool.lab.detectors.registry import build_detector, method_options
from uadtool.lab.detectors.stfpm import FUSIONS, STFPM, cosine_distance, distillation_loss

SIZE = (64, 96)
MAP_SIZE = (16, 24)


def random_stfpm(teacher="mobilenetv2_035", fusion="sum"):
    """Untrained networks, and three classes whose statistics differ."""
    torch.manual_seed(0)
    detector = STFPM(teacher, SIZE, 3, fusion).eval()
    with torch.inference_mode():
        descriptors = pooled_descriptor(detector.teacher(detector.normalize(images(3))))
    detector.prototypes.copy_(descriptors)
    detector.descriptor_scale.uniform_(0.5, 2)
    detector.expected_maps.uniform_(0, 1)
    detector.map_spreads.uniform_(0.1, 0.5)
    detector.score_mean.copy_(torch.tensor([0.5, 1.0, 2.0]))
    detector.score_std.copy_(torch.tensor([0.1, 0.2, 0.4]))
    return detector


@pytest.fixture(scope="module", params=FUSIONS)
def stfpm(request):
    return random_stfpm(fusion=request.param)


class Head(Detector):
    """The parts that all methods share, without networks."""

    def fit(self, run):
        raise NotImplementedError

    def raw_maps(self, pixels, features, nearest):
        raise NotImplementedError


def images(count, seed=0):
    """Noise on a different colour each, so that the descriptors differ."""
    random = np.random.default_rng(seed)
    colours = random.uniform(0, 256, (count, 1, 1, 3))
    return torch.from_numpy((colours + random.normal(0, 40, (count, *SIZE, 3))).clip(0, 255).astype(np.uint8))


def run(detector, pixels):
    with torch.inference_mode():
        return detector(pixels)


def raw_maps(detector, pixels):
    with torch.inference_mode():
        return detector.raw_maps_and_class(pixels)[0]


def feature_map(shape):
    # Below 2 ** -9, squares of squares come close to what float32 can tell from 0.
    values = st.floats(-100, 100, width=32).filter(lambda value: abs(value) > 2 ** -9)
    return stn.arrays(np.float32, shape, elements=values).map(torch.from_numpy)


PAIRS = stn.array_shapes(min_dims=4, max_dims=4, max_side=4).flatmap(
    lambda shape: st.tuples(feature_map(shape), feature_map(shape)))


@given(PAIRS)
def test_cosine_distance_is_half_the_squared_distance_of_unit_vectors(pair):
    teacher, student = pair
    distance = cosine_distance(teacher, student)
    assert distance.shape == (len(teacher), 1, *teacher.shape[2:])
    difference = F.normalize(teacher.double(), dim=1) - F.normalize(student.double(), dim=1)
    expected = difference.square().sum(1, keepdim=True) / 2
    torch.testing.assert_close(distance, expected.float(), rtol=0, atol=1e-5)


@given(PAIRS, st.floats(0.1, 10))
def test_cosine_distance_is_symmetric_and_ignores_lengths(pair, factor):
    teacher, student = pair
    distance = cosine_distance(teacher, student)
    torch.testing.assert_close(distance, cosine_distance(student, teacher), rtol=0, atol=1e-5)
    torch.testing.assert_close(distance, cosine_distance(teacher * factor, student), rtol=0, atol=1e-5)


def test_cosine_distance_of_a_dead_position_is_finite():
    nothing, something = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for pair in ((nothing, something), (nothing, nothing)):
        assert torch.equal(cosine_distance(*pair), torch.ones(1, 1, 2, 2))


def test_loss_adds_the_mean_distances_of_the_maps():
    generator = torch.Generator().manual_seed(0)
    teacher, student = ([torch.randn(2, 5, size, size, generator=generator) for size in (8, 4, 2)] for _ in range(2))
    expected = sum(cosine_distance(t, s).mean() for t, s in zip(teacher, student))
    torch.testing.assert_close(distillation_loss(teacher, student), expected)


def test_raw_maps_are_those_of_three_feature_maps_or_their_product(stfpm):
    raw = raw_maps(stfpm, images(2))
    with torch.inference_mode():
        pixels = stfpm.normalize(images(2))
        maps = [F.interpolate(cosine_distance(t, s), MAP_SIZE, mode="bilinear")[:, 0].numpy()
                for t, s in zip(stfpm.teacher(pixels), stfpm.student(pixels))]
    assert len(maps) == 3
    expected = np.stack(maps, axis=1) if stfpm.fusion == "sum" else np.prod(maps, axis=0)[:, None]
    np.testing.assert_allclose(raw.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert raw.min() >= 0


def test_a_student_that_equals_its_teacher_sees_no_anomaly(stfpm):
    student, teacher = stfpm.student.state_dict(), stfpm.teacher.state_dict()
    stfpm.student.load_state_dict(teacher)
    raw = raw_maps(stfpm, images(2))
    stfpm.student.load_state_dict({name: student[name] for name in teacher})
    torch.testing.assert_close(raw, torch.zeros_like(raw), rtol=0, atol=1e-5)


def test_the_nearest_class_normalises_the_map_and_the_score(stfpm):
    pixels = images(3)
    output = run(stfpm, pixels)
    assert output.nearest_class.tolist() == [0, 1, 2]  # each is its own prototype
    raw = raw_maps(stfpm, pixels)
    np.testing.assert_allclose(output.raw_score, highest_mean(raw.sum(1).numpy()), rtol=1e-4)
    for index, (anomaly_map, score) in enumerate(zip(output.anomaly_map, output.score)):
        expected, spread = (F.interpolate(grid[index][None], MAP_SIZE, mode="bilinear")[0]
                            for grid in (stfpm.expected_maps, stfpm.map_spreads))
        deviation = ((raw[index] - expected) / spread).sum(0)
        normalised = (deviation - stfpm.score_mean[index]) / stfpm.score_std[index]
        torch.testing.assert_close(anomaly_map, normalised, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(score.item(), highest_mean(normalised.numpy()[None])[0], rtol=1e-3, atol=1e-3)


def highest_mean(maps):
    """Mean of the highest 1 % of each map of 16 x 24."""
    return [float(np.sort(one.ravel())[-4:].mean()) for one in maps]


@given(st.integers(0, 2**32 - 1))
def test_nearest_class_is_that_of_the_smallest_scaled_distance(seed):
    detector = Head(classes=5, descriptor_size=20, map_size=(1, 1), mean=[0.5], std=[0.5])
    generator = torch.Generator().manual_seed(seed)
    detector.prototypes.normal_(generator=generator)
    detector.descriptor_scale.uniform_(0.1, 10, generator=generator)
    descriptor = torch.randn(16, 20, generator=generator)
    distances = ((descriptor[:, None] - detector.prototypes) * detector.descriptor_scale).double().square().sum(2)
    chosen = distances.gather(1, detector.nearest_class(descriptor)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=0)  # either of two equally near


@given(stn.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
                  elements=st.floats(-1e3, 1e3, width=32)))
def test_score_is_the_mean_of_the_highest_hundredth(maps):
    assume(maps[0].size % 100 != 50)  # half a value may count or not
    detector = Head(classes=1, descriptor_size=1, map_size=maps.shape[1:], mean=[0.5], std=[0.5])
    count = max(1, round(maps[0].size / 100))
    expected = [np.sort(one.ravel())[::-1][:count].astype(np.float64).mean() for one in maps]
    score = detector.image_score(torch.from_numpy(maps))
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("teacher", ["tf_efficientnet_lite0", "resnet18"])
def test_pixels_are_standardised_per_channel(teacher):
    detector = STFPM(teacher, (32, 32), 1)
    image = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 32, 32, 3)
    mean, std = ([0.5], [0.5]) if teacher != "resnet18" else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = (image.numpy() / 255 - mean) / std
    np.testing.assert_allclose(detector.normalize(image).permute(0, 2, 3, 1), expected, atol=1e-5)


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)

    def forward(self, image):
        return self.depthwise(self.first(image.permute(0, 3, 1, 2).float()))


def test_complexity_counts_all_layers():
    network = TwoConvolutions()
    assert count_parameters(network) == (8 * 3 * 9 + 8) + 8 * 25
    assert count_macs(network, (32, 64)) == 16 * 32 * 8 * 27 + 16 * 32 * 8 * 25
    assert not any(module._forward_hooks for module in network.modules())


def test_the_help_of_train_names_every_option():
    (text,) = [option.help for option in train.params if option.name == "method_options"]
    for part, method in zip(text.split(";"), ("memory", "duet", "stfpm", "rd", "dinomaly")):
        assert method in part
        assert all(name in part for name in method_options(method, {}))
    assert method_options("us", {}).keys() == method_options("rd", {}).keys()


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "oracle"}, "unknown method 'oracle'; take one of stfpm, rd, us, dinomaly, memory, duet"),
    ({"teacher": "none"}, "timm .* has no model 'none'"),
])
def test_metadata_that_this_version_cannot_build_are_refused(changes, message):
    with pytest.raises(UadtoolError, match=message):
        build_detector(METADATA.replace(**{"method": "stfpm", "teacher": "resnet18", **changes}))
