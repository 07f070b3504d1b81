"""Options of STFPM: stages that teacher and student share (PaSTe)."""

import json

import pytest
import torch
from conftest import METADATA, validate
from torch import nn
from torch.nn import functional as F

from uadtool.detectors.backbones import build_backbone
from uadtool.detectors.complexity import count_macs
from uadtool.detectors.stfpm import STFPM
from uadtool.errors import UadtoolError
from uadtool.models import load_model
from uadtool.onnx_export import parity_images, to_onnx
from uadtool.onnx_export.deployed import open_proto
from uadtool.quantization import TARGETS, calibrate, layers_outside, quantize
from uadtool.quantization.modules import QuantizedConv2d

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
        raw, descriptor = detector.raw_map_and_descriptor(pixels)
        pairs = list(zip(detector.teacher(pixels), whole(pixels)))
    assert all(torch.equal(t, s) for t, s in pairs[:stages])
    size = pairs[stages][0].shape[2:]
    assert detector.map_size == raw.shape[1:] == size
    maps = [F.interpolate(1 - F.cosine_similarity(t, s)[:, None], size=size, mode="bilinear")
            for t, s in pairs[stages:]]
    assert len(maps) == 3 - stages
    torch.testing.assert_close(raw, sum(maps)[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(descriptor, torch.cat([t.mean((2, 3)) for t, _ in pairs], dim=1))


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


@pytest.mark.parametrize(("teacher", "stages"), [("tf_efficientnet_lite0", 2), ("resnet18", 1)])
def test_a_deployed_int8_detector_with_shared_stages_computes_what_torch_does(teacher, stages):
    detector = random_stfpm(teacher, stages).fold_batch_norm()
    images = torch.from_numpy(parity_images(None, SIZE))
    model = quantize(detector, calibrate(detector, [images]), images=images)
    layers = [module for module in model.modules() if isinstance(module, QuantizedConv2d)]
    assert len(layers) == len(convolutions(detector))
    proto = to_onnx(model, METADATA.replace(image_size=SIZE, map_size=detector.map_size))
    found = torch.from_numpy(open_proto(proto).run(images.numpy()).anomaly_map)
    with torch.inference_mode():
        exact, rounded = detector(images).anomaly_map, model(images).anomaly_map
    error = (rounded - exact).abs().mean()
    assert 0 < error < 0.1 * exact.mean()
    assert (found - rounded).abs().mean() < 0.2 * error


def test_scope_student_leaves_the_shared_stages_in_float():
    detector = random_stfpm("resnet18", 1).fold_batch_norm()
    outside = layers_outside(detector, "student")
    assert outside == [f"teacher.{name}" for name in convolutions(detector.teacher)]
    images = torch.from_numpy(parity_images(None, SIZE))
    model = quantize(detector, calibrate(detector, [images]), TARGETS["tensorrt"], outside)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedConv2d)}
    assert quantized == {f"student.{name}" for name in convolutions(detector.student)}
    rounded = [name for name, _ in model.points.named_children() if not name.startswith("student_")]
    assert rounded == ["teacher_layer1_1_act2"]  # the feature map that the student starts from


def test_a_number_of_stages_that_cannot_be_shared_is_refused():
    with pytest.raises(UadtoolError, match="stfpm cannot share 3 stages; take 0, 1 or 2"):
        STFPM("resnet18", SIZE, 2, shared_stages=3)


# The whole chain


def test_the_chain(step, uadtool, textures):
    def auroc(model):
        onnx = step("export", model.path, "--images", textures, output=f"{model.path.stem}.onnx")
        done = uadtool("score", onnx.path, textures)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["metrics"]["image_auroc"]["pooled"]

    trained = step("train", textures, "--option", "shared_stages=1", "--image-size", 64,
                   "--epochs", 20, output="stfpm.safetensors")
    validate(trained.record, "train")
    _, metadata = load_model(trained.path)
    assert metadata.options == {"fusion": "sum", "shared_stages": 1}
    assert metadata.map_size == (8, 8)
    ranges = step("calibrate", trained.path, textures, "--count", 16, output="stfpm.json")
    int8 = step("quantize", trained.path, textures, "--ranges", ranges.path, output="stfpm-int8.safetensors")
    expected = auroc(trained)
    assert expected > 0.9
    assert auroc(int8) == pytest.approx(expected, abs=0.05)
