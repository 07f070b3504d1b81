"""The head, and its options."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from uadtool.data.dataset import training_samples
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.duet import Duet, Head, segmentation_loss, vary
from uadtool.lab.train import TrainingOptions, train

SIZE = (64, 64)


def test_the_deployed_head_gives_the_logits_of_the_trained_head():
    torch.manual_seed(0)
    head = Head((4, 6, 8), 16)
    features = [3 * torch.randn(8, n, s, s) + 2 for n, s in ((4, 16), (6, 8), (8, 4))]
    for branch, values in zip(head.branches(), features):
        branch.learn_standard(values.transpose(0, 1).flatten(1).T)
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
        branch.learn_standard(values.transpose(0, 1).flatten(1).T)
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
    duet = Duet("mobilenetv2_035", SIZE, 3, entries=30, components=12, width=8)
    assert [tuple(memory.bank.shape) for memory in duet.memories] == [(3, 9, 30), (3, 13, 30), (3, 13, 30)]
    assert duet.head.out.in_channels == 8


@pytest.mark.parametrize(("teacher", "options", "message"), [
    ("mobilenetv2_035", {"width": 0}, "the option width must be at least 1, not 0"),
    ("test_vit", {}, "'test_vit' is not a CNN, as duet needs; memory takes it")])
def test_what_cannot_be_built_is_refused(teacher, options, message):
    with pytest.raises(UadtoolError, match=message):
        Duet(teacher, SIZE, 1, **options)


@pytest.mark.parametrize(("most", "sizes"), [(32, [32, 4, 4]), (1, [32, 4])])
def test_a_part_of_many_held_out_images_measures_the_head(textures, tmp_path, monkeypatch, most, sizes):
    """With very many held-out images, the features of all would not fit into memory; here 36 are held out."""
    seen = []
    monkeypatch.setattr("uadtool.lab.detectors.duet.HELD_OUT_BATCHES", most)
    monkeypatch.setattr("uadtool.lab.detectors.duet.vary", lambda images, *rest: (
        seen.append(len(images)), vary(images, *rest))[1])
    options = TrainingOptions(method="duet", method_options={"entries": "9"}, image_size=SIZE, steps=1,
                              held_out=0.9)
    train(training_samples(str(textures)), options, tmp_path / "checkpoint")
    assert seen == sizes
