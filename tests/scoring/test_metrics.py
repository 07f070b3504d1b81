"""Each figure against scikit-learn, or against a direct computation over every threshold."""

import base64
import json
import zlib
from typing import List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from uadtool.comparing.bootstrap import paired_bootstrap
from uadtool.scoring.metrics import auroc, average_precision, f1_max, roc_curve
from uadtool.scoring.pixel_metrics import PixelMetrics, count_pixels

reference = pytest.importorskip("sklearn.metrics")

Maps = List[Tuple[np.ndarray, np.ndarray]]


@st.composite
def labelled_scores(draw: st.DrawFn) -> Tuple[List[bool], List[float]]:
    """Both labels, and scores that are often equal."""
    labels = [False, True, *draw(st.lists(st.booleans(), max_size=30))]
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6))
    return labels, draw(st.lists(values, min_size=len(labels), max_size=len(labels)))


def blobs(seed: int, count: int = 8, size: int = 64, shift: float = 3.0) -> Maps:
    """Smooth maps of about unit variance. Every second map has regions that are higher by ``shift``."""
    random = np.random.default_rng(seed)
    maps = []
    for index in range(count):
        mask = np.zeros((size, size), bool)
        for _ in range(index % 2 * 3):
            top, left, height, width = random.integers(2, size // 3, 4)
            mask[top:top + height, left:left + width] = True
        noise = 7 * ndimage.gaussian_filter(random.normal(size=mask.shape), 2)
        values = noise + shift * ndimage.gaussian_filter(mask.astype(float), 2)
        maps.append((values.astype(np.float32), mask))
    return maps


def measured(maps: Maps) -> PixelMetrics:
    pixels = PixelMetrics()
    for values, mask in maps:
        pixels.add(count_pixels(values, mask))
    return pixels


def exact_aupro(maps: Maps, limit: float = 0.3) -> float:
    """From the share of good pixels, and the mean share of the regions, that reach each distinct value."""
    good = np.sort(np.concatenate([values[~mask] for values, mask in maps]))
    regions = []
    for values, mask in maps:
        names, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(values[names == name]) for name in range(1, count + 1)]
    thresholds = np.unique(np.concatenate([values.ravel() for values, _ in maps]))[::-1]

    def reaching(ordered: np.ndarray) -> np.ndarray:
        return np.append(0, 1 - np.searchsorted(ordered, thresholds) / len(ordered))

    rate, overlap = reaching(good), np.mean([reaching(region) for region in regions], axis=0)
    area = 0.0
    for left, right, low, high in zip(rate, rate[1:], overlap, overlap[1:]):
        if left < limit:
            part = min(right, limit) - left
            area += part * (low + (low + (high - low) * part / (right - left) if right > left else high)) / 2
    return area / limit


@given(labelled_scores())
def test_image_metrics_are_those_of_scikit_learn(case):
    labels, scores = case
    assert auroc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores))
    assert average_precision(labels, scores) == pytest.approx(reference.average_precision_score(labels, scores))


@given(labelled_scores())
def test_f1_max_is_the_best_f1_of_any_threshold_and_its_threshold_has_it(case):
    labels, scores = case
    best, threshold = f1_max(labels, scores)
    assert best == pytest.approx(max(reference.f1_score(labels, np.array(scores) >= value) for value in scores))
    assert best == pytest.approx(reference.f1_score(labels, np.array(scores) >= threshold))


def test_f1_max_has_the_highest_of_the_best_thresholds():
    assert f1_max([False, True, False, True], [1, 2, 3, 4]) == (0.8, 2.0)
    assert f1_max([True, False, False, True], [1, 2, 3, 4]) == (pytest.approx(2 / 3), 4.0)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max])
def test_image_metrics_need_both_labels_and_equal_lengths(metric):
    for labels, scores in ([True], [1]), ([False, False], [1, 2]), ([], []):
        with pytest.raises(ValueError, match="both good and anomalous images are needed"):
            metric(labels, scores)
    with pytest.raises(ValueError, match="2 labels for 1 scores"):
        metric([True, False], [1])


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_metrics_are_close_to_the_exact_curves(seed, shift):
    maps = blobs(seed, shift=shift)
    masks, values = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*((m, v) for v, m in maps)))
    pixels = measured(maps)
    assert pixels.auroc() == pytest.approx(reference.roc_auc_score(masks, values), abs=2e-4)
    assert pixels.aupro() == pytest.approx(exact_aupro(maps), abs=5e-4)
    assert pixels.aupro(0.05) == pytest.approx(exact_aupro(maps, 0.05), abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=9, max_size=9), st.floats(0.01, 1))
def test_pixel_metrics_of_values_that_the_bins_keep_apart_are_exact(pixels, limit):
    values, mask = (np.array(part).reshape(3, 3) for part in zip(*pixels))
    maps = [(values.astype(np.float32), mask), (np.zeros((3, 3), np.float32), np.zeros((3, 3), bool))]
    found = measured(maps)
    if mask.any():
        everything = np.append(mask, np.zeros(9)), np.append(values, np.zeros(9))
        assert found.auroc() == pytest.approx(reference.roc_auc_score(*everything))
        assert found.aupro(limit) == pytest.approx(exact_aupro(maps, limit))
    else:
        assert found.auroc() is None
        assert found.aupro() is None


def test_a_small_region_weighs_as_much_as_a_large_one_for_aupro_only():
    mask = np.zeros((20, 20), bool)
    mask[:10, :10] = True  # found
    mask[15, 15] = True  # missed
    pixels = measured([(np.where(mask, 5, 0).astype(np.float32) * (np.arange(20) < 12), mask)])
    assert pixels.auroc() > 0.99
    # Half of the overlap at the start, then a straight line to full overlap where everything is anomalous.
    assert pixels.aupro(0.3) == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_regions_that_touch_at_a_corner_are_one():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = mask[2, 2] = True
    found = np.zeros((4, 4), np.float32)
    found[2, 2] = 1
    # One of five pixels at the start, then a straight line to all five where everything is anomalous.
    assert measured([(found, mask)]).aupro(0.5) == pytest.approx(0.2 + 0.8 * 0.5 / 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_merged_shards_are_exactly_the_whole_also_after_being_written_and_read(seed, shards):
    maps = blobs(seed, size=32)
    merged = PixelMetrics()
    for shard in set(shards):
        part = measured([values for values, place in zip(maps, shards) if place == shard])
        merged.merge(PixelMetrics.from_json(json.loads(json.dumps(part.to_json()))))
    whole = measured(maps)
    assert (merged.auroc(), merged.aupro(), merged.to_json()) == (whole.auroc(), whole.aupro(), whole.to_json())


def test_counts_of_many_large_maps_are_small_to_write():
    random = np.random.default_rng(0)
    wide = [(random.standard_cauchy((512, 512)).astype(np.float32), random.random((512, 512)) < 0.3) for _ in range(4)]
    assert len(json.dumps(measured(wide).to_json())) < 100_000
    assert PixelMetrics.from_json(PixelMetrics().to_json()).auroc() is None


def bins(*lists: List[int]) -> str:
    return base64.b64encode(zlib.compress(json.dumps(lists).encode())).decode()


@pytest.mark.parametrize("counted", [
    {}, {"regions": 0}, {"regions": 0, "bins": "?"}, {"regions": 0, "bins": "aaaa"}, {"regions": 0, "bins": 3},
    {"regions": 0, "bins": bins([1], [2], [3])}, {"regions": 0, "bins": bins([1], [2], [3], [4, 5])},
    {"regions": 0, "bins": bins([1 << 16], [2], [3], [4])}, {"regions": 0, "bins": bins([-1], [2], [3], [4])},
    {"regions": 0, "bins": bins([1], [1 << 70], [3], [4])}, {"regions": None, "bins": bins([1], [2], [3], [4])},
    {"regions": 4, "bins": bins([1], [2], [3], [4])}, {"regions": -1, "bins": bins([1], [2], [3], [4])},
    {"regions": True, "bins": bins([1], [2], [3], [4])}, {"regions": 1.0, "bins": bins([1], [2], [3], [4])},
    {"regions": 1, "bins": bins([1], [2.5], [3], [4])}, {"regions": 1, "bins": bins([1], [2], [3], [2 << 40])},
    {"regions": 1, "bins": bins([1], [1 << 53], [3], [4])}, {"regions": 1, "bins": bins([1], [2], [1 << 53], [4])},
    {"regions": 1, "bins": bins([1, 0], [2, 2], [3, 3], [4, 4])}, {"regions": 0, "bins": bins([], [], [], [], [])},
    {"regions": 0, "bins": base64.b64encode(zlib.compress(b"[" * 100_000)).decode()},
    {"regions": 0, "bins": base64.b64encode(zlib.compress(b"[[],[],[],[]]")[:-3]).decode()},
    {"regions": 0, "bins": base64.b64encode(zlib.compress(b"[[],[],[],[]" + b" " * (8 << 20) + b"]")).decode()},
])
def test_invalid_pixel_counts_are_refused(counted):
    with pytest.raises(ValueError, match="its pixel counts cannot be read"):
        PixelMetrics.from_json(counted)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 5), st.integers(-60, 60))
def test_pixel_metrics_do_not_depend_on_the_scale_of_the_map(seed, exponent):
    maps = blobs(seed, count=2, size=24)
    scaled = [(np.ldexp(values, exponent), mask) for values, mask in maps]
    assert measured(scaled).auroc() == measured(maps).auroc()
    assert measured(scaled).aupro() == pytest.approx(measured(maps).aupro(), rel=1e-12)


def test_negative_zero_is_zero():
    mask = np.array([[True, False]])
    assert measured([(np.array([[-0.0, 0.0]], np.float32), mask)]).auroc() == 0.5


def test_pixel_metrics_are_none_when_a_kind_of_pixel_is_missing():
    values = np.ones((4, 4), np.float32)
    assert PixelMetrics().auroc() is None
    assert measured([(values, np.zeros((4, 4), bool))]).aupro() is None
    assert measured([(values, np.ones((4, 4), bool))]).aupro() is None


def test_pixel_metrics_refuse_other_shapes_and_nan():
    with pytest.raises(ValueError, match="its mask"):
        count_pixels(np.zeros((4, 4), np.float32), np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="not numbers"):
        count_pixels(np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), bool))


def noisy(seed: int, count: int = 200) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores of a good and of a worse model, and an easy and a hard class."""
    random = np.random.default_rng(seed)
    labels = random.random(count) < 0.4
    classes = np.where(np.arange(count) % 4 == 0, "easy", "hard")
    scores = random.normal(size=count) + labels * np.where(classes == "easy", 4, 1)
    return labels, scores, scores + random.normal(size=count), classes


def test_bootstrap_differences_are_those_of_the_scores():
    labels, a, b, classes = noisy(0)
    found = paired_bootstrap(labels, a, b, classes, repetitions=100)
    per_class = [auroc(labels[images], b[images]) - auroc(labels[images], a[images])
                 for images in (classes == "easy", classes == "hard")]
    assert found.pooled.difference == pytest.approx(auroc(labels, b) - auroc(labels, a))
    assert found.mean.difference == pytest.approx(np.mean(per_class))
    assert {name: interval.difference for name, interval in found.per_class.items()} == pytest.approx(
        {"easy": per_class[0], "hard": per_class[1]})
    assert all(interval.low < interval.difference < interval.high
               for interval in (found.pooled, found.mean, *found.per_class.values()))


def test_bootstrap_is_the_distribution_of_plain_resampling():
    labels, a, b, _ = noisy(1)
    random = np.random.default_rng(5)
    good, anomalous = np.flatnonzero(~labels), np.flatnonzero(labels)
    drawn = [np.append(random.choice(good, len(good)), random.choice(anomalous, len(anomalous))) for _ in range(2000)]
    differences = [auroc(labels[images], b[images]) - auroc(labels[images], a[images]) for images in drawn]
    _, low, high = paired_bootstrap(labels, a, b, repetitions=2000).pooled
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.006)


def test_bootstrap_of_a_class_is_that_of_its_images_and_the_mean_is_over_the_same_draws():
    labels, a, b, classes = noisy(1, count=400)
    found = paired_bootstrap(labels, a, b, classes, repetitions=2000)
    for name, interval in found.per_class.items():
        images = classes == name
        alone = paired_bootstrap(labels[images], a[images], b[images], repetitions=2000, seed=1).pooled
        assert interval == pytest.approx(alone, abs=0.01)
    widths = [interval.high - interval.low for interval in found.per_class.values()]
    assert found.mean.high - found.mean.low == pytest.approx(np.hypot(*widths) / 2, rel=0.1)  # of independent classes


@given(labelled_scores())
def test_the_roc_curve_has_the_area_of_auroc_and_climbs_from_0_to_1(case):
    false, true = roc_curve(*case)
    assert np.sum(np.diff(false) * (true[1:] + true[:-1])) / 2 == pytest.approx(auroc(*case))
    for rate in (false, true):
        assert (rate[0], rate[-1]) == (0, 1)
        assert (np.diff(rate) >= 0).all()


def test_a_long_roc_curve_is_thinned_out_without_being_seen():
    random = np.random.default_rng(0)
    labels = random.random(10_000) < 0.3
    scores = random.normal(size=len(labels)) + labels
    false, true = roc_curve(labels, scores)
    assert len(false) <= 200
    assert np.sum(np.diff(false) * (true[1:] + true[:-1])) / 2 == pytest.approx(auroc(labels, scores), abs=1e-4)


def test_bootstrap_of_a_model_with_itself_is_zero_and_turns_sign_with_the_models():
    labels, a, b, classes = noisy(2)
    assert paired_bootstrap(labels, a, a, classes, repetitions=20).mean == (0, 0, 0)
    forth, back = (paired_bootstrap(labels, *scores, classes, repetitions=200).pooled for scores in ((a, b), (b, a)))
    assert forth == pytest.approx((-back.difference, -back.high, -back.low))


def test_bootstrap_depends_on_the_seed_and_widens_with_the_confidence():
    labels, a, b, classes = noisy(3)
    first = paired_bootstrap(labels, a, b, classes)
    assert paired_bootstrap(labels, a, b, classes) == first
    assert paired_bootstrap(labels, a, b, classes, seed=1) != first
    wide, narrow = first.mean, paired_bootstrap(labels, a, b, classes, confidence=0.5).mean
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_leaves_classes_with_one_label_out_of_the_mean():
    labels, a, b, classes = noisy(4)
    only_good = np.where(~labels & (np.arange(len(labels)) % 3 == 0), "good only", classes)
    images = only_good != "good only"
    expected = paired_bootstrap(labels[images], a[images], b[images], classes[images], repetitions=50).mean.difference
    assert paired_bootstrap(labels, a, b, only_good, repetitions=50).mean.difference == pytest.approx(expected)
    one_each = ["anomalous" if label else "good" for label in labels]
    for classes in (one_each, None):
        assert paired_bootstrap(labels, a, b, classes, repetitions=50)[1:] == (None, {})
