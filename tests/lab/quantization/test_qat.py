import copy
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from torch import nn

from uadtool.data.dataset import training_samples
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.qat import LearnedQuantizer, fine_tune, trainable, with_anomalies
from uadtool.lab.quantization.sensitivity import anomaly_maps, map_distance
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.training.data import read_images
from uadtool.metadata import Reading

SIZE = (64, 64)
TARGET = TARGETS["onnxruntime"]


@pytest.fixture(scope="module")
def samples(textures):
    return training_samples(str(textures))


@pytest.fixture(scope="module")
def images(samples):
    return read_images(samples[:8], Reading(SIZE), 1)


@pytest.fixture(scope="module")
def held_out(images):
    return [images, with_anomalies(images, np.random.default_rng(0))]


@pytest.fixture(scope="module")
def plan(images):
    """Of a student that nearly follows its teacher; int8 moves its maps far."""
    torch.manual_seed(0)
    detector = STFPM("mobilenetv2_035", SIZE, 1)
    detector.student.load_state_dict(detector.teacher.state_dict())
    detector.train()
    with torch.no_grad():
        detector(images)  # for the statistics of batch norm
        for weight in detector.student.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    detector.fold_batch_norm()
    with torch.no_grad():
        raw = detector(images).anomaly_map
    detector.score_mean.fill_(raw.mean())
    detector.score_std.fill_(raw.std())
    return QuantizationPlan(detector)


@pytest.fixture(scope="module")
def correction(plan, images):
    return BiasCorrection(plan, images)


@pytest.fixture(scope="module")
def ranges(plan, images):
    """Three times too wide, so that training can improve them."""
    return {name: (3 * low, 3 * high) for name, (low, high) in calibrate(plan, [images]).items()}


@pytest.fixture
def run(plan, ranges, samples, correction, held_out, tmp_path):
    """Fine-tune for a few steps."""
    def run(steps=8, target=TARGET, float_layers=(), resume=False, held_out=held_out):
        return fine_tune(plan, ranges, target, float_layers, samples, Reading(SIZE), held_out, correction, steps, 0,
                         tmp_path / "checkpoint", {"steps": steps, "ranges": ranges}, resume)

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(detector, network):
    return {name: value for name, value in detector.state_dict().items()
            if name.startswith(network) and name.endswith("weight")}


@pytest.fixture(scope="module")
def student_points(plan, ranges, images):
    """The points where other weights of the student give other values."""
    other = copy.deepcopy(plan.detector)
    with torch.no_grad():
        for weight in other.student.parameters():
            weight.mul_(0.1)
    return {name for name, pair in calibrate(QuantizationPlan(other), [images]).items()
            if pair != pytest.approx([bound / 3 for bound in ranges[name]])}


# What is trained


def test_training_computes_what_the_quantized_model_computes(plan, ranges, images):
    target = TARGETS["openvino"]  # which does not round biases
    expected = anomaly_maps(quantize(plan, ranges, target), [images])
    actual = anomaly_maps(trainable(plan, ranges, target, [], "student"), [images])
    assert map_distance(expected, actual) < 1e-3


def test_scales_are_learned_where_the_student_decides(plan, ranges, student_points):
    model = trainable(plan, ranges, TARGET, [], "student")
    learned = {name for name, point in model.points.items() if isinstance(point, LearnedQuantizer)}
    assert learned == student_points & model.points.keys()
    assert len(learned) > 30


def test_only_the_student_moves(plan, ranges, run, correction, student_points):
    before = copy.deepcopy(plan.detector.state_dict())
    tuned, learned = run()
    assert same(plan.detector.state_dict(), before)
    assert same(weights(tuned.detector, "teacher."), weights(plan.detector, "teacher."))
    for name, value in weights(tuned.detector, "student.").items():
        assert not torch.equal(value, before[name]), name
    start = quantize(plan, ranges, TARGET, correction=correction)
    end = quantize(tuned, learned, TARGET)
    for name, module in start.named_modules():
        if isinstance(module, QuantizedConv2d) and name.startswith("teacher."):
            assert same(module.state_dict(), end.get_submodule(name).state_dict())
    moved = {name for name in ranges if learned[name] != ranges[name]}
    assert moved
    assert moved <= student_points


def test_layers_outside_the_student_need_not_be_quantized(plan, run):
    tuned, _ = run(steps=2, float_layers=plan.layers_outside("student"))
    assert same(tuned.detector.teacher.state_dict(), plan.detector.teacher.state_dict())


# The result


@pytest.mark.parametrize("target", [pytest.param(target, marks=() if name == "onnxruntime" else pytest.mark.slow)
                                    for name, target in TARGETS.items()], ids=TARGETS)
def test_maps_come_closer_to_the_float_maps(plan, ranges, run, correction, held_out, target):
    expected = anomaly_maps(plan.traced, held_out)
    start = quantize(plan, ranges, target, correction=correction)
    before = map_distance(expected, anomaly_maps(start, held_out))
    after = map_distance(expected, anomaly_maps(quantize(*run(12, target), target), held_out))
    assert after < 0.9 * before


def test_the_start_is_kept_when_nothing_is_better(plan, ranges, run, correction, monkeypatch):
    for rate in ("LEARNING_RATE", "SCALE_LEARNING_RATE"):
        monkeypatch.setattr(f"uadtool.lab.quantization.qat.{rate}", 1.0)
    tuned, learned = run(steps=2)
    start, end = quantize(plan, ranges, TARGET, correction=correction), quantize(tuned, learned, TARGET)
    assert same(start.state_dict(), end.state_dict())


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, monkeypatch):
    expected, expected_ranges = run()
    calls = []

    def interrupting(images, generator):
        calls.append(len(images))
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return with_anomalies(images, generator)

    monkeypatch.setattr("uadtool.lab.quantization.qat.with_anomalies", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(UadtoolError, match="belongs to a run with steps 8, this run has 9"):
        run(steps=9, resume=True)
    tuned, ranges = run(resume=True)
    assert calls == [16] * 8
    assert ranges == expected_ranges
    assert same(tuned.detector.state_dict(), expected.detector.state_dict())


def test_every_other_image_gets_an_anomaly(images):
    changed = (with_anomalies(images, np.random.default_rng(0)) != images).flatten(1).any(1)
    assert changed.tolist() == [False, True] * (len(images) // 2)


# Learned scales


@given(values=stn.arrays(np.float32, st.integers(1, 20), elements=st.floats(-4, 4, width=32)),
       scale=st.floats(1 / 128, 0.1), low=st.floats(-2, 0), signed=st.booleans())
def test_gradients_are_those_of_lsq(values, scale, low, signed):
    quantizer = LearnedQuantizer.from_range(low, low + 255 * scale, signed)
    values = torch.from_numpy(values).requires_grad_()
    step, zero_point = quantizer.scale.item(), quantizer.zero_point.item()
    codes = torch.iinfo(quantizer.zero_point.dtype)
    ratio = values.detach().double() / step
    distance = (ratio - ratio.floor() - 0.5).abs()
    upstream = torch.linspace(1, 2, len(values)) * (distance > 1e-3)  # at a tie either neighbour will do
    (quantizer(values) * upstream).sum().backward()
    least, most = codes.min - zero_point, codes.max - zero_point
    rounded = ratio.round()
    inside = (rounded >= least) & (rounded <= most)
    of_scale = torch.where(inside, rounded - ratio, rounded.clamp(least, most))  # equation 3
    torch.testing.assert_close(values.grad, upstream * inside)
    np.testing.assert_allclose(quantizer.change.grad.item(), step * (upstream * of_scale).sum().item(), atol=1e-4)


def test_no_scale_grows_beyond_a_relu6(plan, ranges):
    """ONNX Runtime would compute the convolution before it in float."""
    limits = plan.limits()
    assert len(limits) > 30
    full = {name: (0.0, 6.0) if name in limits else pair for name, pair in ranges.items()}
    model = trainable(plan, full, TARGET, [], "student")
    for point in model.points.values():
        if isinstance(point, LearnedQuantizer):
            nn.init.constant_(point.change, 0.1)
    ends = {name: point.range()[1] for name, point in model.points.items() if isinstance(point, LearnedQuantizer)}
    assert max(ends[name] for name in limits if name in ends) == pytest.approx(6)
    assert all(ends[name] > 1.1 * full[name][1] for name in ends if name not in limits)


@given(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)).map(sorted), st.floats(-3, 3), st.booleans())
def test_learned_ranges_give_back_the_very_scale(bounds, change, signed):
    learned = LearnedQuantizer.from_range(*bounds, signed)
    nn.init.constant_(learned.change, change)
    quantizer = ActivationQuantizer.from_range(*learned.range(), signed)
    assert quantizer.zero_point == learned.zero_point
    values = torch.linspace(-2e3, 2e3, 99)
    assert torch.equal(quantizer(values), learned(values))
