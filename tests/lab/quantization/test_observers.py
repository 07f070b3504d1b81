"""Each method against an independent implementation on the same values; properties for any values."""

import contextlib
import io
import pickle

import numpy as np
import onnx
import pytest
import torch
from graphs import images, small_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization import calibrate as calibrate_module
from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator
from scipy import stats
from torch.ao.quantization import MovingAverageMinMaxObserver

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.histogram import BINS, Histogram
from uadtool.lab.quantization.modules import ActivationQuantizer
from uadtool.lab.quantization.observers import METHODS, make_observer

BATCHES = st.lists(stn.arrays(np.float32, stn.array_shapes(max_dims=3, max_side=4),
                              elements=st.floats(-1e4, 1e4, width=16)), min_size=1, max_size=5)
"""Half-precision values: none is so small that float32 loses it beside the largest one."""


def distribution(name, count=200_000):
    random = np.random.default_rng(0)
    return {
        "normal": lambda: random.normal(1, 2, count),
        "relu": lambda: np.maximum(random.normal(size=count), 0),
        "laplace": lambda: random.laplace(size=count),
        "logistic": lambda: random.logistic(size=count),
        "student": lambda: random.standard_t(5, count),
        "relu of student": lambda: np.maximum(random.standard_t(3, count), 0),
        "positive": lambda: random.lognormal(size=count),
        "negative": lambda: -random.exponential(size=count),
        "outliers": lambda: np.append(random.triangular(-1, 0, 1, count), random.uniform(4, 8, 50)),
    }[name]().astype(np.float32)


def observed(method, batches, **options):
    observer = make_observer(method, **options)
    for batch in batches:
        values = torch.from_numpy(batch)
        assert observer(values) is values
    return observer


def chosen(method, values, **options):
    """The range for one image with all the values."""
    return observed(method, [values[None]], **options).range()


def quantization_error(values, minimum, maximum):
    """Root of the mean squared error of 256 codes over a range."""
    values = torch.from_numpy(values)
    return (ActivationQuantizer.from_range(minimum, maximum)(values) - values).double().square().mean().sqrt().item()


def bin_width(values):
    """At most that of a histogram of the values."""
    return 2 * np.abs(values).max() / BINS + 2 ** -30


# Histogram


@settings(max_examples=40)
@given(BATCHES)
def test_a_histogram_counts_every_value_in_its_bin(batches):
    histogram, largest = Histogram(), 0.0
    for batch in batches:
        largest = max(largest, np.abs(batch).max().item())
        histogram.add(torch.from_numpy(batch), largest)
    values = np.concatenate([batch.ravel() for batch in batches])
    expected, _ = np.histogram(values, histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert largest < histogram.limit <= max(2 * largest, 2 ** -20)


def test_a_histogram_does_not_saturate():
    """As float32 counts do at 2^24: torch.histc of zeros never gives more."""
    histogram = Histogram()
    for _ in range(2):
        histogram.add(torch.zeros(1, 2 ** 24), 0.0)
    assert histogram.counts.sum() == histogram.counts[BINS] == 2 ** 25


# All methods


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(batches=BATCHES)
def test_a_range_lies_within_what_was_observed(method, batches):
    minimum, maximum = observed(method, batches).range()
    values = np.concatenate([batch.ravel() for batch in batches])
    tolerance = 1e-6 * np.abs(values).max()  # an average is rounded
    assert values.min() - tolerance <= minimum <= maximum <= values.max() + tolerance


@pytest.mark.parametrize("method", METHODS)
def test_the_range_depends_neither_on_order_nor_on_batches(method):
    images = [(distribution("student", 500) * scale).reshape(5, 100) for scale in (0.01, 1, 30, 3)]  # it grows
    together = np.concatenate(images)
    expected = observed(method, [together]).range()
    for batches in (images, images[::-1], np.split(together[np.random.default_rng(0).permutation(20)], 20)):
        assert observed(method, batches).range() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 6.0, 1e-12, 1e30, -1e30])
def test_a_constant_is_its_own_range(method, value):
    for shape in ((1, 1), (2, 3, 4, 4)):
        minimum, maximum = observed(method, [np.full(shape, value, np.float32)]).range()
        assert minimum == pytest.approx(maximum) == pytest.approx(value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(method, value):
    with pytest.raises(UadtoolError, match="the model gives activations that are not finite; train it again"):
        observed(method, [np.ones((2, 3), np.float32), np.array([[0, 1], [value, 2]], np.float32)])


@pytest.mark.parametrize("method", METHODS)
def test_more_images_take_no_more_memory(method):
    values = distribution("relu", 1000)[None]

    def size(images):
        return len(pickle.dumps(observed(method, [values * index for index in range(images)])))

    assert size(64) <= size(2) + 16  # a larger number takes a few bytes more


@pytest.mark.parametrize("method", [method for method in METHODS if method != "minmax"])
def test_each_method_calibrates_a_detector(method):
    batches = images(4).split(2)
    ranges, widest = (calibrate(small_plan("tf_efficientnet_lite0"), batches, m, 99.0) for m in (method, "minmax"))
    assert ranges.keys() == widest.keys()
    assert all(widest[name][0] <= low <= high <= widest[name][1] for name, (low, high) in ranges.items())
    assert sum(ranges[name] != widest[name] for name in ranges) > len(ranges) / 2


# Against ONNX Runtime


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """ONNX Runtime's MinMaxCalibrater on the input of a ReLU: images -> (minimum, maximum)."""
    folder = tmp_path_factory.mktemp("reference")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["values"], ["result"])], "reference",
                                   [info("values", onnx.TensorProto.FLOAT, ["N", "C"])],
                                   [info("result", onnx.TensorProto.FLOAT, ["N", "C"])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8),
              str(folder / "model.onnx"))

    def extremes(images, **options):
        class Reader(CalibrationDataReader):
            batches = iter([{"values": image[None]} for image in images])

            def get_next(self):
                return next(self.batches, None)

        calibrator = create_calibrator(str(folder / "model.onnx"), ["Relu"], str(folder / "augmented.onnx"),
                                       CalibrationMethod.MinMax, extra_options=options)
        calibrator.collect_data(Reader())
        return [bound.item() for bound in calibrator.compute_data()["values"].range_value]

    return extremes


def collected(method, values, percentile=99.99, symmetric=False):
    """The range of ONNX Runtime's HistogramCollector, which prints, and the width of its bins."""
    with contextlib.redirect_stdout(io.StringIO()):
        collector = HistogramCollector(method, symmetric=symmetric, num_bins=2048, num_quantized_bins=256,
                                       percentile=percentile, scenario="same")
        collector.collect({"values": values})
        minimum, maximum = collector.compute_collection_result()["values"][:2]
    edges = collector.histogram_dict["values"][1]
    return (minimum.item(), maximum.item()), edges[1] - edges[0]


@pytest.mark.parametrize("name", ["normal", "relu", "negative"])
def test_minmax_and_moving_average_are_those_of_onnxruntime(reference, name):
    images = distribution(name, 80 * 50).reshape(80, 50)
    assert observed("minmax", images.reshape(8, 10, 50)).range() == tuple(reference(images))
    average = observed("moving-average", images.reshape(8, 10, 50)).range()
    assert average == pytest.approx(reference(images, moving_average=True), rel=1e-5)


@pytest.mark.parametrize(("name", "symmetric"), [
    ("normal", False), ("laplace", False), ("outliers", False), ("relu", True), ("relu of student", True),
    ("positive", True),
])
@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99])
def test_percentiles_are_those_of_onnxruntime(name, symmetric, percentile):
    values = distribution(name)[:-1]  # otherwise a whole number is left out, and rounding decides on the next
    found = chosen("percentile", values, percentile=percentile)
    (minimum, maximum), width = collected("percentile", values, percentile, symmetric)
    if symmetric:  # on magnitudes, and here none is negative
        minimum = values.min()
    # ours ends behind a bin, theirs before one
    np.testing.assert_allclose(found, (minimum, maximum), rtol=0, atol=width + bin_width(values))


@pytest.mark.parametrize("name", ["normal", "laplace", "logistic"])
def test_entropy_is_near_that_of_onnxruntime(monkeypatch, name):
    """Within a fifth: the minimum is flat. By their own measure our threshold is as good as the one they choose.

    Not so with heavier tails, where it matters that they give every empty bin a little, and what does not fill a level
    to the last one.
    """
    divergences, measure = [], calibrate_module.entropy
    monkeypatch.setattr(calibrate_module, "entropy", lambda p, q: divergences.append(measure(p, q)) or divergences[-1])
    values = distribution(name)
    theirs, width = collected("entropy", values)
    ours = chosen("entropy", values)
    assert ours[1] == pytest.approx(theirs[1], rel=0.2)
    bins = round(max(-ours[0], ours[1]) / width)
    assert divergences[0] > 1  # of 128 bins on either side, and then one more each time
    assert divergences[bins - 128] < min(divergences) + 0.001


# Moving average


@settings(max_examples=40)
@given(stn.arrays(np.float32, st.tuples(st.integers(101, 150), st.just(2)),
                  elements=st.floats(-100, 100, width=32)))
def test_after_100_images_the_average_is_that_of_torch(images):
    reference = MovingAverageMinMaxObserver(averaging_constant=0.01)
    reference.min_val, reference.max_val = (torch.tensor(bound.mean()) for bound in (images[:100].min(1),
                                                                                     images[:100].max(1)))
    for image in images[100:]:
        reference(torch.from_numpy(image))
    found = observed("moving-average", [images]).range()
    np.testing.assert_allclose(found, (reference.min_val, reference.max_val), rtol=1e-4, atol=1e-4)


# Percentile


@given(stn.arrays(np.float32, (1, 50), elements=st.floats(-1e4, 1e4, width=16)), st.floats(0.1, 100))
def test_a_percentile_range_holds_that_share_and_hardly_more(values, percentile):
    minimum, maximum = observed("percentile", [values], percentile=percentile).range()
    inside = (minimum <= values) & (values <= maximum)
    assert 100 * inside.mean() >= percentile - 1e-9
    width = bin_width(values)
    allowed = (100 - percentile) / (100 if values.min() >= 0 else 200) * values.size
    assert (values > maximum - width).sum() >= np.floor(allowed + 1e-9)
    if values.min() < 0:
        assert (values < minimum + width).sum() >= np.floor(allowed + 1e-9)


@given(BATCHES, st.lists(st.floats(0.1, 100), min_size=2, max_size=2).map(sorted))
def test_a_higher_percentile_gives_no_narrower_range(batches, percentiles):
    inner, outer = (observed("percentile", batches, percentile=p).range() for p in percentiles)
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]


@given(BATCHES)
def test_all_values_are_the_hundredth_percentile(batches):
    assert observed("percentile", batches, percentile=100).range() == observed("minmax", batches).range()


@pytest.mark.parametrize("percentile", [0, -1, 100.1, np.nan])
def test_a_percentile_out_of_bounds_is_refused(percentile):
    with pytest.raises(UadtoolError, match="the percentile must be above 0 and at most 100, not"):
        make_observer("percentile", percentile)


# Entropy


def divergence(counts, size):
    """Of the first ``size`` bins: step by step as the slides of GTC 2017 have it."""
    kept = counts[:size].astype(float)
    expected = kept.copy()
    expected[-1] += counts[size:].sum()
    bounds = np.arange(129) * size // 128
    evenly = np.add.reduceat(kept, bounds[:-1]) / np.maximum(np.add.reduceat(kept > 0, bounds[:-1], dtype=int), 1)
    found = np.where(kept > 0, np.repeat(evenly, np.diff(bounds)), 0)
    return stats.entropy(expected, found)  # which makes both sum to 1


@pytest.mark.parametrize("name", ["normal", "relu of student", "outliers"])
def test_entropy_has_the_least_divergence_of_all_thresholds(name):
    values = distribution(name, 20_000)
    width = 2 ** np.ceil(np.log2(np.abs(values).max())) / BINS
    counts, _ = np.histogram(np.abs(values[values != 0]), np.arange(BINS + 1) * width)
    sizes = range(128, np.flatnonzero(counts)[-1] + 2)
    divergences = [divergence(counts, size) for size in sizes]
    threshold = chosen("entropy", values)[1]
    found = round(threshold / width) if threshold < values.max() else sizes[-1]
    assert divergences[found - sizes[0]] == pytest.approx(min(divergences), abs=1e-3 * np.median(divergences))


def test_entropy_drops_outliers_and_takes_no_notice_of_zeros():
    values = distribution("outliers")
    assert chosen("entropy", values) == pytest.approx((-1, 1), abs=0.02)
    values = np.abs(values)
    minimum, maximum = chosen("entropy", values)
    assert minimum == values.min()
    assert chosen("entropy", np.append(values, np.zeros(10 * len(values), np.float32)))[1] == maximum


# Mean squared error


@pytest.mark.parametrize("name", ["normal", "relu", "laplace", "student", "relu of student", "positive", "negative",
                                  "outliers"])
def test_mse_is_that_of_a_search_over_all_ranges(name):
    values = distribution(name, 20_000)
    minimum, maximum = min(values.min().item(), 0), max(values.max().item(), 0)
    shares = np.linspace(0.025, 1, 40)
    least = min(quantization_error(values, low, high) for low in np.unique(minimum * shares)
                for high in np.unique(maximum * shares))
    assert quantization_error(values, *chosen("mse", values)) <= 1.01 * least


@settings(max_examples=40)
@given(BATCHES)
def test_mse_is_no_worse_than_minmax(batches):
    values = np.concatenate([batch.ravel() for batch in batches])
    mse, minmax = (quantization_error(values, *observed(method, batches).range()) for method in ("mse", "minmax"))
    assert mse <= minmax * (1 + 1e-4) + 3 * bin_width(values)  # inside of a bin it does not see


@pytest.mark.parametrize("name", ["normal", "laplace", "student", "relu of student", "positive"])
def test_mse_gains_where_there_are_tails(name):
    values = distribution(name)
    mse, minmax = (quantization_error(values, *chosen(method, values)) for method in ("mse", "minmax"))
    assert mse < 0.95 * minmax
