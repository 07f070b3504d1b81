"""Encoders against the timm models that they are made from."""

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import LayerNorm, build_backbone, feature_shapes
from uadtool.lab.detectors.encoders import build_encoder
from uadtool.lab.detectors.weights import load_teacher_weights

TRANSFORMERS = ("test_vit", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2")


def image(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_gives_the_means_of_its_lower_and_upper_middle_layers(name, tmp_path):
    """Also from weights for another image size: timm resamples the position embedding, and so do we."""
    torch.manual_seed(0)
    original = timm.create_model(name, img_size=112)
    nn.init.normal_(original.pos_embed)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    size = (56, 84) if "patch14" in name else (64, 96)
    encoder = build_encoder(name, size, (8, 16)).eval()
    assert load_teacher_weights(encoder, name, str(tmp_path / "weights.pth")) == "weights.pth"
    expected = timm.create_model(name, img_size=size).eval()
    expected.load_state_dict(checkpoint_filter_fn(original.state_dict(), expected))
    with torch.inference_mode():
        layers = expected.forward_intermediates(image(size), intermediates_only=True)
        lower, upper = encoder(image(size))
    groups = (layers[1:3], layers[3:5]) if name == "test_vit" else (layers[2:6], layers[6:10])
    for found, group in zip((lower, upper), groups):
        torch.testing.assert_close(found, sum(group) / len(group), rtol=1e-4, atol=1e-4)


def test_an_encoder_has_no_layer_above_its_outputs():
    names = {name for name, _ in build_encoder(TRANSFORMERS[0], (64, 64), (8, 16)).named_parameters()}
    assert any(name.startswith("blocks.4.") for name in names)
    assert not [name for name in names if name.startswith(("blocks.5.", "norm.", "head."))]


def test_a_cnn_gives_its_feature_maps_at_the_strides():
    torch.manual_seed(0)
    encoder = build_encoder("mobilenetv2_035", (64, 96), (8, 16)).eval()
    backbone = build_backbone("mobilenetv2_035", (64, 96)).eval()
    backbone.load_state_dict(encoder.state_dict())
    assert [shape[1:] for shape in feature_shapes(encoder, (64, 96))] == [(8, 12), (4, 6)]
    with torch.inference_mode():
        found, expected = encoder(image((64, 96))), backbone(image((64, 96)))[1:]
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


def test_layer_norm_is_torchs():
    norm = LayerNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    tokens = 5 * torch.randn(2, 7, 12) + 3
    torch.testing.assert_close(norm(tokens), F.layer_norm(tokens, (12,), norm.weight, norm.bias, 1e-3),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "size", "advice"), [
    ("vit_small_patch14_reg4_dinov2", (256, 256), "multiples of 14; take --image-size 224"),
    ("test_vit", (64, 100), "multiples of 16; take --image-size 64"),
    ("mobilenetv2_035", (72, 72), "multiples of 16; take --image-size 64")])
def test_an_image_size_that_does_not_fit_is_refused(name, size, advice):
    with pytest.raises(UadtoolError, match=advice):
        build_encoder(name, size, (8, 16))


def test_an_unknown_name_is_refused_with_near_ones():
    with pytest.raises(UadtoolError, match="no model 'vit_tiny_patch16_22'; it has vit_tiny_patch16_224"):
        build_encoder("vit_tiny_patch16_22", (64, 64), (8, 16))


def test_weights_that_cannot_be_fetched_are_asked_for():
    encoder = build_encoder(TRANSFORMERS[0], (64, 64), (8, 16))
    with pytest.raises(UadtoolError, match="offline, give --teacher-weights FILE"):
        load_teacher_weights(encoder, TRANSFORMERS[0])
