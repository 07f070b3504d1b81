"""A student that learns the features of the int8 teacher."""

import pytest
import timm
import torch

from uadtool.data.dataset import training_samples
from uadtool.data.splits import balanced, split_held_out
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import pooled_descriptor
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES, BiasCorrection
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import RangesFile
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantization.teacher import quantized_teacher
from uadtool.lab.quantize import Recipe, apply_recipe
from uadtool.lab.train import TrainingOptions, train
from uadtool.lab.training.data import read_images
from uadtool.metadata import Reading

TEACHER = "mobilenetv2_035"
SIZE = (64, 64)


@pytest.fixture(scope="module")
def samples(textures):
    return training_samples(str(textures))


@pytest.fixture(scope="module")
def images(samples):
    rest, _ = split_held_out(samples, 0.2, 0)
    return read_images(balanced(rest, CORRECTION_IMAGES, 0), Reading(SIZE), 1)


@pytest.fixture(scope="module")
def run(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(timm.create_model(TEACHER).state_dict(), folder / "teacher.pth")

    def run(**options):
        chosen = TrainingOptions(method="stfpm", teacher=TEACHER, teacher_weights=str(folder / "teacher.pth"),
                                 image_size=SIZE, steps=4, **options)
        return train(samples, chosen, folder / "checkpoint")

    return run


@pytest.fixture(scope="module")
def detector(run):
    return run().detector


@pytest.fixture(scope="module")
def ranges(detector, images):
    return calibrate(QuantizationPlan(detector), [images])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_teacher_is_rounded_as_in_the_quantized_detector(detector, ranges, images, target):
    teacher = quantized_teacher(detector, ranges, target, images).state_dict()
    plan = QuantizationPlan(detector)
    whole = quantize(plan, ranges, target, correction=BiasCorrection(plan, images)).state_dict()
    assert sum(name.endswith("weight_scale") for name in teacher) == len(
        [m for m in detector.teacher.modules() if isinstance(m, torch.nn.Conv2d)])
    for name, value in teacher.items():
        if name not in ("pixel_mean", "pixel_scale"):
            torch.testing.assert_close(value, whole[name])


def test_ranges_of_another_teacher_are_refused(detector, ranges, images):
    other = {name: pair for name, pair in ranges.items() if not name.startswith("teacher_blocks_1")}
    with pytest.raises(UadtoolError, match="lack 'teacher_blocks_1"):
        quantized_teacher(detector, other, TARGETS["onnxruntime"], images)
    deeper = {**ranges, "teacher_layer3_2_act1": (0.0, 1.0)}
    with pytest.raises(UadtoolError, match="another teacher, which has 'teacher_layer3_2_act1'; run calibrate"):
        quantized_teacher(detector, deeper, TARGETS["onnxruntime"], images)


def test_the_student_learns_the_rounded_features(run, ranges, monkeypatch):
    """Ranges that cut off nearly everything change the features, and what is learned, but not the file's teacher."""
    levels, fit = [], STFPM.fit

    def recording(detector, run):
        levels.append(pooled_descriptor(next(run.training.batches())[1]).abs().mean().item())
        return fit(detector, run)

    monkeypatch.setattr(STFPM, "fit", recording)
    narrow = {name: (low / 8, high / 8) for name, (low, high) in ranges.items()}
    float_run, rounded, clipped = run(), run(teacher_ranges=ranges), run(teacher_ranges=narrow)
    assert levels[1] == pytest.approx(levels[0], rel=0.05)
    assert levels[2] < 0.5 * levels[0]
    for other in (rounded, clipped):
        assert all(torch.equal(value, other.detector.teacher.state_dict()[name])
                   for name, value in float_run.detector.teacher.state_dict().items())
        assert any(not torch.equal(value, other.detector.student.state_dict()[name])
                   for name, value in float_run.detector.student.state_dict().items())
    assert float_run.metadata.provenance[0]["teacher_int8"] is None
    assert rounded.metadata.provenance[0]["teacher_int8"] == "onnxruntime"


@pytest.mark.parametrize(("recipe", "warning"), [
    ({}, "with every layer and with biases corrected, but here they are not corrected"),
    ({"target": "openvino"}, "in int8 for onnxruntime, but this is for openvino"),
    ({"keep_float": ["*.conv_stem"]}, "but here teacher.conv_stem stays float"),
])
def test_a_rounding_that_the_student_did_not_learn_is_reported(run, ranges, tmp_path, caplog, recipe, warning):
    result = run(teacher_ranges=ranges)
    file = RangesFile("sha256:0", "minmax", {"kind": "good"}, ranges, "test")
    apply_recipe(result.detector, result.metadata, "sha256:0", file, None, Recipe(**recipe), tmp_path / "checkpoint")
    assert warning in caplog.text


def test_the_command_line_refuses_ranges_of_another_teacher(uadtool, textures, calibrated, tmp_path, run):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    done = uadtool("train", "-q", textures, "--method", "stfpm", "--image-size", 64, "--teacher", "resnet18",
                   "--teacher-weights", tmp_path / "resnet18.pth", "--teacher-int8", calibrated.path,
                   "-o", tmp_path / "m.safetensors")
    assert done.returncode == 1
    assert "run calibrate again" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("m.*"))
