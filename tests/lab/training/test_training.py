import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from uadtool import host
from uadtool.cli.main import cli
from uadtool.data.dataset import training_samples
from uadtool.data.images import ImageError
from uadtool.data.samples import Sample
from uadtool.data.splits import split_held_out
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.lab import train as training
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER, build_backbone, fold_batch_norm
from uadtool.lab.detectors.contract import Detector, pooled_descriptor
from uadtool.lab.detectors.prototypes import FARTHER, LEAST_FAR, fit_prototypes
from uadtool.lab.detectors.registry import find_method
from uadtool.lab.detectors.statistics import LEAST_UNIT, _units, class_statistics, fit_statistics
from uadtool.lab.detectors.stfpm import distillation_loss
from uadtool.lab.detectors.weights import load_teacher_weights
from uadtool.lab.models import load_model, save_model
from uadtool.lab.train import TrainingOptions, train
from uadtool.lab.training import data, loop, precision
from uadtool.lab.training.data import TeacherFeatures
from uadtool.lab.training.loop import Run, batch_indices, steps_per_epoch
from uadtool.lab.training.precision import choose_device, large_depthwise_float
from uadtool.metadata import Reading
from uadtool.progress import Progress
from uadtool.scoring.thresholds import threshold_at

TEACHER = "mobilenetv2_035"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a tiny teacher."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(timm.create_model(TEACHER).state_dict(), file)
    return str(file)


@pytest.fixture
def run(weights, tmp_path):
    """Train for a few steps with the tiny teacher."""
    def run(samples, resume=False, **options):
        chosen = {"method": "stfpm", "teacher": TEACHER, "teacher_weights": weights, "image_size": (64, 64), "steps": 3}
        return train(samples, TrainingOptions(**{**chosen, **options}), tmp_path / "checkpoint", resume)

    return run


@pytest.fixture(scope="module")
def samples(textures):
    return training_samples(str(textures))


def networks(result):
    """All weights, without class statistics."""
    state = result.detector.state_dict()
    return {name: state[name] for name in state if name.startswith(("teacher.", "student."))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_student_learns(trained, samples, run):
    default = {"teacher": "tf_efficientnet_lite0", "teacher_weights": None}
    untrained = run(samples, steps=1, **default)
    assert trained.record["held_out_loss"] < 0.8 * untrained.report["held_out_loss"]


def test_the_teacher_stays_as_it_was(run, samples, weights):
    teacher = build_backbone(TEACHER, (64, 64)).eval()
    load_teacher_weights(teacher, TEACHER, weights)
    expected = fold_batch_norm(teacher).state_dict()
    assert same(run(samples).detector.teacher.state_dict(), expected)


def test_a_seed_decides_the_file(run, samples, tmp_path):
    digests = []
    for seed in (7, 7, 8):
        result = run(samples, seed=seed)
        save_model(result.detector, result.metadata, tmp_path / "model.safetensors")
        digests.append(file_digest(tmp_path / "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_the_file_records_how_it_was_made(run, samples):
    result = run(samples, held_out=0.5, seed=3, method_options={"fusion": "product"}, false_positive_rate=0.25)
    metadata = result.metadata
    assert (metadata.classes, metadata.image_size, metadata.map_size) == (["dots", "stripes"], (64, 64), (16, 16))
    assert (metadata.precision, metadata.target) == ("fp32", None)
    assert metadata.options == {"fusion": "product", "dcam": False, "shared_stages": 0}
    for found in result.report["classes"].values():
        assert 0 <= found.pop("recognised") <= 10  # of a teacher with random weights
    counts = {"training": 10, "held_out": 10, "copies": 0}
    assert result.report["classes"] == dict.fromkeys(metadata.classes, counts)
    (step,) = metadata.provenance
    assert (step["command"], step["steps"], step["seed"], step["held_out"]) == ("train", 3, 3, 0.5)
    assert step["teacher_weights"] == "teacher.pth"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_threshold_are_those_of_the_deployed_detector(run, samples, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(training, "autocast_dtype", lambda device: dtype)
    result = run(samples, held_out=0.5, false_positive_rate=0.1)
    save_model(result.detector, result.metadata, tmp_path / "model.safetensors")
    detector, metadata = load_model(tmp_path / "model.safetensors")
    _, held_out = split_held_out(samples, 0.5, 0)
    images = data.read_images(held_out, Reading((64, 64)), 1)
    owners = [metadata.classes.index(sample.class_name) for sample in held_out]
    with torch.inference_mode():
        raw, nearest = detector.raw_maps_and_class(images)
    assert 5 < (nearest == torch.tensor(owners)).sum() < 20  # some are taken for the other class

    def patches(index, but=None):
        """The maps of the class's images that are recognised, except one: [M, h, w, all values of a position]."""
        maps = raw[[place for place, owner in enumerate(owners) if owner == index == nearest[place] and place != but]]
        return maps.unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(3).double()

    def statistics(values, left_out=0):
        """Of these maps; if one is left out, as expected of all: their variance about their own mean is smaller."""
        images = values.unflatten(3, (-1, 4))
        count, mean = images.shape[3] + left_out, values.mean(3)
        between = images.mean(4).var(3, correction=0) * ((count - 1)**2 / (count * (count - 2)) if left_out else 1)
        variance, level = images.var(4, correction=0).mean(3) + between, mean.mean((1, 2), keepdim=True)
        return (count * mean + 4 * level) / (count + 4), ((variance + variance.mean((1, 2), keepdim=True)) / 2).sqrt()

    def enlarge(grid):
        return nn.functional.interpolate(grid[None], size=metadata.map_size, mode="bilinear")[0]

    def standardised(place):
        """Standardised with the other images of the nearest class."""
        expected, spread = statistics(patches(nearest[place], but=place), int(owners[place] == nearest[place]))
        return (raw[place] - enlarge(expected)) / enlarge(spread)

    maps = torch.stack([standardised(place) for place in range(len(owners))]).numpy()
    units = [np.quantile(maps[:, index].max((1, 2)), 0.9) - np.median(maps[:, index]) for index in range(3)]
    for index in range(2):
        expected, spread = statistics(patches(index))
        torch.testing.assert_close(detector.expected_maps[index].double(), expected, rtol=1e-3, atol=1e-4)
        found = (detector.map_spreads[index] / spread).numpy()
        np.testing.assert_allclose(found, np.broadcast_to(np.reshape(units, (3, 1, 1)), found.shape), rtol=0.02)
    weighed = (maps / np.reshape(units, (3, 1, 1))).sum(1)
    count = round(0.01 * weighed[0].size)
    scores = np.sort(weighed.reshape(len(weighed), -1))[:, -count:].mean(1)
    expected = class_statistics([[score for score, owner, found in zip(scores, owners, nearest)
                                  if owner == found == index] for index in range(2)])
    for index, (mean, std) in enumerate(expected):
        assert detector.score_mean[index].item() == pytest.approx(mean, rel=0.02)
        assert detector.score_std[index].item() == pytest.approx(std, rel=0.05)
    normalised = [(score - expected[found].mean) / expected[found].std for score, found in zip(scores, nearest)]
    assert metadata.threshold == pytest.approx(threshold_at(normalised, 0.1), abs=0.05)


def test_prototypes_are_the_mean_descriptors_of_the_training_images(run, samples, monkeypatch):
    monkeypatch.setattr(training, "autocast_dtype", lambda device: torch.float32)
    detector = run(samples).detector
    rest, _ = split_held_out(samples, 0.2, 0)
    for prototype, name in zip(detector.prototypes, ("dots", "stripes")):
        images = data.read_images([sample for sample in rest if sample.class_name == name], Reading((64, 64)), 1)
        with torch.inference_mode():
            descriptors = pooled_descriptor(detector.teacher(detector.normalize(images)))
        torch.testing.assert_close(prototype, descriptors.mean(0), rtol=1e-3, atol=1e-3)


class Described(Detector):
    """A detector with known descriptors of the images in order."""

    def __init__(self, descriptors, classes=2, map_size=(8, 8)):
        super().__init__(classes, descriptors.shape[1], map_size, [0.5] * 3, [0.5] * 3)
        self.all_descriptors = iter(descriptors.split(32))

    def fit(self, run):
        raise NotImplementedError

    def raw_maps(self, pixels, features, nearest):
        raise NotImplementedError

    def features(self, pixels):
        return [next(self.all_descriptors)[:, :, None, None]]


def test_a_channel_that_is_dead_on_training_images_does_not_drown_the_others(samples):
    """A channel after a ReLU may be activated only by other images."""
    descriptors = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    descriptors[:, 3] = 0
    descriptors[20:, 0] += 10
    detector = Described(descriptors)
    images = TeacherFeatures(samples, Reading((64, 64)), lambda images: [], 1)
    fit_prototypes(detector, ["dots", "stripes"], SimpleNamespace(training=images, seed=0))
    awake = torch.cat([descriptors[:, :3], torch.full((40, 1), 0.2)], dim=1)
    assert torch.equal(detector.nearest_class(awake), torch.tensor([0] * 20 + [1] * 20))


@pytest.mark.parametrize(("count", "most"), [(4, 0.1), (10, 0.01), (20, 0.002)])
def test_images_of_known_classes_are_within_the_limit_and_others_beyond(samples, count, most):
    """Two classes of 30 channels; the second varies twice as much, and an unknown class lies 20 spreads off."""
    training = TeacherFeatures([*samples[:count], *samples[20:20 + count]], Reading((64, 64)), lambda images: [], 1)
    shares = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        centres = torch.randn(3, 1, 30, generator=random) * 20 / 60 ** 0.5
        images = centres + torch.tensor([0.5, 1, 1])[:, None, None] * torch.randn(3, count + 100, 30, generator=random)
        detector = Described(images[:2, :count].flatten(0, 1))
        limit, _ = fit_prototypes(detector, ["dots", "stripes"], SimpleNamespace(training=training, seed=0))
        assert limit >= LEAST_FAR
        new = images[:, count:].flatten(0, 1)
        beyond = (detector.class_distance(new, detector.nearest_class(new)) > limit).float()
        shares.append((beyond[:200].mean(), beyond[200:].mean()))
    known, unknown = np.mean(shares, axis=0)
    assert known < most
    assert unknown > 0.95


def test_distances_are_those_to_the_mean_of_the_other_images(samples):
    descriptors = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    descriptors[20:] += 4
    descriptors[3] *= 20  # far from its class
    detector = Described(descriptors)
    limit, good = fit_prototypes(detector, ["dots", "stripes"], SimpleNamespace(
        training=TeacherFeatures(samples, Reading((64, 64)), lambda images: [], 1), seed=0))
    distances = [[((members[place] - torch.cat([members[:place], members[place + 1:]]).mean(0))
                   * detector.descriptor_scale).norm().item() for place in range(20)]
                 for members in descriptors.split(20)]
    expected = class_statistics(distances)
    np.testing.assert_allclose(torch.stack([detector.distance_mean, detector.distance_std], 1), expected, rtol=1e-4)
    assert limit == pytest.approx(FARTHER * (distances[0][3] - expected[0].mean) / expected[0].std, rel=1e-4)
    for name, own, (mean, std) in zip(("dots", "stripes"), distances, expected):
        assert good[name] == pytest.approx(sorted((distance - mean) / std for distance in own), rel=1e-3, abs=1e-4)


def test_the_weights_of_the_lowest_held_out_loss_are_kept(run, samples, monkeypatch):
    monkeypatch.setattr(training, "autocast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(loop, "_schedule", lambda step, steps: 0.1 if step < 6 else -1)  # uphill
    result = run(samples, steps=8)
    assert 0 < result.report["best_step"] <= 6
    images = result.detector.normalize(data.read_images(split_held_out(samples, 0.2, 0)[1], Reading((64, 64)), 1))
    with torch.inference_mode():
        loss = distillation_loss(result.detector.teacher(images), result.detector.student(images))
    assert loss.item() == pytest.approx(result.report["held_out_loss"], rel=1e-3)


def test_a_training_that_diverges_ends(run, samples, monkeypatch):
    monkeypatch.setattr(loop, "_schedule", lambda step, steps: 1.0 if step < 2 else float("inf"))
    with pytest.raises(UadtoolError, match="the training diverged: at step 3 the loss is nan"):
        run(samples, steps=8)


def test_held_out_images_choose_the_checkpoint_only(run, textures, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVALUATIONS", 1)  # at the end, so there is nothing to choose
    shutil.copytree(textures, tmp_path / "data")
    samples = training_samples(str(tmp_path / "data"))
    rest, held_out = split_held_out(samples, 0.2, 0)
    before = run(samples, epochs=1, steps=None)
    random = np.random.default_rng(1)
    for sample in held_out:
        Image.fromarray(random.integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(sample.path)
    after = run(samples, epochs=1, steps=None)
    assert same(networks(before), networks(after))
    assert before.metadata.threshold != after.metadata.threshold
    Image.fromarray(random.integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(rest[0].path)
    assert not same(networks(before), networks(run(samples, epochs=1, steps=None)))


def test_the_networks_do_not_depend_on_the_classes(run, samples, monkeypatch):
    paths = {sample.path for sample in split_held_out(samples, 0.2, 0)[1]}
    monkeypatch.setattr(training, "split_held_out", lambda samples, *_: (
        [s for s in samples if s.path not in paths], [s for s in samples if s.path in paths]))
    other = {"dots": "stripes", "stripes": "dots"}
    renamed = [Sample(sample.path, other[sample.class_name], sample.label) for sample in samples]
    one, two = run(samples), run(renamed)
    assert same(networks(one), networks(two))
    assert torch.equal(one.detector.score_mean, two.detector.score_mean.flip(0))


def test_classes_that_are_taken_for_each_other_are_named(run, samples, caplog):
    # Every other image of the dots is called spots.
    alike = [replace(s, class_name="spots") if s.class_name == "dots" and number % 2 else s
             for number, s in enumerate(samples)]
    result = run(alike, steps=2, held_out=0.5)
    classes = result.report["classes"]
    confused = [classes[name]["held_out"] - classes[name]["recognised"] for name in ("dots", "spots")]
    assert sum(confused) > 0
    found = re.search(r"(\d+) of 10 held-out images of dots and spots are taken for the other of the two", caplog.text)
    assert 0 < int(found[1]) <= sum(confused)


def test_a_defect_among_the_held_out_images_is_named(run, samples, caplog, tmp_path):
    options = {"method": "memory", "steps": None, "held_out": 0.5, "teacher": DEFAULT_TEACHER, "teacher_weights": None,
               "method_options": {"entries": "200"}}
    assert run(samples, **options).report["conspicuous"] == []
    assert "score far above" not in caplog.text
    place = samples.index(split_held_out(samples, 0.5, 0)[1][0])
    pixels = np.array(Image.open(samples[place].path))
    pixels[20:52, 20:52] = np.random.default_rng(0).integers(0, 2, (32, 32, 1)) * 255
    Image.fromarray(pixels).save(tmp_path / "defect.png")
    defect = replace(samples[place], path=str(tmp_path / "defect.png"))
    found = run([*samples[:place], defect, *samples[place + 1:]], **options)
    assert found.report["conspicuous"] == [defect.path]
    assert f"held-out images that score far above the others of their class: {defect.path}; if they are" in caplog.text


@pytest.mark.parametrize("counts", [{"dots": 5}, {"dots": 1, "stripes": 6}, {"dots": 1, "stripes": 1}, {"dots": 1}])
def test_few_images_are_enough(run, samples, counts, caplog):
    chosen = [s for name, count in counts.items() for s in [s for s in samples if s.class_name == name][:count]]
    result = run(chosen, steps=2)
    assert result.metadata.classes == sorted(counts)
    for name, count in counts.items():
        found = result.report["classes"][name]
        held_out = {1: 1, 5: 2, 6: 3}[count]
        assert 0 <= found.pop("recognised") <= held_out
        assert found == {"training": max(1, count - held_out), "held_out": held_out, "copies": 0}
    few = ", ".join(sorted(name for name, count in counts.items() if count < 6))
    assert f"too few good images to learn what is normal: {few};" in caplog.text
    assert all(tensor.isfinite().all() for tensor in result.detector.state_dict().values())
    assert (result.detector.score_std > 0).all()
    json.loads(result.metadata.to_json())


def test_classes_that_differ_only_in_case_cost_a_warning(run, samples, caplog):
    renamed = [replace(sample, class_name={"dots": "Bolt", "stripes": "BOLT"}[sample.class_name]) for sample in samples]
    assert run(renamed, steps=1).metadata.classes == ["BOLT", "Bolt"]
    assert "differ only in case are trained as separate classes: BOLT and Bolt" in caplog.text


def test_identical_images_leave_finite_scores(run, samples, tmp_path):
    paths = [str(shutil.copy(samples[0].path, tmp_path / f"{index}.png")) for index in range(10)]
    result = run([Sample(path, name, "good") for name, part in (("a", paths[:5]), ("b", paths[5:])) for path in part])
    assert (result.detector.score_std > 0).all()
    assert np.isfinite(result.metadata.threshold)


def test_an_image_that_cannot_be_read_stops_training(run, samples, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError, match=r"broken\.png"):
        run([*samples[:10], Sample(str(tmp_path / "broken.png"), "dots", "good")])


# Interruption


def command(textures, weights, output, *options):
    return [sys.executable, "-m", "uadtool", "train", str(textures), "-o", str(output), "--image-size", "64",
            "--method", "stfpm", "--steps", "60", "--teacher", TEACHER, "--teacher-weights", weights, *options]


@pytest.fixture(scope="module")
def interrupted(textures, weights, tmp_path_factory):
    """The output of a run that SIGINT ended after some steps, with its checkpoint, and the messages."""
    output = tmp_path_factory.mktemp("interrupted") / "model.safetensors"
    checkpoint = Path(f"{output}.checkpoint")
    with subprocess.Popen(command(textures, weights, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert checkpoint.exists()
    assert not output.exists()
    return output, stderr


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_result(interrupted, preloaded, textures, weights, tmp_path):
    output, stderr = interrupted
    assert f"--resume continues from {output}.checkpoint" in stderr
    assert stderr.endswith("uadtool: interrupted\n")
    shutil.copy(f"{output}.checkpoint", tmp_path / "resumed.checkpoint")
    def uadtool(*words):
        return subprocess.run([preloaded, *words], capture_output=True, text=True)

    resumed = uadtool(*command(textures, weights, tmp_path / "resumed")[3:], "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert not (tmp_path / "resumed.checkpoint").exists()
    whole = uadtool(*command(textures, weights, tmp_path / "whole")[3:])
    assert whole.returncode == 0, whole.stderr
    assert same(load_file(tmp_path / "resumed"), load_file(tmp_path / "whole"))
    assert file_digest(tmp_path / "resumed") == file_digest(tmp_path / "whole")
    assert json.loads(resumed.stdout)["held_out_loss"] == json.loads(whole.stdout)["held_out_loss"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 1}, "belongs to a run with seed 0, this run has 1; use the same, or start anew without --resume"),
    ({"method_options": {"fusion": "product"}}, "belongs to a run with option fusion 'sum', this run has 'product'"),
    ({"steps": 61}, "belongs to a run with steps 60, this run has 61"),
    ({"images": slice(39)}, "belongs to a run with image count 40, this run has 39"),
    ({"images": slice(None, None, -1)}, "belongs to a run with other images: some have been added, removed or renamed"),
])
def test_a_checkpoint_of_another_run_is_refused(interrupted, run, samples, tmp_path, changes, message):
    output, _ = interrupted
    shutil.copy(f"{output}.checkpoint", tmp_path / "checkpoint")
    options = {"steps": 60, **changes}
    with pytest.raises(UadtoolError, match=message):
        run(samples[options.pop("images", slice(40))], resume=True, **options)
    assert (tmp_path / "checkpoint").exists()


def test_other_weights_of_the_teacher_make_another_run(run, samples, weights, tmp_path):
    run(samples)
    other = {name: value + 1 if name.endswith("bias") else value for name, value in torch.load(weights).items()}
    torch.save(other, tmp_path / "teacher.pth")  # which has the same name
    with pytest.raises(UadtoolError, match=r"belongs to a run with teacher_weights 'sha256:.*', this run has 'sha256:"):
        run(samples, resume=True, teacher_weights=str(tmp_path / "teacher.pth"))


def test_without_resume_a_run_starts_anew(run, samples, tmp_path):
    (tmp_path / "checkpoint").write_text("of no use")
    result = run(samples)
    assert same(networks(result), networks(run(samples, resume=True)))  # from its end, as the model was not saved
    (tmp_path / "checkpoint").unlink()
    assert same(networks(result), networks(run(samples, resume=True)))  # nothing to resume from
    (tmp_path / "checkpoint").write_text("of no use")
    with pytest.raises(UadtoolError, match=r"is not a checkpoint of uadtool: .*; remove it to start anew"):
        run(samples, resume=True)


# The parts


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_an_epoch_shows_no_image_twice(total, seed, epoch):
    per_epoch = steps_per_epoch(total)
    batches = [batch_indices(total, epoch * per_epoch + place, seed) for place in range(per_epoch)]
    assert {len(batch) for batch in batches} == {min(loop.BATCH_SIZE, total)}
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) > total - loop.BATCH_SIZE
    assert set(seen) <= set(range(total))


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = {tuple(batch_indices(16, epoch, seed)) for epoch in range(10) for seed in range(10)}
    assert len(orders) == 100


SCORES = st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), min_size=1, max_size=5)


@given(SCORES)
def test_statistics_of_a_class(scores):
    statistics = class_statistics(scores)
    spreads = [np.std(values, ddof=1) for values in scores if len(values) > 1]
    assert len(statistics) == len(scores)
    for (mean, std), values in zip(statistics, scores):
        assert mean == pytest.approx(np.mean(values))
        assert std > 0
        if len(values) > 1:  # drawn towards the usual spread, which lies between the extremes
            own = np.std(values, ddof=1)
            highest = max(*spreads, own)
            assert min(*spreads, own) - 1e-9 <= std <= (highest if highest > 0.1 else 1) + 1e-9
    lone = [std for (_, std), values in zip(statistics, scores) if len(values) == 1]
    assert np.allclose(lone, lone[:1] * len(lone))  # a single image has no spread, so its class gets the usual one


@given(SCORES, st.floats(0.1, 10))
def test_statistics_scale_with_the_scores(scores, factor):
    scaled = class_statistics([[factor * value for value in values] for values in scores])
    for one, other in zip(class_statistics(scores), scaled):
        assert other.mean == pytest.approx(factor * one.mean)
        if one.std > 0.1 < other.std and any(min(1, factor) * np.std(values) > 0.1 for values in scores):
            assert other.std == pytest.approx(factor * one.std, rel=1e-6)


def test_identical_images_determine_no_spread():
    """Neither does a single one. Copies score the same but for rounding, which must not be taken for their spread."""
    for scores in ([[1.0]], [[1.0, 1.0, 1.001]], [[1.0, 1.0], [3.0]]):
        assert all(0.5 < statistics.std <= 1 for statistics in class_statistics(scores))
    alone, among_others = (class_statistics(scores)[0].std for scores in ([[1.0] * 3], [[1.0] * 3, [1.0, 1.2, 1.4]]))
    assert among_others < 0.3 < alone


def test_a_map_that_is_constant_on_good_images_does_not_drown_the_others():
    """The map of duet's head in int8 may be such: one code stands for all good patches."""
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 2, 8, 8)))
    maps[:, 1] = 0
    usual, constant = _units(maps, torch.ones(maps[:, 0].shape) > 0).flatten().tolist()
    assert 1 < usual < 4
    assert constant == LEAST_UNIT


@pytest.mark.parametrize("side", [16, 17])
def test_the_last_row_of_a_map_is_expected_as_the_others_are(samples, side):
    """If the grid of patches omitted it, the usual values at a rim would count as anomalous."""
    random = np.random.default_rng(0)
    detector = Described(torch.zeros(1, 4), classes=1, map_size=(side, side))
    maps = torch.from_numpy(random.normal(1, 0.05, (40, 1, side, side)).astype(np.float32))
    maps[:, :, -1] += 1
    held_out = [([replace(samples[0], class_name="a")] * 20, maps[:20])]
    fit_statistics(detector, lambda images: (images, torch.zeros(len(images), dtype=torch.int64)), ["a"], held_out)
    found = detector.standardize_maps(maps[20:], torch.zeros(20, dtype=torch.int64))[:, 0]
    assert found[:, -1].mean() < 6 * found[:, :-2].std()


def test_many_images_outweigh_what_is_usual():
    random = np.random.default_rng(0)
    narrow, wide = random.normal(1, 0.05, 2000), random.normal(1, 0.2, 2000)
    found = [statistics.std for statistics in class_statistics([narrow, wide, narrow[:3]])]
    assert found[0] == pytest.approx(narrow.std(), rel=0.05)
    assert found[1] == pytest.approx(wide.std(), rel=0.05)
    assert narrow[:3].std(ddof=1) < found[2] < 0.2


def test_images_that_do_not_fit_into_memory_give_the_same_batches(samples, monkeypatch):
    network = build_backbone(TEACHER, (64, 64)).eval()

    @torch.no_grad()
    def teacher(images):
        return network(images.permute(0, 3, 1, 2).float() / 255)

    cached, streamed = (TeacherFeatures(samples, Reading((64, 64)), teacher, 1) for _ in range(2))
    cached.hold(features=True)
    monkeypatch.setattr(data, "read_images", counted := Counted(data.read_images))
    assert len(cached) == len(streamed) == 40
    batches = [*zip(cached.batches(), streamed.batches()), (cached.batch([39, 0, 7]), streamed.batch([39, 0, 7]))]
    assert [len(one[0]) for one, _ in batches] == [32, 8, 3]
    for (images, features), (same_images, same_features) in batches:
        assert torch.equal(images, same_images)
        for one, other in zip(features, same_features):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert counted.calls == len(batches)


@pytest.mark.parametrize(("options", "said", "held"), [
    ({}, "3 steps; pixels and features take", 4),
    ({"method": "duet", "method_options": {"entries": "9"}}, "3 steps; pixels take", 1),
    ({"method": "memory", "steps": None}, "one pass, and no image stays in memory", 0),
])
def test_a_training_says_what_it_will_hold(run, samples, monkeypatch, caplog, options, said, held):
    caplog.set_level("INFO", "uadtool")
    fit, parts = find_method(options.get("method", "stfpm")).fit, []
    monkeypatch.setattr(find_method(options.get("method", "stfpm")), "fit", lambda detector, run: (
        parts.extend([run.training, run.held_out]), fit(detector, run))[1])
    run(samples, **options)
    line, = (message for message in caplog.messages if "to train on" in message)
    assert line.startswith(f"32 images to train on, 8 held out{';' if not held else ','} {said}")
    assert [len(part.held) for part in parts] == [held, held]
    size = sum(tensor.untyped_storage().nbytes() for part in parts for tensor in part.held)
    assert float((re.findall(r"take ([\d.]+) MB of memory$", line) or ["0"])[0]) == round(size / 1e6, 1)


def test_what_does_not_fit_into_memory_is_not_held(run, samples, monkeypatch, caplog):
    caplog.set_level("INFO", "uadtool")
    monkeypatch.setattr(data, "MEMORY_SHARE", 0)
    monkeypatch.setattr(TeacherFeatures, "hold", None)
    run(samples)
    assert "too much of the memory, and are computed anew for each step" in caplog.text


def test_a_batch_of_large_images_is_learned_in_parts(samples, monkeypatch, tmp_path):
    """Their gradients and losses add up to those of the batch."""
    torch.manual_seed(0)
    teacher, student = (nn.Conv2d(3, 4, 8, stride=8) for _ in range(2))

    def pixels(images):
        return images.permute(0, 3, 1, 2) / 255

    def trained(in_parts):
        monkeypatch.setattr(loop, "at_once", lambda most, image_size: 5 if in_parts else most)
        sets = (TeacherFeatures(part, Reading((64, 64)), lambda images: [teacher(pixels(images)).detach()], 1)
                for part in (samples[:32], samples[32:]))
        run = Run(*sets, 3, 0, torch.device("cpu"), torch.float32, tmp_path / "checkpoint", {}, False)
        model, sizes = copy.deepcopy(student), []

        def loss(images, features):
            sizes.append(len(images))
            return nn.functional.mse_loss(model(pixels(images)), features[0])

        outcome = run.distill(model, torch.optim.SGD(model.parameters(), 0.5, 0.9), loss)
        return model.state_dict(), outcome.held_out_loss, sizes[:4]

    (whole, *_, sizes), (parts, *_, sizes_of_parts) = results = trained(False), trained(True)
    assert (sizes, sizes_of_parts) == ([16, 8, 16, 8], [5, 5, 5, 1])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1])


def test_large_images_pass_through_a_network_in_small_numbers():
    assert [len(part) for part in data.chunks(70, (256, 256))] == [32, 32, 6]
    assert [len(part) for part in data.chunks(20, (512, 512))] == [8, 8, 4]
    assert [len(part) for part in data.chunks(2, (4096, 4096))] == [1, 1]


@pytest.mark.parametrize(("method", "tasks"), [
    ("stfpm", ["teacher features"] * 2 + ["training", "prototypes"]),
    ("us", ["teacher features"] * 2 + ["principal components", "training", "prototypes"]),
    ("duet", ["images"] * 2 + ["feature statistics", "held-out anomalies", "training", "memories"]),
])
def test_every_pass_over_the_images_shows_its_progress(run, samples, monkeypatch, method, tasks):
    """To its end: a training is at 100 % once the last checkpoint is written."""
    events, enter, update, save = [], Progress.__enter__, Progress.update, loop.save_checkpoint
    monkeypatch.setattr(Progress, "__enter__", lambda self: (events.append(self), enter(self))[1])
    monkeypatch.setattr(Progress, "update", lambda self, *rest, **note: (
        update(self, *rest, **note), events.append((self.task, self.count)))[0])
    monkeypatch.setattr(loop, "save_checkpoint", lambda *rest: (events.append("saved"), save(*rest)))
    run(samples, method=method)
    shown = [event for event in events if isinstance(event, Progress)]
    assert [progress.task for progress in shown] == ["look at images", *tasks, "score statistics"]
    assert [progress.count for progress in shown] == [progress.total for progress in shown]
    assert events.index(("training", 3)) > max(place for place, event in enumerate(events) if event == "saved")


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


@pytest.mark.parametrize("words", [
    ["train", "broken", "-o", "m"], ["calibrate", "broken", "broken", "-o", "r"],
    ["quantize", "broken", "--precision", "fp16", "-o", "q"], ["export", "broken", "-o", "m.onnx"],
])
def test_torch_takes_only_the_cores_of_the_quota(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    Path("broken").touch()
    monkeypatch.setattr(host, "keep_freed_memory", lambda: None)  # would stay
    monkeypatch.setattr(precision, "available_cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with pytest.raises(UadtoolError):
            cli.main(words, standalone_mode=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_slow_layers_are_float_within_the_block_only():
    slow, fast = nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    network = nn.Sequential(fast, slow)
    values, seen = torch.randn(1, 4, 8, 8), []
    original = type(slow)._conv_forward

    def watch(self, values, *arguments):
        seen.append((self, torch.is_autocast_enabled("cpu")))
        return original(self, values, *arguments)

    type(slow)._conv_forward = watch
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with large_depthwise_float(network):
                within = network(values)
            network(values)
    finally:
        type(slow)._conv_forward = original
    assert seen == [(fast, True), (slow, False), (fast, True), (slow, True)]
    assert within.dtype == torch.bfloat16
    assert "forward" not in vars(slow)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_on_a_machine_without_it():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UadtoolError, match="no CUDA device is available; take --device cpu"):
        choose_device("cuda")
