"""Several sizes in one file: train --sizes, export --size."""

import json

import numpy as np
import pytest
import torch
from conftest import run_here, validate
from fast_exports import keep_registry

import uadtool
from uadtool.errors import UadtoolError
from uadtool.lab.models import load_model, save_model
from uadtool.lab.rows import Model, choose, join
from uadtool.lab.sizes import at_size

keep_registry()
SIZES = (50, 100, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes")


def trained(folder, textures, name, *options):
    path = folder / f"{name}.safetensors"
    if not path.exists():
        validate(json.loads(run_here("train", textures, "--image-size", 64, "-o", path, *options)), "train")
    return path


@pytest.fixture(scope="module")
def model(folder, textures):
    """The path of a model of three sizes, not given in order."""
    return trained(folder, textures, "model", "--sizes", "100,50,200")


@pytest.fixture(scope="module")
def int8(folder, model, textures):
    run_here("calibrate", model, textures, "--count", 8, "-o", folder / "ranges.json")
    run_here("quantize", model, textures, "--ranges", folder / "ranges.json", "-o", folder / "int8.safetensors")
    return folder / "int8.safetensors"


def at(path, entries):
    return at_size(Model(*load_model(path), str(path)), entries)


def differences(one, other):
    """The names of tensors that differ."""
    a, b = one.module.state_dict(), other.module.state_dict()
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("entries", SIZES)
def test_a_size_is_what_a_training_of_that_size_alone_gives(folder, model, textures, entries):
    alone = trained(folder, textures, f"alone-{entries}", "--option", f"entries={entries}")
    expected, found = Model(*load_model(alone)), at(model, entries)
    assert [size["entries"] for size in found.metadata.sizes] == [size for size in SIZES if size < entries]
    if entries == SIZES[0]:
        assert differences(expected, found) == []
    for name in ("threshold", "thresholds", "good_scores", "map_units", "options", "parameters", "macs", "map_size"):
        assert getattr(found.metadata, name) == getattr(expected.metadata, name)


def test_export_writes_one_size(folder, model, textures):
    small, smaller = folder / "small.safetensors", folder / "smaller.onnx"
    record = json.loads(run_here("export", model, "--size", 100, "-o", small))
    validate(record, "export")
    assert load_model(small)[1].options["entries"] == 100
    validate(json.loads(run_here("export", small, "--size", 50, "--images", textures, "-o", smaller)), "export")
    alone = trained(folder, textures, "alone-50", "--option", "entries=50")
    expected = {path: record["score"] for path, record in scores(alone, textures).items()}
    assert {path: record["score"] for path, record in scores(smaller, textures).items()} == pytest.approx(
        expected, abs=0.01)
    assert uadtool.open_model(str(smaller)).metadata.sizes == []


def scores(path, textures):
    lines = map(json.loads, run_here("score", path, textures, *(
        ("--runtime", "torch") if path.suffix == ".safetensors" else ())).splitlines())
    return {line["path"]: line for line in lines if line["type"] == "image"}


def test_each_size_has_thresholds_that_its_own_good_images_keep(model, textures):
    """With the statistics of another size they would not."""
    wrong, right = at(model, 50), at(model, 50)
    whole = Model(*load_model(model))
    for name in ("expected_maps", "map_spreads", "score_mean", "score_std"):
        wrong.module.get_buffer(name).copy_(whole.module.get_buffer(name))
    images = torch.from_numpy(np.stack([image for _, image in held_out(textures)]))
    with torch.inference_mode():
        rates = [(one.module(images).score > right.metadata.threshold).float().mean() for one in (right, wrong)]
    assert rates[0] <= 0.25
    assert rates[1] >= rates[0] + 0.3


def held_out(textures):
    from uadtool.data.images import read_image

    paths = sorted(textures.glob("*/test/good/*.png"))
    return [(path, read_image(str(path), (64, 64))) for path in paths]


def test_a_quantized_model_keeps_its_sizes(int8, textures):
    small = at(int8, 50)
    assert small.metadata.precision == "int8"
    assert [size["entries"] for size in small.metadata.sizes] == []
    images = torch.from_numpy(np.stack([image for _, image in held_out(textures)]))
    with torch.inference_mode():
        assert (small.module(images).score > small.metadata.threshold).float().mean() <= 0.25


def test_quantizing_leaves_the_float_model_as_it_is(model, int8):
    assert load_model(model)[1].sizes != load_model(int8)[1].sizes


@pytest.mark.parametrize("kind", ["model", "int8"])
def test_classes_come_and_go_at_every_size(folder, textures, request, kind, tmp_path):
    """A model of one class that gets the other is, at each size, what the whole one would be, but for units."""
    whole = Model(*load_model(request.getfixturevalue(kind)), kind)
    base = choose(whole, ["dots"])
    save_model(base.module, base.metadata, tmp_path / "base.safetensors")
    run_here("train", textures, "--classes", "stripes", "--add-to", tmp_path / "base.safetensors", "-o",
             tmp_path / "grown.safetensors")
    grown = Model(*load_model(tmp_path / "grown.safetensors"))
    for entries in SIZES:
        one, other = at_size(grown, entries), at_size(whole, entries)
        assert one.metadata.classes == ["dots", "stripes"]
        assert one.metadata.thresholds["dots"] == other.metadata.thresholds["dots"]
        assert one.metadata.thresholds["stripes"] == pytest.approx(other.metadata.thresholds["stripes"], abs=0.5)
        assert torch.equal(one.module.get_buffer("map_spreads")[0], other.module.get_buffer("map_spreads")[0])
        images = torch.from_numpy(np.stack([image for path, image in held_out(textures) if "stripes" in str(path)]))
        with torch.inference_mode():
            means = [float(model.module(images).score.mean()) for model in (one, other)]
        assert means[0] == pytest.approx(means[1], abs=0.7)
    both = join([choose(grown, ["stripes"]), base])
    assert differences(both, grown) == []
    assert [size["entries"] for size in both.metadata.sizes] == [50, 100]


def test_what_was_cleared_is_cleared_at_every_size(folder, model, textures, tmp_path):
    run_here("train", textures, "--classes", "dots", "--add-to", model, "--extend", "dots", "-o",
             tmp_path / "m.safetensors")
    extended = Model(*load_model(tmp_path / "m.safetensors"))
    factors = [at_size(extended, entries).module.get_buffer("map_spreads")[0, 0].mean()
               / at(model, entries).module.get_buffer("map_spreads")[0, 0].mean() for entries in SIZES]
    assert factors == pytest.approx([float(factors[-1])] * 3, rel=1e-4)


def test_a_threshold_is_about_one_size(folder, model, textures, tmp_path):
    run_here("export", model, "-o", tmp_path / "m.onnx")
    (tmp_path / "good.jsonl").write_text(run_here("score", tmp_path / "m.onnx", textures))
    run_here("export", model, "--threshold-from", tmp_path / "good.jsonl", "--false-positive-rate", "20%", "-o",
             tmp_path / "m.safetensors")
    before, after = (at(path, 50).metadata for path in (model, tmp_path / "m.safetensors"))
    assert load_model(tmp_path / "m.safetensors")[1].false_positive_rate == 0.2
    assert (after.false_positive_rate, after.thresholds) == (before.false_positive_rate, before.thresholds)
    with pytest.raises(UadtoolError, match="differs in its entries"):
        run_here("export", model, "--size", 50, "--threshold-from", tmp_path / "good.jsonl", "-o",
                 tmp_path / "other.safetensors")


def test_a_quantized_model_finds_its_own_usual_distances(int8, model):
    assert load_model(model)[1].good_distances.keys() == {"dots", "stripes"}
    assert load_model(int8)[1].good_distances == {}


def test_other_sizes_are_refused(folder, model, textures):
    with pytest.raises(UadtoolError, match="has no size 60; it has 50, 100, 200"):
        at(model, 60)
    alone = folder / "stfpm.safetensors"
    with pytest.raises(UadtoolError, match="stfpm has no banks, and so one size"):
        run_here("train", textures, "--method", "stfpm", "--sizes", "50,100", "-o", alone)
