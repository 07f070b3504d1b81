"""The contract of a detection method: one suite over all registered methods. A row of ``ROWS`` covers a new method."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np
import pytest
import timm
import torch
from conftest import run_here, validate
from sklearn.metrics import roc_auc_score
from torch import nn

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER
from uadtool.lab.detectors.contract import OutputTensors, pooled_descriptor
from uadtool.lab.detectors.registry import BUILT_IN, build_detector, find_method, method_options
from uadtool.lab.models import load_model, save_model
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.train import TrainingOptions, train
from uadtool.lab.training import loop
from uadtool.lab.training.data import read_images
from uadtool.metadata import Reading

SIZE = (64, 96)


class Row(NamedTuple):
    """A method with options that make it small, what it reaches on the textures in ``steps``, if it takes any, and in
    int8. ``side`` is that of the images: the score of fewer than 64 patches is that of one patch.
    """

    method: str
    options: Dict[str, str]
    steps: int
    held_out_loss: float
    auroc: float
    teacher: str = DEFAULT_TEACHER
    int8: float = 0.05
    side: int = 64


ROWS = {
    "stfpm": Row("stfpm", {}, 20, 2.5, 0.9),
    "stfpm-options": Row("stfpm", {"fusion": "product", "dcam": "true", "shared_stages": "1"}, 20, 9.0, 0.9),
    "rd": Row("rd", {"width": "1"}, 60, 1.5, 0.9),
    "us": Row("us", {}, 400, 2.0, 0.9),
    "dinomaly": Row("dinomaly", {"width": "64", "depth": "2"}, 60, 1.7, 0.9),
    "dinomaly-vit": Row("dinomaly", {"width": "64", "depth": "2"}, 150, 1.7, 0.8, "test_vit", side=128),
    "memory": Row("memory", {"entries": "200"}, 0, 0.0, 0.95, int8=0.03),
    "memory-vit": Row("memory", {"entries": "200"}, 0, 0.0, 0.95, "test_vit", side=128),
    "duet": Row("duet", {"entries": "200"}, 30, 1.0, 0.95, int8=0.03),
}


SLOW = ("us", "stfpm-options", "dinomaly", "dinomaly-vit")
"""One needs most steps, since it also learns its teacher; the others are like other rows."""


def test_every_method_has_a_row():
    assert {row.method for row in ROWS.values()} == set(BUILT_IN)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
                                        for name in ROWS])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def row(name):
    return ROWS[name]


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    """Random weights of the teachers that no installed package has weights of."""
    folder = tmp_path_factory.mktemp("weights")
    for teacher in {row.teacher for row in ROWS.values()} - {DEFAULT_TEACHER}:
        torch.manual_seed(1)
        torch.save(timm.create_model(teacher).state_dict(), folder / f"{teacher}.pth")
    return lambda teacher: None if teacher == DEFAULT_TEACHER else str(folder / f"{teacher}.pth")


# Without training


@pytest.fixture(scope="module")
def detector(row):
    """Random networks and statistics, for three classes."""
    torch.manual_seed(0)
    detector = find_method(row.method)(row.teacher, SIZE, 3, **method_options(row.method, row.options)).eval()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    detector.prototypes.normal_()
    detector.map_spreads.uniform_(0.5, 1)
    return detector


def images(count):
    """Noise on a different colour each."""
    random = np.random.default_rng(0)
    colours = random.uniform(0, 256, (count, 1, 1, 3))
    return torch.from_numpy((colours + random.normal(0, 40, (count, *SIZE, 3))).clip(0, 255).astype(np.uint8))


def test_folding_batch_norm_keeps_the_maps_and_descriptors(detector):
    detector = copy.deepcopy(detector)
    with torch.inference_mode():
        pixels = detector.normalize(images(3))

        def features_and_maps():
            features = detector.features(pixels)
            return [*features, detector.raw_maps(pixels, features, torch.tensor([0, 1, 2]))]

        before = features_and_maps()
        detector.fold_batch_norm()
        after = features_and_maps()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())
    for expected, actual in zip(before, after):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_outputs_have_the_types_and_shapes_of_the_contract(detector):
    with torch.inference_mode():
        descriptor = pooled_descriptor(detector.features(detector.normalize(images(2))))
        raw, _ = detector.raw_maps_and_class(images(2))
        output = detector(images(2))
    assert raw.min() >= 0
    assert raw.shape == (2, detector.expected_maps.shape[1], *detector.map_size)
    assert descriptor.shape == (2, detector.prototypes.shape[1])
    assert OutputTensors._fields == ("score", "raw_score", "anomaly_map", "nearest_class",
                                     "class_distance")
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in output] == [
        (torch.float32, (2,)), (torch.float32, (2,)), (torch.float32, (2, *detector.map_size)), (torch.int32, (2,)),
        (torch.float32, (2,))]


def test_an_image_is_scored_alone(detector):
    with torch.inference_mode():
        together, alone = detector(images(4)), [detector(image[None]) for image in images(4)]
    for output, *parts in zip(together, *alone):
        torch.testing.assert_close(output, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_everything_stays_on_the_device(detector):
    """On torch's device "meta", which has only shapes, a mix of devices fails as on a GPU."""
    detector = copy.deepcopy(detector).to("meta").fold_batch_norm()
    output = detector(images(2).to("meta"))
    assert {tensor.device.type for tensor in (*detector.parameters(), *detector.buffers(), *output)} == {"meta"}


# Training


def test_an_interrupted_run_resumes_to_the_same_bytes(row, teacher_weights, textures, tmp_path, monkeypatch):
    if not row.steps:
        pytest.skip("the method takes no steps")
    options = TrainingOptions(method=row.method, method_options=row.options, teacher=row.teacher,
                              teacher_weights=teacher_weights(row.teacher), image_size=(64, 64), steps=3)

    samples = training_samples(str(textures))[::2]

    def run(name, resume=False):
        result = train(samples, options, tmp_path / f"{name}.checkpoint", resume)
        save_model(result.detector, result.metadata, tmp_path / name)
        return (tmp_path / name).read_bytes()

    def save_and_interrupt(path, config, progress, *state):
        save(path, config, progress, *state)
        if progress["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    whole, save = run("whole"), loop.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("resumed")
    assert run("resumed", resume=True) == whole


@pytest.fixture(scope="module")
def model(name, row, teacher_weights, step, textures):
    return step(*train_words(row, textures, teacher_weights), *steps(row, row.steps), output=f"{name}.safetensors")


def steps(row, count):
    """The option, for a method that takes steps."""
    return ["--steps", count] if row.steps else []


def train_words(row, textures, teacher_weights):
    options = [word for pair in row.options.items() for word in ("--option", "=".join(pair))]
    weights = teacher_weights(row.teacher)
    return ["train", textures, "--method", row.method, "--teacher", row.teacher, *options, "--image-size", row.side,
            *(["--teacher-weights", weights] if weights else [])]


def test_training_is_recorded(row, model):
    validate(model.record, "train")
    assert model.record.get("held_out_loss", -1) < row.held_out_loss
    assert model.record["steps"] == row.steps
    detector, metadata = load_model(model.path)
    assert (metadata.method, metadata.teacher) == (row.method, row.teacher)
    assert metadata.options == method_options(row.method, row.options)
    assert metadata.map_size == detector.map_size
    assert detector.state_dict().keys() == build_detector(metadata).state_dict().keys()


# The chain. An export takes seconds, so the fast tests score in torch; test_flavours.py exports every method.


@pytest.fixture(scope="module")
def test_images(row, textures):
    """Images of the textures, and whether they are anomalous."""
    samples = list(scoring_samples([str(textures)]))
    return read_images(samples, Reading((row.side, row.side)), 1), [sample.label != "good" for sample in samples]


def torch_auroc(path, test_images):
    images, anomalous = test_images
    model, _ = load_model(path)
    with torch.inference_mode():
        return roc_auc_score(anomalous, OutputTensors(*model(images)).score)


@pytest.fixture(scope="module")
def float_auroc(model, test_images):
    return torch_auroc(model.path, test_images)


@pytest.fixture(scope="module")
def ranges(name, model, step, textures):
    return step("calibrate", model.path, textures, "--source", "synthetic-anomalies", "--count", 16,
                output=f"{name}.json")


def exported_auroc(model, step, textures):
    onnx = step("export", model.path, "--images", textures, output=f"{model.path.stem}.onnx")
    *_, summary = run_here("score", onnx.path, textures).splitlines()
    return json.loads(summary)["metrics"]["image_auroc"]["pooled"]


@pytest.mark.slow
def test_the_exported_model_detects(row, model, float_auroc, step, textures):
    assert float_auroc > row.auroc
    assert exported_auroc(model, step, textures) == pytest.approx(float_auroc, abs=0.005)


@pytest.mark.parametrize("target", [target if target == "onnxruntime" else pytest.param(target, marks=pytest.mark.slow)
                                    for target in TARGETS])
def test_int8_detects_as_well(name, row, model, ranges, test_images, float_auroc, step, target):
    int8 = step("quantize", model.path, "--ranges", ranges.path, "--target", target,
                output=f"{name}-{target}.safetensors")
    validate(int8.record, "quantize")
    assert int8.record["float_layers"] == []
    assert torch_auroc(int8.path, test_images) == pytest.approx(float_auroc, abs=row.int8)


@pytest.mark.slow
def test_fp16_detects_as_well(name, model, test_images, float_auroc, step):
    half = step("quantize", model.path, "--precision", "fp16", "--target", "tensorrt",
                output=f"{name}-fp16.safetensors")
    assert torch_auroc(half.path, test_images) == pytest.approx(float_auroc, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_exported_int8_detects_as_well(name, row, model, ranges, float_auroc, step, textures, target):
    int8 = step("quantize", model.path, textures, "--ranges", ranges.path, "--target", target,
                output=f"{name}-{target}-refitted.safetensors")
    assert exported_auroc(int8, step, textures) == pytest.approx(float_auroc, abs=row.int8)


@pytest.mark.slow
def test_fine_tuning_moves_only_the_trained_network(name, row, model, ranges, step, textures):
    if not row.steps:
        pytest.skip("the method trains no network")
    tuned = step("quantize", model.path, textures, "--ranges", ranges.path, "--scope", "student", "--qat", "--steps", 1,
                 output=f"{name}-qat.safetensors")
    validate(tuned.record, "quantize")
    assert tuned.record["method"] == "qat"
    network = find_method(row.method).trained_network
    layers = [key for key, _ in load_model(model.path)[0].named_modules() if key.startswith(f"{network}.")]
    assert tuned.record["float_layers"]
    assert not set(layers) & set(tuned.record["float_layers"])


# Determinism

CHAIN = """
import json, sys
from conftest import run_here
for line in json.loads(sys.argv[1]):
    run_here(*line)
"""


def chain_in_a_process(row, teacher_weights, textures, folder, hash_seed):
    """The files of train, calibrate, quantize and export."""
    folder.mkdir()
    fp32, ranges, int8 = (folder / name for name in ("m.safetensors", "r.json", "q.safetensors"))
    lines = [
        [*train_words(row, textures, teacher_weights), *steps(row, 3), "-o", fp32],
        ["calibrate", fp32, textures, "-o", ranges, "--count", 8, "--source", "good", "--source",
         "synthetic-anomalies"],
        ["quantize", fp32, textures, "--ranges", ranges, "-o", int8, "--keep-float", "auto:1"],
        ["export", fp32, "-o", folder / "m.onnx"],
        ["export", int8, "-o", folder / "q.onnx"]]
    words = json.dumps([[str(word) for word in line] for line in lines])
    # Sets of texts have another order for every hash seed.
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed),
                   "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    subprocess.run([sys.executable, "-c", CHAIN, words], check=True, env=environment, capture_output=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_files_are_the_same_in_every_process(row, teacher_weights, textures, tmp_path):
    first, second = (chain_in_a_process(row, teacher_weights, textures, tmp_path / str(seed), seed) for seed in (1, 2))
    assert sorted(first) == ["m.onnx", "m.safetensors", "q.onnx", "q.safetensors", "r.json"]
    assert [name for name in first if first[name] != second[name]] == []
