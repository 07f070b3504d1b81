"""Encoder, bottleneck and decoder, with a CNN and with a vision transformer."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.dinomaly import EASY_GRADIENT, Decoder, Dinomaly, LinearAttention, loose_loss
from uadtool.lab.detectors.stfpm import cosine_distance

SIZE = (64, 96)
TEACHERS = ("mobilenetv2_035", "test_vit")


def images(count=3):
    return torch.randint(0, 256, (count, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=TEACHERS)
def detector(request):
    torch.manual_seed(0)
    return Dinomaly(request.param, SIZE, 2, width=32, depth=2).eval()


def test_the_decoder_gives_maps_of_the_encoders_shapes(detector):
    with torch.inference_mode():
        maps = detector.teacher(detector.normalize(images()))
        assert [m.shape for m in detector.decoder(maps)] == [m.shape for m in maps]


def test_the_raw_maps_are_those_of_the_groups_smoothed(detector):
    with torch.inference_mode():
        raw, _ = detector.raw_maps_and_class(images())
        maps = detector.teacher(detector.normalize(images()))
        distances = [F.interpolate(cosine_distance(m, r), size=detector.map_size, mode="bilinear")[:, 0].numpy()
                     for m, r in zip(maps, detector.decoder(maps))]
    deviation = 4 * detector.map_size[0] / SIZE[0]
    assert raw.shape[1] == 2
    for index, group in enumerate(distances):
        expected = [gaussian_filter(one, deviation, mode="nearest", radius=max(1, round(3 * deviation)))
                    for one in group]
        np.testing.assert_allclose(raw[:, index], expected, atol=1e-4)


def test_a_token_holds_a_cell_of_all_maps_and_passes_the_bottleneck():
    decoder = Decoder([(3, 8, 12), (5, 4, 6)], 32, 2, 7, 0.2).eval()
    seen = []
    decoder.bottleneck[0].register_forward_hook(lambda module, inputs, result: seen.append((inputs[0], result)))
    fine, coarse = torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6)
    decoder([fine, coarse])
    (tokens, squeezed), = seen
    assert squeezed.shape == (2, 24, 7)
    cell = torch.cat([fine[1, :, 2:4, 8:10].flatten(), coarse[1, :, 1, 4]])
    torch.testing.assert_close(tokens[1, 1 * 6 + 4], cell)


def test_upper_blocks_give_the_fine_map_and_lower_ones_the_coarse_map():
    decoder = Decoder([(3, 8, 8), (5, 4, 4)], 32, 4, 7, 0.0)
    maps = decoder([torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)])
    for index, reached in ((0, 4), (1, 2)):
        decoder.zero_grad()
        maps[index].square().sum().backward(retain_graph=True)
        trained = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in decoder.blocks]
        assert trained == [place < reached for place in range(4)]


def test_linear_attention_is_attention_with_a_kernel_instead_of_the_exponential():
    torch.manual_seed(0)
    attention = LinearAttention(64)
    tokens = torch.randn(2, 5, 64)
    query, key, value = attention.qkv(tokens).split(64, dim=2)
    expected = torch.empty(2, 5, 64)
    for head in (slice(0, 32), slice(32, 64)):
        weights = (F.elu(query[..., head]) + 1) @ (F.elu(key[..., head]) + 1).transpose(1, 2)
        expected[..., head] = weights / weights.sum(2, keepdim=True) @ value[..., head]
    torch.testing.assert_close(attention(tokens), attention.out(expected), rtol=1e-4, atol=1e-5)


def test_the_loss_compares_whole_maps_whatever_is_easy():
    targets, rebuilt = ([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)] for _ in range(2))
    expected = sum((1 - F.cosine_similarity(t.flatten(1), r.flatten(1))).mean() for t, r in zip(targets, rebuilt))
    for easy in (0.0, 0.5, 0.9):
        torch.testing.assert_close(loose_loss(targets, rebuilt, easy), expected)


def test_the_loss_scales_down_the_gradients_of_the_best_reconstructed_places():
    target = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rebuilt = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    full, = torch.autograd.grad(loose_loss([target], [rebuilt], 0.0), rebuilt)
    loose, = torch.autograd.grad(loose_loss([target], [rebuilt], 0.75), rebuilt)
    distances = cosine_distance(target, rebuilt.detach())
    easy = distances < distances.flatten().sort().values[24]
    assert easy.sum() == 24
    torch.testing.assert_close(loose, torch.where(easy, EASY_GRADIENT * full, full))


@pytest.mark.parametrize("options", [
    {"width": 48}, {"width": 0}, {"depth": 3}, {"depth": 0}, {"bottleneck": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_options_out_of_range_are_refused(options):
    (name, value), = options.items()
    with pytest.raises(UadtoolError, match=rf"cannot have .*\b{name} {value}\b.*; take a width"):
        Dinomaly(TEACHERS[0], SIZE, 2, **options)
