"""Regions of interest in models: what lies outside counts nowhere."""

import json

import numpy as np
import onnx
import pytest
import torch
from conftest import run_here, validate
from fast_exports import keep_registry
from PIL import Image
from sklearn.metrics import roc_auc_score

import uadtool
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.detectors.patch_memory import sample_all
from uadtool.lab.detectors.registry import find_method, method_options
from uadtool.lab.models import assemble, load_model
from uadtool.lab.quantization.sensitivity import map_distance
from uadtool.scoring.anomaly_maps import OUTSIDE, inside_roi

keep_registry()
SIDE = 64
LEFT = np.arange(8) < 4 * np.ones((8, 1))
"""The cells of the anomaly map that count."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A class in the left half of images whose right half is never the same, and one without such a background."""
    root, random = tmp_path_factory.mktemp("roi") / "parts", np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for name, colour in (("moving", (40, 90, 200)), ("still", (200, 90, 40))):
        for place, count in (("train/good", 20), ("test/good", 12), ("test/blot", 12)):
            folder = root / name / place
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = colour + 30 * np.sin(0.8 * x)[..., None] + random.normal(0, 5, (SIDE, SIDE, 3))
                if place == "test/blot":
                    top, left = random.integers(6, 48), random.integers(4, 16)
                    pixels[top:top + 10, left:left + 10] = (90, 160, 90)
                if name == "moving":
                    period = random.uniform(0.2, 1)
                    wave = np.sin(period * (x + y) + random.uniform(0, 6))
                    pixels[:, SIDE // 2:] = (random.integers(0, 255, 3) + 60 * wave[..., None])[:, SIDE // 2:]
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, :SIDE // 2] = 255
    Image.fromarray(region).save(root / "roi.png")  # no class folder, so only --roi finds it
    return root


@pytest.fixture(scope="module")
def trained(parts, random_teacher, tmp_path_factory):
    """Train a model with these options, or find it: its path and record."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    (folder / "rois").mkdir()
    (folder / "rois/moving.png").write_bytes((parts / "roi.png").read_bytes())

    def train(*options, base=None):
        if (options, base) not in made:
            path = folder / f"{len(made)}.safetensors"
            fixed = ["--add-to", base] if base else [*random_teacher, "--image-size", SIDE]
            given = [folder / "rois" if option == "rois" else option for option in options]
            record = json.loads(run_here("train", parts, "-o", path, *fixed, *given))
            validate(record, "train")
            made[options, base] = path, record
        return made[options, base]

    return train


WITH = ("--roi", "rois", "--option", "entries=100")


@pytest.fixture(scope="module")
def model(trained):
    return trained(*WITH)[0]


def scored(path, folder, runtime="torch"):
    opened = uadtool.open_model(str(path), runtime=runtime)
    return [(sample, prediction) for sample, prediction in uadtool.predict(opened, str(folder))]


def auroc(path, folder):
    pairs = scored(path, folder)
    return roc_auc_score([sample.label == "anomalous" for sample, _ in pairs], [found.score for _, found in pairs])


def test_defects_are_found_beside_a_background_that_moves(parts, trained, model):
    without = trained("--option", "entries=100")[0]
    assert auroc(without, parts / "moving") < 0.85
    assert auroc(model, parts / "moving") > 0.95
    assert auroc(model, parts / "still") >= auroc(without, parts / "still") - 0.01


def test_the_record_reports_the_share(trained):
    record = trained(*WITH)[1]
    assert record["classes"]["moving"]["roi"] == 0.5
    assert "roi" not in record["classes"]["still"]


def test_the_map_ends_where_the_region_of_its_class_ends(parts, model):
    for name, expected in (("moving", LEFT), ("still", np.ones_like(LEFT))):
        for _, found in scored(model, parts / name):
            assert found.nearest_class == name
            assert np.array_equal(inside_roi(found.anomaly_map), expected)
            assert (found.anomaly_map[expected] > -100).all()


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_and_exported_models_keep_it(parts, model, tmp_path, target):
    run_here("calibrate", model, parts, "--count", 8, "-o", tmp_path / "ranges.json")
    run_here("quantize", model, parts, "--ranges", tmp_path / "ranges.json", "--target", target,
             "-o", tmp_path / "int8.safetensors")
    run_here("export", tmp_path / "int8.safetensors", "-o", tmp_path / "int8.onnx")
    found = scored(tmp_path / "int8.onnx", parts / "moving", target)
    assert all(np.array_equal(inside_roi(one.anomaly_map), LEFT) for _, one in found)
    scores = [(sample.label == "anomalous", one.score) for sample, one in found]
    assert roc_auc_score(*zip(*scores)) > 0.95


def test_a_class_that_comes_later_brings_its_own(parts, trained, tmp_path):
    base = trained("--classes", "still", "--option", "entries=100")[0]
    grown, record = trained("--classes", "moving", "--roi", "rois", base=base)
    assert record["classes"]["moving"]["roi"] == 0.5
    assert auroc(grown, parts / "moving") > 0.95
    run_here("export", grown, "--classes", "moving", "-o", tmp_path / "one.onnx")
    assert all(np.array_equal(inside_roi(one.anomaly_map), LEFT)
               for _, one in scored(tmp_path / "one.onnx", parts / "moving", "onnxruntime"))
    assert all(inside_roi(one.anomaly_map).all() for _, one in scored(grown, parts / "still"))


def test_of_few_images_too(parts, trained, tmp_path):
    folder = tmp_path / "parts/moving/train/good"
    folder.mkdir(parents=True)
    for name in ("00.png", "01.png", "02.png"):
        (folder / name).write_bytes((parts / "moving/train/good" / name).read_bytes())
    (folder.parents[1] / "roi.png").write_bytes((parts / "roi.png").read_bytes())
    base = trained("--classes", "still", "--option", "entries=100")[0]
    run_here("train", tmp_path / "parts", "-o", tmp_path / "few.safetensors", "--add-to", base)
    assert auroc(tmp_path / "few.safetensors", parts / "moving") > 0.9


def test_more_images_of_a_class_keep_its_region(parts, model, trained, tmp_path):
    more = ("--classes", "moving", "--extend", "moving")
    assert torch.equal(*(load_model(path)[0].roi for path in (model, trained(*more, base=model)[0])))
    trained(*more, "--roi", "rois", base=model)
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "all.png")
    with pytest.raises(UadtoolError, match=r"keeps the region of interest of moving, and .*all\.png marks another"):
        trained(*more, "--roi", tmp_path / "all.png", base=model)


def test_patches_come_from_inside():
    features = torch.arange(64.0).view(1, 1, 8, 8), torch.arange(16.0).view(1, 1, 4, 4)
    roi = torch.zeros(8, 8, dtype=torch.bool)
    roi[:, :4] = True
    fine, coarse = sample_all([features], 1, 0, roi)
    assert sorted(fine.flatten().tolist()) == [place for place in range(64) if place % 8 < 4]
    assert sorted(coarse.flatten().tolist()) == [place for place in range(16) if place % 4 < 3]  # and one beyond


def test_the_value_outside_is_exact_in_half_precision():
    assert np.float16(OUTSIDE) == OUTSIDE


@pytest.mark.parametrize("method", ["stfpm", "us", "rd", "dinomaly", "duet"])
def test_every_method_takes_regions(method):
    torch.manual_seed(0)
    detector = find_method(method)("mobilenetv2_035", (SIDE, SIDE), 2, **method_options(method, {})).eval()
    height, width = detector.map_size
    detector.set_rois(["a", "b"], {"b": np.arange(width) < width // 2 * np.ones((height, 1), bool)})
    with torch.inference_mode():
        output = OutputTensors(*detector(torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8)))
    for one, nearest in zip(output.anomaly_map.numpy(), output.nearest_class.tolist()):
        assert inside_roi(one).mean() == (0.5 if nearest else 1)


def test_a_model_without_regions_has_no_operations_for_them(model, trained, tmp_path):
    operators = {}
    for name, path in (("with", model), ("without", trained("--option", "entries=100")[0])):
        run_here("export", path, "-o", tmp_path / f"{name}.onnx")
        operators[name] = [node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node]
    assert operators["with"].count("Where") == 2
    assert "Where" not in operators["without"]


def test_maps_are_compared_where_both_lie_inside():
    maps = torch.randn(2, 3, 4, 4)
    expected = (maps[0, :, :, :2] - maps[1, :, :, :2]).square().mean().sqrt()
    maps[0, :, :, 2:] = OUTSIDE
    assert map_distance(maps[0], maps[1]) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_from_before_there_were_regions_has_none(model, tmp_path):
    module, metadata = load_model(model)
    tensors = module.state_dict()
    del tensors["roi"]
    assert assemble(tensors, metadata, "old").roi.all()
