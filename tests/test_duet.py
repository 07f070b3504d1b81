"""The memory, the head, and both together through the whole chain."""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import validate
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from uadtool.dataset import training_samples
from uadtool.detectors import build_detector
from uadtool.detectors.duet import Duet, Head, _crop, segmentation_loss, vary
from uadtool.detectors.memory import (
    NEIGHBOURS,
    PSEUDO_COUNT,
    PatchMemory,
    coreset,
    principal_components,
    usual_distances,
)
from uadtool.errors import UadtoolError
from uadtool.models import load_model
from uadtool.training import TrainingOptions, train
from uadtool.training.loop import Interrupted

SIZE = (64, 64)


def patches(seed, count, size=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**32 - 1), st.integers(1, 1200), st.integers(1, 3), st.integers(1, 4))
def test_the_map_is_the_least_distance_in_units_of_the_usual_one(seed, entries, height, width):
    points, x = patches(seed, entries), patches(seed + 1, 2 * height * width)
    usual = patches(seed + 2, entries)[:, 0].abs() + 0.1
    memory = PatchMemory(entries, 5)
    memory.fill(points, usual)
    found = memory(x.view(2, height, width, 5).permute(0, 3, 1, 2))
    expected = (torch.cdist(x.double(), points.double()) / usual).amin(1).view(2, height, width)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 70))
def test_the_coreset_is_greedy_k_centre(seed, total, count):
    points = patches(seed, total).double()
    chosen = coreset(points, count).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, total)
    assert chosen[0] == (points - points.mean(0)).norm(dim=1).argmax()
    for place in range(1, len(chosen)):
        distances = torch.cdist(points, points[chosen[:place]]).amin(1)
        assert distances[chosen[place]] == pytest.approx(distances.max().item(), abs=1e-5)


def test_equal_patches_do_not_stop_the_coreset():
    assert sorted(coreset(torch.ones(7, 3), 5).tolist()) != [0] * 5


def test_usual_distances_are_means_around_the_entries():
    points = patches(0, 300)
    chosen = coreset(points, 40)
    found = usual_distances(points, chosen)
    entries = points[chosen].numpy()
    others = [point for index, point in enumerate(points.numpy()) if index not in set(chosen.tolist())]
    assigned = [[] for _ in entries]
    for point in others:
        distances = np.linalg.norm(entries - point, axis=1)
        assigned[distances.argmin()].append(distances.min())
    overall = np.mean([value for values in assigned for value in values])
    for index, entry in enumerate(entries):
        around = np.linalg.norm(entries - entry, axis=1).argsort()[:NEIGHBOURS]
        values = [value for place in around for value in assigned[place]]
        expected = (sum(values) + PSEUDO_COUNT * overall) / (len(values) + PSEUDO_COUNT)
        assert found[index].item() == pytest.approx(expected, rel=1e-4)


def test_principal_components_are_those_of_scikit_learn():
    points = patches(0, 200) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    mean, vectors = principal_components(points, 3)
    reference = PCA(3).fit(points.numpy())
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-5)
    np.testing.assert_allclose(np.abs(vectors.numpy() @ reference.components_.T), np.eye(3), atol=1e-3)


def test_the_deployed_head_gives_what_the_trained_one_gives():
    torch.manual_seed(0)
    head = Head((4, 6, 8), 16)
    features = [3 * torch.randn(8, n, s, s) + 2 for n, s in ((4, 16), (6, 8), (8, 4))]
    for branch, values in zip(head.branches(), features):
        branch.learn_standard([values])
    head.train()
    for _ in range(3):
        head(*features)
    expected = head.eval()(*features)
    folded = head.folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(*features), expected, rtol=1e-3, atol=1e-3)


def test_the_head_reads_standardised_features():
    head = Head((4, 6, 8), 16)
    features = [3 * torch.randn(8, n, s, s) + 2 for n, s in ((4, 32), (6, 16), (8, 8))]
    for branch, values in zip(head.branches(), features):
        branch.learn_standard([values])
        seen = branch.train().standardize(values)
        assert seen.mean().item() == pytest.approx(0, abs=0.1)
        assert seen.std().item() == pytest.approx(1, abs=0.1)


@given(st.integers(0, 2**32 - 1))
def test_the_loss_falls_as_the_logits_come_near_the_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(2, 4, 4, generator=generator) < 0.3).float()
    logits = torch.randn(2, 4, 4, generator=generator)
    better = logits + torch.where(masks > 0, 1.0, -1.0)
    assert 0 <= segmentation_loss(better, masks) < segmentation_loss(logits, masks)


def test_masks_show_where_a_batch_was_changed():
    images = torch.randint(0, 256, (40, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed, masks = vary(images, (8, 8), np.random.default_rng(0))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    anomalous = masks.amax((1, 2)) > 0
    assert 0.3 < anomalous.float().mean() < 0.8
    for image, original, mask in zip(changed, images, masks):
        same = [(image != other).any(2) for other in (original, original.flip(1))]
        if not any(one.float().mean() > 0.9 for one in same) or mask.any():
            differs = min(same, key=lambda one: one.sum()).view(8, 8, 8, 8).float().mean((1, 3))
            assert (differs[mask > 0] >= 0.15).all()


def test_options(tmp_path):
    with pytest.raises(UadtoolError, match="duet has no memory at stride 4; take 8 or 16"):
        Duet("mobilenetv2_035", SIZE, 1, memory_stride=4)
    wide = Duet("mobilenetv2_035", SIZE, 1, entries=30, components=7, width=8)
    assert [part.shape for part in wide.memory.parts] == [(9, 30)]


@pytest.fixture(scope="module")
def duet(step, textures):
    """For each stride of the memory, the trained model; made when asked for."""
    models = {}

    def train(stride):
        if stride not in models:
            models[stride] = step("train", textures, "--method", "duet", "--image-size", 64, "--steps", 30,
                                  "--option", "entries=200", "--option", f"memory_stride={stride}",
                                  output=f"duet-{stride}.safetensors")
        return models[stride]

    return train


def test_training_is_recorded(duet):
    validate(duet(16).record, "train")
    model, metadata = load_model(duet(16).path)
    assert metadata.method == "duet"
    assert metadata.options == {"entries": 200, "memory_stride": 16, "components": 64, "width": 96}
    assert set(build_detector(metadata).state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(("stride", "target"), [(8, "onnxruntime"), (8, "tensorrt"), (16, "onnxruntime")])
def test_the_chain(duet, step, uadtool, textures, stride, target):
    def auroc(model):
        onnx = step("export", model.path, "--images", textures, output=f"{target}-{model.path.stem}.onnx")
        done = uadtool("score", onnx.path, textures)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["metrics"]["image_auroc"]["pooled"]

    model = duet(stride)
    ranges = step("calibrate", model.path, textures, "--count", 16, output=f"duet-{stride}.json")
    int8 = step("quantize", model.path, textures, "--ranges", ranges.path, "--target", target,
                output=f"int8-{stride}.safetensors")
    expected = auroc(model)
    assert expected > 0.95
    assert auroc(int8) == pytest.approx(expected, abs=0.03)


def test_the_head_is_what_fine_tuning_moves(duet, step, textures):
    model = duet(8)
    ranges = step("calibrate", model.path, textures, "--count", 16, output="duet-qat.json")
    tuned = step("quantize", model.path, textures, "--ranges", ranges.path, "--scope", "student", "--qat", "--steps", 3,
                 output="duet-qat.safetensors")
    assert tuned.record["method"] == "qat"
    assert tuned.record["float_layers"]
    assert not any(name.startswith("head.") for name in tuned.record["float_layers"])


def test_an_interrupted_run_goes_on_to_the_same_result(textures, tmp_path, monkeypatch):
    """The memory is chosen anew, the head goes on."""
    samples = training_samples(str(textures))

    def run(name, resume=False):
        options = TrainingOptions(method="duet", method_options={"entries": "50"}, image_size=SIZE, length=6,
                                  unit="steps")
        return train(samples, options, tmp_path / name, resume).detector.state_dict()

    whole, clock = run("whole"), iter(range(100))
    monkeypatch.setattr("uadtool.detectors.duet._crop", lambda *arguments: (
        signal.raise_signal(signal.SIGINT) if next(clock) == 3 else None, _crop(*arguments))[1])
    with pytest.raises(Interrupted):
        run("resumed")
    resumed = run("resumed", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
