"""The memories and the head."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from uadtool.data.dataset import training_samples
from uadtool.lab.detectors.duet import Duet, Head, segmentation_loss, vary
from uadtool.lab.detectors.memory import PatchMemory, coreset, principal_components
from uadtool.lab.train import TrainingOptions, train

SIZE = (64, 64)


def patches(seed, count, size=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**32 - 1), st.integers(1, 1200), st.integers(1, 3), st.integers(1, 4))
def test_the_map_is_the_least_distance(seed, entries, height, width):
    points, x = patches(seed, entries), patches(seed + 1, 2 * height * width)
    memory = PatchMemory(5, 5, entries, context=1)
    memory.fill(points)
    with torch.no_grad():
        memory.project.weight.copy_(torch.eye(5)[:, :, None, None])
        memory.project.bias.zero_()
        found = memory(x.view(2, height, width, 5).permute(0, 3, 1, 2))
    expected = torch.cdist(x.double(), points.double()).amin(1).view(2, 1, height, width)
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


def test_principal_components_are_those_of_scikit_learn():
    points = patches(0, 200) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    mean, vectors = principal_components(points, 3)
    reference = PCA(3).fit(points.numpy())
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-5)
    np.testing.assert_allclose(np.abs(vectors.numpy() @ reference.components_.T), np.eye(3), atol=1e-3)


@pytest.mark.parametrize("context", [1, 3])
def test_a_memory_recognises_the_patches_it_was_fitted_to(context):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([100.0, 1.0, 0.1])[:, None, None]
    seen = [scales * torch.randn(4, 3, 6, 6, generator=generator) for _ in range(2)]
    memory = PatchMemory(3, 64, 8 * 36, context)
    memory.fit(iter(seen), images=8, seed=0)
    with torch.inference_mode():
        assert memory(seen[0]).max() < 0.1
        strange = seen[0].clone()
        strange[1, 2, 3, 4] += 2  # many deviations of this channel, but not of the first
        distances = memory(strange)
    reach = context // 2
    raised = distances[1, 0] > 0.5
    assert raised[3 - reach:4 + reach, 4 - reach:5 + reach].all()
    assert raised.sum() == context**2
    assert distances[[0, 2, 3]].max() < 0.1


def test_a_memory_with_room_for_all_patches_has_them_all():
    values = patches(0, 9, 4).T.view(1, 4, 3, 3)
    memory = PatchMemory(4, 2, 20, context=1)
    memory.fit([values], images=1, seed=0)
    with torch.inference_mode():
        assert memory(values).max() < 1e-2


def test_the_deployed_head_gives_the_logits_of_the_trained_head():
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


def test_options():
    wide = Duet("mobilenetv2_035", SIZE, 1, small=30, large=40, components=12, width=8)
    assert [part.shape for part in wide.small.parts] == [(13, 30)]
    assert [part.shape for part in wide.large.parts] == [(13, 40)]
    assert wide.head.out.in_channels == 8


@pytest.mark.parametrize(("most", "sizes"), [(32, [32, 4, 4]), (1, [32, 4])])
def test_a_part_of_many_held_out_images_measures_the_head(textures, tmp_path, monkeypatch, most, sizes):
    """With very many held-out images, the features of all would not fit into memory; here 36 are held out."""
    seen = []
    monkeypatch.setattr("uadtool.lab.detectors.duet.HELD_OUT_BATCHES", most)
    monkeypatch.setattr("uadtool.lab.detectors.duet.vary", lambda images, *rest: (
        seen.append(len(images)), vary(images, *rest))[1])
    options = TrainingOptions(method="duet", method_options={"small": "9", "large": "9"}, image_size=SIZE, steps=1,
                              held_out=0.9)
    train(training_samples(str(textures)), options, tmp_path / "checkpoint")
    assert seen == sizes
