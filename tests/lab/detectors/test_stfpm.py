"""Options of STFPM: attention in training (DCAM), and stages that teacher and student share (PaSTe)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import expit, rel_entr, softmax
from torch import nn
from torch.nn import functional as F

from uadtool.data.dataset import training_samples
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import build_backbone
from uadtool.lab.detectors.complexity import count_macs
from uadtool.lab.detectors.dcam import ChannelAttention, spatial_divergence
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.onnx_export.parity import parity_images
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.modules import QuantizedConv2d
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.train import TrainingOptions, train
from uadtool.metadata import Reading

SIZE = (64, 96)
TEACHERS = ["tf_efficientnet_lite0", "resnet18"]
SHARED = [(teacher, stages) for teacher in TEACHERS for stages in (1, 2)]


def convolutions(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def random_stfpm(teacher, stages):
    torch.manual_seed(0)
    detector = STFPM(teacher, SIZE, 2, shared_stages=stages)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    return detector.eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Shared stages


@pytest.mark.parametrize(("teacher", "stages"), SHARED)
def test_the_student_is_the_teacher_up_to_the_shared_feature_map(teacher, stages, images):
    detector = random_stfpm(teacher, stages)
    whole = build_backbone(teacher, SIZE).eval()
    whole.load_state_dict({**detector.teacher.state_dict(), **detector.student.state_dict()})
    with torch.inference_mode():
        pixels = detector.normalize(images)
        raw, _ = detector.raw_maps_and_class(images)
        pairs = list(zip(detector.teacher(pixels), whole(pixels)))
    assert all(torch.equal(t, s) for t, s in pairs[:stages])
    size = pairs[stages][0].shape[2:]
    assert detector.map_size == raw.shape[2:] == size
    maps = [F.interpolate(1 - F.cosine_similarity(t, s)[:, None], size=size, mode="bilinear")
            for t, s in pairs[stages:]]
    assert len(maps) == 3 - stages
    torch.testing.assert_close(raw, torch.cat(maps, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("teacher", "stages"), SHARED)
def test_shared_stages_are_computed_once(teacher, stages):
    plain, shared = random_stfpm(teacher, 0), random_stfpm(teacher, stages)
    spared = convolutions(shared.teacher).keys() - convolutions(shared.student).keys()
    assert spared
    macs = []
    for name in spared:
        def count(conv, inputs, result):
            macs.append(result.numel() * conv.weight[0].numel())

        shared.teacher.get_submodule(name).register_forward_hook(count)
    with torch.inference_mode():
        shared.teacher(torch.zeros(1, 3, *SIZE))
    expected = count_macs(plain, SIZE) - sum(macs)
    assert count_macs(shared, SIZE) == expected


def test_scope_student_leaves_the_shared_stages_in_float():
    detector = random_stfpm("resnet18", 1).fold_batch_norm()
    plan = QuantizationPlan(detector)
    outside = plan.layers_outside("student")
    assert outside == [f"teacher.{name}" for name in convolutions(detector.teacher)]
    images = torch.from_numpy(parity_images(None, Reading(SIZE)))
    model = quantize(plan, calibrate(plan, [images]), TARGETS["tensorrt"], outside)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedConv2d)}
    assert quantized == {f"student.{name}" for name in convolutions(detector.student)}
    rounded = [name for name, _ in model.points.named_children() if not name.startswith("student_")]
    assert rounded == ["teacher_layer1_1_act2"]  # the feature map that the student starts from


def test_a_number_of_stages_that_cannot_be_shared_is_refused():
    with pytest.raises(UadtoolError, match="stfpm cannot share 3 stages; take 0, 1 or 2"):
        STFPM("resnet18", SIZE, 2, shared_stages=3)


# DCAM


def test_attention_is_that_of_cbam():
    torch.manual_seed(0)
    attention = ChannelAttention(20)
    features = torch.randn(3, 20, 5, 4)
    first, second = (layer.weight.detach().numpy() for layer in (attention.shared[0], attention.shared[2]))
    assert first.shape == (2, 20)
    values = features.numpy()
    weights = expit(sum(np.maximum(pooled @ first.T, 0) @ second.T
                        for pooled in (values.mean((2, 3)), values.max((2, 3)))))
    np.testing.assert_allclose(attention(features).detach(), values * weights[:, :, None, None], rtol=1e-5, atol=1e-6)


def feature_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, side, side + 1, generator=generator) for channels, side in ((5, 8), (7, 4))]


def test_spatial_divergence_is_the_relative_entropy_over_positions():
    teacher, student = feature_maps(0), feature_maps(1)
    expected = 0
    for t, s in zip(teacher, student):
        scale = t.numpy().std(ddof=1)
        p, q = (softmax(part.numpy().reshape(*part.shape[:2], -1) / scale, axis=2) for part in (t, s))
        expected += rel_entr(p, q).sum(2).mean()
    assert spatial_divergence(teacher, student).item() == pytest.approx(expected, rel=1e-4)
    assert spatial_divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_spatial_divergence_does_not_depend_on_the_unit_of_the_features():
    teacher, student = feature_maps(0), feature_maps(1)
    larger = [[30 * part for part in maps] for maps in (teacher, student)]
    torch.testing.assert_close(spatial_divergence(*larger), spatial_divergence(teacher, student))


def test_only_the_trained_student_has_attention(textures, tmp_path):
    options = TrainingOptions(method="stfpm", image_size=(64, 64), steps=1, method_options={"dcam": "true"})
    detector = train(training_samples(str(textures)), options, tmp_path / "checkpoint").detector
    assert [name for name in load_file(tmp_path / "checkpoint") if name.startswith("model.attention.0.")]
    assert {name.split(".")[0] for name, _ in detector.named_parameters()} == {"teacher", "student"}
