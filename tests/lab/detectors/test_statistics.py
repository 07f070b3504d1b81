"""Statistics of few, of identical and of ordinary good images. Their raw maps are random fields, so all are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from uadtool.data.dataset import Sample
from uadtool.lab.detectors.contract import PATCH, Detector
from uadtool.lab.detectors.statistics import (
    CONSPICUOUS,
    LEAST_SPREAD,
    _map_statistics,
    _moments,
    class_statistics,
    conspicuous,
    fit_statistics,
)
from uadtool.scoring.thresholds import Thresholds

SIDE, MAPS, NEW = 16, 2, 50
WHOLE = torch.ones(SIDE // PATCH, SIDE // PATCH) > 0
SPREADS = {"none": 0, "tiny": 0.01, "usual": 0.2, "large": 2}
"""Standard deviation of a raw map, whose mean is about 1."""


class Fields(Detector):
    """Its raw maps are given as the images."""

    def __init__(self, classes):
        super().__init__(classes, 1, (SIDE, SIDE), [0.5] * 3, [0.5] * 3, MAPS)

    def fit(self, run):
        raise NotImplementedError

    def raw_maps(self, pixels, features, nearest):
        raise NotImplementedError

    def fit_to(self, maps):
        """Fit the statistics to raw maps [N, M, h, w] of each class; returns the held-out scores by class."""
        owners = torch.tensor([index for index, members in enumerate(maps) for _ in members])
        samples = [Sample(f"{number}.png", str(owner), "good") for number, owner in enumerate(owners.tolist())]
        names = [str(index) for index in range(len(maps))]
        return fit_statistics(self, lambda images: (images, owners), names, [(samples, torch.cat(maps))]).scores

    def scores(self, maps, index=0):
        """Scores of new images of this class."""
        return self.image_score(self.normalize_maps(maps, torch.full((len(maps),), index))).numpy()


def fields(random, count, side):
    """Smooth random fields [N, M, h, w] of unit variance at their ``side`` x ``side`` knots."""
    knots = torch.from_numpy(random.normal(size=(count, MAPS, side, side)).astype(np.float32))
    return F.interpolate(knots, size=(SIDE, SIDE), mode="bilinear")


def good_images(random, count, spread):
    """Raw maps of held-out images and of new images of a class: a pattern, and noise of the position and the image."""
    noise = fields(random, count + NEW, SIDE // 2)
    noise += 0.3 * torch.from_numpy(random.normal(size=(count + NEW, MAPS, 1, 1)).astype(np.float32))
    maps = 1 + 0.5 * fields(random, 1, 4).abs() + spread * noise
    return maps[:count], maps[count:]


def simulate(classes, count, spread, runs=40):
    """Per run: mean and standard deviation of new scores, the share above the highest held-out score, the threshold."""
    results = []
    for seed in range(runs):
        random, detector = np.random.default_rng(seed), Fields(classes)
        held_out, new = zip(*(good_images(random, count, spread) for _ in range(classes)))
        threshold = Thresholds.at(0, detector.fit_to(held_out)).common
        scores = np.stack([detector.scores(maps, index) for index, maps in enumerate(new)])
        results.append((scores.mean(), scores.std(1).mean(), np.mean(scores > threshold), threshold))
    return np.transpose(results)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 40])
def test_new_good_images_score_as_held_out_images(count, spread):
    means, deviations, exceeding, _ = simulate(1, count, SPREADS[spread])
    assert abs(np.median(means)) < {1: 1, 2: 0.6}.get(count, 0.2)
    if spread == "none":
        assert np.median(deviations) < 0.05
        assert exceeding.max() == 0
    elif count > 1:  # one image does not show how images vary
        assert 0.65 < np.median(deviations) < 1.35
    # The share above the highest of n scores is distributed as Beta(1, n), with a mean and deviation of 1 / (n + 1).
    promised, sampling = 1 / (count + 1), 3 / (count + 1) / len(exceeding) ** 0.5
    assert exceeding.mean() < promised + sampling
    if spread != "none" and count > 1:
        assert exceeding.mean() > promised / 3  # otherwise the threshold would hide anomalies


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("spread", ["tiny", "usual", "large"])
def test_a_threshold_of_all_classes_keeps_its_promise(spread, count):
    """Scores of few images of a class are normalised by a mean that they determined, so the rate is somewhat higher."""
    exceeding = simulate(4, count, SPREADS[spread])[2]
    assert 0.5 < exceeding.mean() * (4 * count + 1) < 2


@pytest.mark.parametrize("few", [3, 20])
def test_a_class_of_identical_images_scores_near_0_among_others(few):
    """Plain leave-one-out statistics of three images put new ones 1.6 standard deviations below them."""
    random, detector = np.random.default_rng(0), Fields(3)
    held_out, new = zip(*(good_images(random, count, spread) for count, spread in [(few, 0), (20, 0.2), (20, 0.2)]))
    scores = detector.fit_to(held_out)
    assert np.abs(detector.scores(new[0])).max() < 0.01
    assert np.abs(scores["0"][:-1]).max() < 0.01  # the highest counts as 1
    assert np.abs(detector.scores(new[1], 1)).mean() > 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(0.01, 100))
def test_copies_of_one_image_do_not_exceed_the_threshold(seed, counts, scale):
    random, detector = np.random.default_rng(seed), Fields(len(counts))
    images = [scale * good_images(random, 1, 0.2)[0] for _ in counts]
    scores = detector.fit_to([image.repeat(count, 1, 1, 1) for image, count in zip(images, counts)])
    thresholds = Thresholds.at(0, scores)
    assert {thresholds.common, *thresholds.by_class.values()} == {1}  # rounding would lift a copy above 0
    for index, image in enumerate(images):
        assert abs(detector.scores(image, index).item()) < 0.2


SCORES = st.lists(st.floats(-5, 5) | st.sampled_from([0, 1, 40]), min_size=1, max_size=8)


@given(st.lists(SCORES, min_size=1, max_size=4))
def test_a_score_is_conspicuous_by_the_statistics_of_all_others(scores):
    found = conspicuous(scores)
    for index, values in enumerate(scores):
        for place, value in enumerate(values):
            others = [*values[:place], *values[place + 1:]] or values
            mean, std = class_statistics([*scores[:index], others, *scores[index + 1:]])[index]
            if abs(value - mean - CONSPICUOUS * std) > 1e-3 and std > LEAST_SPREAD:
                assert (place in found[index]) == (value > mean + CONSPICUOUS * std)


def test_good_images_are_rarely_conspicuous():
    random = np.random.default_rng(0)
    normal = conspicuous(random.normal(size=(1000, 40)))
    assert sum(map(len, normal)) == 0
    skewed = conspicuous(random.gamma(2, size=(1000, 40)))
    assert sum(map(len, skewed)) < 0.001 * 40_000
    for _ in range(100):
        one, *others = random.normal(size=(5, 7))
        one[3] += 12
        assert conspicuous([one, *others]) == [[3], [], [], [], []]


CLASSES = st.lists(st.tuples(st.integers(1, 12), st.sampled_from(list(SPREADS.values())), st.integers(1, 12)),
                   min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), CLASSES)
def test_statistics_are_finite_whatever_the_images(seed, classes):
    """Classes of some images, of which some occur several times."""
    random, detector = np.random.default_rng(seed), Fields(len(classes))
    images = [good_images(random, different, spread) for different, spread, _ in classes]
    held_out = [maps.repeat(-(-count // len(maps)), 1, 1, 1)[:count]
                for (maps, _), (_, _, count) in zip(images, classes)]
    scores = detector.fit_to(held_out)
    assert all(np.isfinite(of_class).all() for of_class in scores.values())
    assert all(max(of_class) >= 1 for of_class in scores.values())
    assert (detector.score_std > 0).all()
    assert (detector.map_spreads > 0).all()
    for index, (_, new) in enumerate(images):
        assert np.isfinite(detector.scores(new, index)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_the_order_of_the_images_does_not_matter(seed, count):
    random = np.random.default_rng(seed)
    maps, _ = good_images(random, count, 0.2)
    order = random.permutation(count)
    one, other = Fields(1), Fields(1)
    np.testing.assert_allclose(one.fit_to([maps])["0"], other.fit_to([maps[order]])["0"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one.score_std, other.score_std, rtol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_others_predict_the_spread_of_all(count):
    """Few images vary less about their mean than many, which leave-one-out must not take for their spread."""
    found = []
    for seed in range(200):
        moments = _moments(good_images(np.random.default_rng(seed), count, 0.5)[0], torch.ones(count, SIDE, SIDE))
        found.append([statistics[1].square().mean().item()
                      for statistics in (_map_statistics(moments.sum(0), count, WHOLE),
                                         _map_statistics(moments.sum(0), count, WHOLE, moments[0]))])
    final, left_out = np.mean(found, axis=0)
    assert left_out == pytest.approx(final, rel=0.05)


@pytest.mark.parametrize(("count", "share"), [(10, 0.05), (20, 0.025), (40, 0.0125)])
def test_ordinary_numbers_of_images_are_scored_as_before(count, share):
    """Published figures come from plain leave-one-out statistics, so scores must hardly move."""
    maps, _ = good_images(np.random.default_rng(0), count, 0.2)
    moments = _moments(maps, torch.ones(count, SIDE, SIDE))
    level = moments[:, 0].mean((0, 2, 3))
    for number in range(3):
        corrected = _map_statistics(moments.sum(0), count, WHOLE, moments[number])
        plain = _map_statistics(moments.sum(0) - moments[number], count - 1, WHOLE)
        assert ((corrected[0] - plain[0]).abs().amax((1, 2)) < share * level).all()
        torch.testing.assert_close(corrected[1], plain[1], rtol=share, atol=0)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 8]), st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_what_lies_outside_the_region_of_interest_counts_nowhere(seed, count, scale):
    random = np.random.default_rng(seed)
    roi = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    top, left = random.integers(0, SIDE - 5, 2)
    roi[top:top + random.integers(3, 12), left:left + random.integers(3, 12)] = True
    held_out, new = good_images(random, count, 0.2)
    results = []
    for _ in range(2):
        detector = Fields(2)
        detector.roi[0] = roi
        noise = scale * torch.from_numpy(random.random(held_out.shape).astype(np.float32))
        others = good_images(np.random.default_rng(seed), 4, 0.2)[0]
        found = detector.fit_to([torch.where(roi, held_out, noise), others])
        images = torch.where(roi, new, scale * torch.from_numpy(random.random(new.shape).astype(np.float32)))
        results.append((found["0"], found["1"], detector.scores(images), detector.expected_maps,
                        detector.map_spreads))
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)
