"""A memory against a search of all entries, its entries against the definition, its space against what it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from uadtool.lab.detectors import patch_memory
from uadtool.lab.detectors.patch_memory import (
    MOST_SQUARE,
    PatchMemory,
    coreset,
    principal_components,
    sample_patches,
    whitening,
)
from uadtool.lab.quantization.modules import BANK_UNIT, EXTRA, QUERY_UNIT, QuantizedMemory

SEEDS = st.integers(0, 2**32 - 1)


def patches(seed, count, size=5):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def as_maps(points, height, width):
    """Points [n, C] as feature maps [N, C, h, w]."""
    return points.view(-1, height, width, points.shape[1]).permute(0, 3, 1, 2)


def of_one_image(points):
    """The numbers of their images."""
    return torch.zeros(len(points), dtype=torch.long)


def of_class(seed, row, size=5):
    """400 patches of a class that has a place and spreads of its own."""
    return patches(seed + row, 400, size) * torch.linspace(0.5, 3, size) * (1 + row) + 5 * row


def fitted(seed, classes, entries, size=5, components=5):
    """A memory of such classes."""
    memory = PatchMemory(classes, size, components, entries)
    for row in range(classes):
        memory.fit(row, of_class(seed, row, size), torch.arange(400) // 10)
    return memory


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 300), st.integers(1, 3), st.integers(1, 4))
def test_the_map_is_the_least_distance_to_the_bank_of_the_class(seed, entries, height, width):
    memory, nearest = fitted(seed, 2, entries), torch.tensor([0, 1, 0])
    points = 4 * patches(seed + 9, 3 * height * width)
    with torch.inference_mode():
        found = memory(as_maps(points, height, width), nearest)
    for one, image, row in zip(found, points.view(3, -1, 5).double(), nearest.tolist()):
        z = (image @ memory.weight[row].double() + memory.bias[row].double())[:, :-1]
        expected = torch.cdist(z, memory.bank[row, :-1].T.double()).amin(1).view(1, height, width)
        torch.testing.assert_close(one.double(), expected, rtol=1e-3, atol=2e-3)


@given(SEEDS)
def test_the_components_of_entries_are_within_their_limits(seed):
    memory = fitted(seed, 2, 30)
    torch.testing.assert_close(memory.bank[:, -1], memory.bank[:, :-1].square().sum(1) / -2)
    for row in range(2):
        z = (of_class(seed, row) @ memory.weight[row] + memory.bias[row])[:, :-1]  # an entry may be any of these
        assert max(float(z.abs().max()), float(z.square().sum(1).max() / MOST_SQUARE) ** 0.5) == pytest.approx(1)


@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
def test_a_bank_begins_with_all_smaller_ones(seed, entries, more):
    small, large = fitted(seed, 2, entries), fitted(seed, 2, entries + more)
    assert torch.equal(large.weight, small.weight)
    assert torch.equal(large.bias, small.bias)
    assert torch.equal(large.bank[:, :, :entries], small.bank)


def test_an_entry_with_many_large_components_is_within_the_limit():
    memory = PatchMemory(1, 200, 200, 4)
    signs = torch.tensor([[1.0], [-1.0]]) * torch.ones(2, 200)
    memory.fit(0, signs, of_one_image(signs))
    assert memory.bank[0, :-1].square().sum(0).max() <= MOST_SQUARE * 1.001


def test_a_memory_recognises_the_patches_that_it_holds():
    scales = torch.tensor([100.0, 1.0, 0.1])
    seen = patches(0, 8 * 36, 3) * scales
    memory = PatchMemory(1, 3, 64, 8 * 36)
    memory.fit(0, seen, of_one_image(seen))
    strange = as_maps(seen, 6, 6).clone()
    strange[1, 2, 3, 4] += 2  # many deviations of this channel, but not of the first
    with torch.inference_mode():
        assert memory(as_maps(seen, 6, 6), torch.zeros(8, dtype=torch.long)).max() < 2e-3
        distances = memory(strange, torch.zeros(8, dtype=torch.long))
    assert (distances > 0.5).nonzero().tolist() == [[1, 0, 3, 4]]


def test_copies_of_an_entry_fill_a_bank_with_room_for_all_patches():
    values = patches(0, 9, 4)
    memory = PatchMemory(1, 4, 2, 20)
    memory.fit(0, values, of_one_image(values))
    with torch.inference_mode():
        assert memory(as_maps(values, 3, 3), torch.zeros(1, dtype=torch.long)).max() < 1e-2
    assert torch.equal(memory.bank[0, :, 9:], memory.bank[0, :, :1].expand(-1, 11))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_patches_give_finite_distances(value):
    memory = PatchMemory(1, 4, 3, 10)
    same = torch.full((50, 4), value)
    memory.fit(0, same, torch.arange(50) // 10)
    with torch.inference_mode():
        distances = memory(as_maps(torch.cat([same[:4], same[:4] + 1]), 2, 2), torch.zeros(2, dtype=torch.long))
    assert distances.isfinite().all()
    assert distances[0].max() < 1e-3 < distances[1].min()


# Whitening


def test_whitening_halves_the_logarithms_of_the_spreads_of_residuals():
    entries, spreads = torch.zeros(1, 3), torch.tensor([4.0, 1.0, 0.25])
    queries = patches(0, 20_000, 3) * spreads
    rotation = torch.linalg.qr(patches(1, 3, 3)).Q
    transform = whitening(queries @ rotation.T, entries)
    found = (queries @ rotation.T @ transform.T).T.cov()
    lengths = torch.linalg.eigvalsh(found).sqrt().flip(0)
    expected = spreads.sqrt()
    torch.testing.assert_close(lengths / lengths[1], expected / expected[1], rtol=0.03, atol=0)


@pytest.mark.parametrize("queries", [torch.empty(0, 3), torch.zeros(7, 3)])
def test_whitening_without_residuals_changes_nothing(queries):
    assert torch.equal(whitening(queries, torch.zeros(2, 3)), torch.eye(3))


def test_a_direction_without_residuals_does_not_drown_the_others():
    queries = patches(0, 1000, 3) * torch.tensor([1.0, 1.0, 0.0])
    transform = whitening(queries, torch.zeros(1, 3))
    assert torch.linalg.eigvalsh(transform).max() < 11


# Entries


@given(SEEDS, st.integers(1, 60), st.integers(1, 70), st.sampled_from([2, 5, 256]))
def test_the_coreset_is_greedy_k_centre(seed, total, count, block):
    points = patches(seed, total).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patch_memory, "BLOCK", block)
        chosen = coreset(points, count).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, total)
    assert chosen[0] == (points - points.mean(0)).norm(dim=1).argmax()
    for place in range(1, len(chosen)):
        distances = torch.cdist(points, points[chosen[:place]]).amin(1)
        assert distances[chosen[place]] == pytest.approx(distances.max().item(), abs=1e-5)


@given(SEEDS, st.integers(1, 50))
def test_the_first_entries_of_a_coreset_are_the_smaller_coreset(seed, count):
    points = patches(seed, 60)
    assert torch.equal(coreset(points, 55)[:count], coreset(points, count))


def test_equal_patches_are_chosen_once_each():
    assert sorted(coreset(torch.ones(7, 3), 5).tolist()) == sorted(set(coreset(torch.ones(7, 3), 5).tolist()))


@given(SEEDS, st.integers(1, 4), st.integers(1, 40))
def test_every_image_contributes_the_same_number_of_its_patches(seed, images, count):
    maps = torch.arange(images * 20.0).view(images, 1, 4, 5)
    chosen = sample_patches(maps, count, torch.Generator().manual_seed(seed))
    assert len(chosen.unique()) == len(chosen) == images * min(count, 20)
    assert torch.bincount((chosen[:, 0] // 20).long()).tolist() == [min(count, 20)] * images


def test_principal_components_are_those_of_scikit_learn():
    points = patches(0, 200) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    mean, vectors = principal_components(points, 3)
    reference = PCA(3).fit(points.numpy())
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-5)
    np.testing.assert_allclose(np.abs(vectors.numpy() @ reference.components_.T), np.eye(3), atol=1e-3)


# More patches, other patches


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 12))
def test_a_bank_represents_the_patches_that_extend_it(seed, size):
    memory, nearest = fitted(seed, 2, 450, size, size), torch.tensor([1])
    more, new = patches(seed + 1, 20, size) + 40, patches(seed + 2, 20, size) * 20
    before, other = memory(as_maps(new, 4, 5), nearest), memory.bank[0].clone()
    factor = memory.extend(1, more)
    assert memory(as_maps(more, 4, 5), nearest).amax() <= 3e-3  # there is room for all
    after = memory(as_maps(new, 4, 5), nearest)
    assert (after <= before * factor * (1 + 1e-3) + 3e-3).all()
    assert memory.bank[1, :-1].abs().max() <= 1 + 1e-6
    assert torch.equal(memory.bank[0], other)


@given(SEEDS, st.integers(2, 12))
def test_a_bank_of_other_patches_has_the_same_projection(seed, size):
    memory, nearest = fitted(seed, 2, 60, size, size), torch.tensor([0])
    others = patches(seed + 1, 20, size)
    weight, bias = memory.weight.clone(), memory.bias.clone()
    memory.fill(0, others)
    assert torch.equal(memory.weight, weight)
    assert torch.equal(memory.bias, bias)
    torch.testing.assert_close(memory(as_maps(others, 4, 5), nearest), torch.zeros(1, 1, 4, 5), rtol=0, atol=3e-3)


# In int8


@given(SEEDS, st.integers(2, 40), st.integers(1, 40), st.booleans())
def test_codes_stand_for_a_memory_that_has_the_same_codes(seed, size, components, signed):
    quantized = QuantizedMemory(fitted(seed, 2, 30, size, components), signed)
    again = QuantizedMemory(quantized.dequantized(), signed)
    assert torch.equal(again.bank, quantized.bank)
    torch.testing.assert_close(again.weight.float(), quantized.weight.float(), rtol=0, atol=1)
    torch.testing.assert_close(again.bias, quantized.bias)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 80), st.integers(1, 64), st.booleans())
def test_codes_give_nearly_the_distances(seed, size, components, signed):
    memory, nearest = fitted(seed, 2, 60, size, components), torch.tensor([1, 0])
    spread = torch.linspace(0.5, 3, size)
    points = torch.cat([patches(seed + 9, 50, size) * spread * 2 + 5, patches(seed + 10, 50, size) * spread])
    with torch.inference_mode():
        expected = memory(as_maps(points, 5, 10), nearest)
        found = QuantizedMemory(memory, signed)(as_maps(points, 5, 10), nearest)
    within = (as_maps(points, 5, 10).flatten(2).transpose(1, 2) @ memory.weight[nearest] + memory.bias[nearest]
              ).abs().amax(2).view(2, 1, 5, 10) < 1.2  # beyond, components are cut off
    assert within.any()
    # Rounding moves each component by half a code at most, of the query and of the entry, and by its projection.
    most = 0.5 / QUERY_UNIT + 0.5 / BANK_UNIT + 0.01
    torch.testing.assert_close(found[within], expected[within], rtol=0.03, atol=most * components**0.5)


@given(SEEDS, st.integers(1, 64))
def test_the_extra_components_hold_exactly_half_the_square_of_the_codes(seed, components):
    quantized = QuantizedMemory(fitted(seed, 2, 30, 64, components))
    bank = quantized.bank.int()
    assert bank[:, :-1].abs().max() <= 64  # else pairs of products would overflow on some processors
    half = (bank[:, :components].square().sum(1) / 2 * QUERY_UNIT / BANK_UNIT).round()
    extra = torch.tensor([127] * (EXTRA - 1) + [1])[:, None]
    assert torch.equal((bank[:, components:] * extra).sum(1).float(), -half)


def test_the_longest_entries_have_codes():
    memory = PatchMemory(1, 112, 112, 4)
    memory.bank.data[0, :-1] = (MOST_SQUARE / 112) ** 0.5
    bank = QuantizedMemory(memory).bank[0].int()
    half = round(int(bank[:112, 0].square().sum()) / 2 * QUERY_UNIT / BANK_UNIT)
    assert int(bank[112:-1, 0].sum()) * 127 + int(bank[-1, 0]) == -half
