"""Classes that come, go and change: train --add-to, and export of several models or of some classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_here, validate
from fast_exports import keep_registry
from PIL import Image
from sklearn.metrics import roc_auc_score

import uadtool
from uadtool.errors import UadtoolError
from uadtool.lab.detectors import patch_memory
from uadtool.lab.detectors.contract import ROWS
from uadtool.lab.export import export
from uadtool.lab.few_images import FEW
from uadtool.lab.models import load_model, save_model
from uadtool.lab.rows import Model, choose, join, tables

keep_registry()
OLD, NEW = ("dots", "stripes"), "bricks"


COLOURS = {"dots": (40, 90, 200), "stripes": (60, 170, 60), NEW: (200, 60, 60)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Classes of different colours in MVTec layout, 20 images to train on and 8 + 8 to test; blots are defects."""
    root, random = tmp_path_factory.mktemp("parts") / "parts", np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for name, colour in COLOURS.items():
        for split, kind, count in (("train", "good", 20), ("test", "good", 8), ("test", "blot", 8)):
            folder = root / name / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                wave = np.sin(x * 0.8) * (np.sin(y * 0.8) if name == "dots" else 1)
                pixels = colour + 30 * wave[..., None] + random.normal(0, 5, (64, 64, 3))
                if kind == "blot":
                    left, top = random.integers(8, 40, 2)
                    pixels[top:top + 14, left:left + 14] = (240, 230, 30)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def base(parts, random_teacher, tmp_path_factory):
    """Paths of a model of the old classes, by precision."""
    folder = tmp_path_factory.mktemp("base")
    paths = {name: folder / f"{name}.safetensors" for name in ("fp32", "int8", "openvino", "fp16")}
    classes = ("--classes", ",".join(OLD))
    run_here("train", parts, *classes, "-o", paths["fp32"], *random_teacher, "--image-size", 64, "--option",
             "entries=400")
    run_here("calibrate", paths["fp32"], parts, *classes, "-o", folder / "ranges.json")
    for name, target in (("int8", "onnxruntime"), ("openvino", "openvino")):
        run_here("quantize", paths["fp32"], "--ranges", folder / "ranges.json", "--target", target, "-o", paths[name])
    run_here("quantize", paths["fp32"], "--precision", "fp16", "--target", "tensorrt", "-o", paths["fp16"])
    return paths


@pytest.fixture(scope="module")
def grown(parts, base, tmp_path_factory):
    """The path of the model with the new class, by precision."""
    folder, made = tmp_path_factory.mktemp("grown"), {}

    def grown(name):
        if name not in made:
            made[name] = folder / f"{name}.safetensors"
            record = json.loads(run_here("train", parts, "--classes", NEW, "--add-to", base[name], "-o", made[name]))
            validate(record, "train")
            assert record["classes"] == {NEW: {"training": 16, "held_out": 4, "copies": 0, "recognised": 4}}
        return made[name]

    return grown


def scored(path, *folders, runtime="torch"):
    """Each image with its prediction."""
    model = uadtool.open_model(str(path), runtime=runtime)
    return [(image, prediction) for image, prediction in uadtool.predict(model, [str(folder) for folder in folders])]


def exported(path, folder, *options):
    output = folder / f"{path.stem}{len(list(folder.iterdir()))}.onnx"
    validate(json.loads(run_here("export", path, "-o", output, *options)), "export")
    return output


# Add


@pytest.mark.parametrize("name", ["fp32", "int8", *(pytest.param(name, marks=pytest.mark.slow)
                                                    for name in ("openvino", "fp16"))])
def test_a_class_is_added_and_the_others_keep_every_bit(parts, base, grown, name, tmp_path):
    old = [parts / name for name in OLD]
    for runtime in ("torch", "onnxruntime") if name in ("fp32", "int8") else ("torch",):
        before, after = base[name], grown(name)
        if runtime == "onnxruntime":
            before, after = exported(before, tmp_path), exported(after, tmp_path)
        pairs = list(zip(scored(before, *old, runtime=runtime), scored(after, *old, runtime=runtime)))
        assert len(pairs) == 32
        for (_, one), (_, other) in pairs:
            assert one.nearest_class == other.nearest_class
            assert (one.score, one.raw_score, one.class_distance) == (other.score, other.raw_score,
                                                                      other.class_distance)
            assert np.array_equal(one.anomaly_map, other.anomaly_map)
    (module, metadata), (_, old_metadata) = load_model(grown(name)), load_model(base[name])
    assert metadata.classes == sorted((*OLD, NEW)) == list(dict(sorted(metadata.thresholds.items())))
    assert {key: metadata.thresholds[key] for key in OLD} == old_metadata.thresholds
    assert metadata.threshold == old_metadata.threshold
    assert module.prototypes.isfinite().all()


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_the_new_class_is_judged_as_if_it_had_been_there_from_the_start(parts, grown, name):
    results = scored(grown(name), parts / NEW)
    assert {prediction.nearest_class for _, prediction in results} == {NEW}
    good = [image.label == "good" for image, _ in results]
    scores = [prediction.score for _, prediction in results]
    assert roc_auc_score(np.logical_not(good), scores) >= 0.95
    threshold = load_model(grown(name))[1].thresholds[NEW]
    assert np.mean([score > threshold for score, fine in zip(scores, good) if fine]) <= 0.25


def test_images_that_are_taken_for_a_new_class_are_named(parts, base, tmp_path, caplog):
    shutil.copytree(parts / "dots", tmp_path / "more" / "spots")
    run_here("train", tmp_path / "more", "--add-to", base["fp32"], "-o", tmp_path / "m.safetensors")
    found = " ".join(record.getMessage() for record in caplog.records)
    assert "images of dots are now taken for spots" in found or "dots and spots are taken for the other" in found


# More images, few images


def test_what_an_operator_cleared_no_longer_alarms_and_defects_still_do(parts, base, tmp_path):
    for number, path in enumerate(sorted((parts / "dots" / "test" / "good").iterdir())):
        with Image.open(path) as image:
            pixels = np.asarray(image).astype(int)
        pixels[8:24, 8:56] += 25  # a brighter band
        target = tmp_path / ("more/dots/train/good" if number % 2 else "rest/dots/test/good") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target)
    record = json.loads(run_here("train", tmp_path / "more", "--add-to", base["fp32"], "--extend", "dots", "-o",
                                   tmp_path / "m.safetensors"))
    assert record["classes"] == {"dots": {"training": 4, "held_out": 0, "copies": 0}}
    threshold = load_model(base["fp32"])[1].thresholds["dots"]
    paths = base["fp32"], tmp_path / "m.safetensors"
    rest, good, blots = ([[prediction.score for _, prediction in scored(path, folder)] for path in paths]
                         for folder in (tmp_path / "rest", parts / "dots/test/good", parts / "dots/test/blot"))
    assert min(rest[0]) > 10 * threshold
    assert max(rest[1]) < 0.2 * min(rest[0])  # random features tell even these from one another
    assert abs(np.mean(good[1]) - np.mean(good[0])) < 1
    assert min(map(min, blots)) > threshold
    before, after = scored(base["fp32"], parts / "stripes"), scored(tmp_path / "m.safetensors", parts / "stripes")
    assert [one.score for _, one in before] == [one.score for _, one in after]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_few_images_are_all_used_and_still_judge_new_ones(parts, base, tmp_path, count):
    for path in sorted((parts / NEW / "train" / "good").iterdir())[:count]:
        target = tmp_path / NEW / "train" / "good" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    record = json.loads(run_here("train", tmp_path, "--add-to", base["int8"], "-o", tmp_path / "m.safetensors"))
    counts = {"training": count, "held_out": count, "copies": 0, "recognised": count}
    assert counts.items() <= record["classes"][NEW].items()
    assert count < FEW
    results = [(image.label, prediction) for image, prediction in scored(tmp_path / "m.safetensors", parts / NEW)
               if prediction.nearest_class == NEW]
    assert len(results) >= 14
    assert roc_auc_score([label != "good" for label, _ in results], [one.score for _, one in results]) >= 0.9
    threshold = load_model(tmp_path / "m.safetensors")[1].thresholds[NEW]
    assert np.mean([one.score > threshold for label, one in results if label == "good"]) <= 0.5


def test_few_images_with_more_patches_than_a_sample_has(parts, base, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_memory, "CANDIDATES", 100)
    for path in sorted((parts / NEW / "train" / "good").iterdir())[:4]:
        target = tmp_path / NEW / "train" / "good" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    record = json.loads(run_here("train", tmp_path, "--add-to", base["fp32"], "-o", tmp_path / "m.safetensors"))
    counts = {"training": 4, "held_out": 4, "copies": 0, "recognised": 4}
    assert counts.items() <= record["classes"][NEW].items()


# Join, choose


@pytest.fixture(scope="module")
def branches(parts, base, tmp_path_factory):
    """Two models that grew from one base, by different classes."""
    folder = tmp_path_factory.mktemp("branches")
    shutil.copytree(parts / NEW, folder / "data" / "negative")
    for name, source in (("one", parts), ("other", folder / "data")):
        run_here("train", source, "--classes", NEW if name == "one" else "negative", "--add-to", base["int8"], "-o",
                 folder / f"{name}.safetensors")
    return folder / "one.safetensors", folder / "other.safetensors"


def test_models_are_joined_exactly_in_any_order(branches, tmp_path):
    one, other = branches
    for name, pair in (("a", (one, other)), ("b", (other, one)), ("c", (one, other, one))):
        validate(json.loads(run_here("export", *pair, "-o", tmp_path / f"{name}.safetensors")), "export")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    module, metadata = load_model(tmp_path / "a.safetensors")
    assert metadata.classes == sorted((*OLD, NEW, "negative"))
    again, _ = load_model(tmp_path / "c.safetensors")
    assert all(torch.equal(module.state_dict()[name], again.state_dict()[name]) for name in module.state_dict())
    for path in branches:
        part, part_metadata = load_model(path)
        chosen = choose(Model(module, metadata), part_metadata.classes)
        assert chosen.metadata.thresholds == part_metadata.thresholds
        assert all(torch.equal(tensor, chosen.module.state_dict()[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("options", [pytest.param(("--classes", "dots"), marks=pytest.mark.slow),
                                     ("--drop", f"stripes,{NEW}")])
def test_some_classes_make_a_smaller_file_with_the_same_scores(parts, grown, tmp_path, options):
    whole, some = exported(grown("int8"), tmp_path), exported(grown("int8"), tmp_path, *options)
    assert some.stat().st_size < whole.stat().st_size
    before, after = (scored(path, parts / "dots", runtime="onnxruntime") for path in (whole, some))
    for (_, one), (_, other) in zip(before, after):
        assert (one.score, one.nearest_class) == (other.score, other.nearest_class)
        assert np.array_equal(one.anomaly_map, other.anomaly_map)


@pytest.mark.slow
def test_thirteen_classes_are_exported(grown, tmp_path):
    """As many as the images with which the exporter runs a model."""
    module, metadata = load_model(grown("fp32"))
    names = tables(module)
    copies = [Model(*load_model(grown("fp32")), "copy")]
    for number in range(10):
        one = choose(Model(module, metadata), ["dots"])
        copies.append(Model(one.module, one.metadata.replace(classes=[f"dots{number}"], thresholds={}, good_scores={})))
    many = join(copies)
    assert len(many.metadata.classes) == 13
    assert all(len(many.module.state_dict()[name]) == 13 for name in names & many.module.state_dict().keys())
    _, parity = export(many.module, many.metadata, "sha256:" + "0" * 64)
    assert parity["score_difference"] <= parity["tolerance"]


def test_every_table_is_known(grown):
    """A tensor whose first size is the number of classes is a row of one."""
    for name in ("fp32", "int8"):
        module, metadata = load_model(grown(name))
        found = {name for name, tensor in module.state_dict().items()
                 if tensor.dim() and len(tensor) == len(metadata.classes) and not name.startswith("teacher")}
        assert found == tables(module) & module.state_dict().keys()
        assert set(ROWS) <= found


# Refusals


@pytest.mark.parametrize(("options", "message"), [
    ((), r"fp32.safetensors already has dots, stripes; name them after --replace to learn them anew, or"),
    (("--classes", NEW, "--extend", "dots"), r"there are no images of dots, which --replace or --extend names"),
    (("--classes", "dots", "--replace", "dots", "--extend", "dots"),
     r"^--replace and --extend both name dots; take one"),
    (("--classes", NEW, "--replace", "knots"), r"fp32.safetensors has no class knots; it has dots, stripes"),
])
def test_classes_that_cannot_be_added(parts, base, tmp_path, options, message):
    with pytest.raises(UadtoolError, match=message):
        run_here("train", parts, "--add-to", base["fp32"], *options, "-o", tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_grown_model_is_not_quantized_with_images(parts, base, grown, tmp_path):
    run_here("calibrate", grown("fp32"), parts, "-o", tmp_path / "ranges.json")
    with pytest.raises(UadtoolError, match=r"^classes were added to this model later; quantize the model that they"):
        run_here("quantize", grown("fp32"), parts, "--ranges", tmp_path / "ranges.json", "-o",
                 tmp_path / "m.safetensors")


def test_ranges_that_do_not_cover_a_class_are_refused(parts, base, tmp_path):
    module, metadata = load_model(base["int8"])
    *_, point = module.points.children()
    assert point.cut_off(torch.zeros(3)) == 0
    point.scale.div_(20)
    assert point.cut_off(torch.tensor([-1.0, 0.0, 1.0]) * 1000) >= 1 / 3
    save_model(module, metadata, tmp_path / "narrow.safetensors")
    with pytest.raises(UadtoolError, match=r"^the int8 ranges of .*narrow.safetensors cut off \d\d% of the activ"):
        run_here("train", parts, "--classes", NEW, "--add-to", tmp_path / "narrow.safetensors", "-o",
                 tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_method_without_rows_takes_no_classes(trained, parts, tmp_path):
    with pytest.raises(UadtoolError, match=r"^stfpm learns all classes together; train again with the images of all"):
        run_here("train", parts, "--classes", NEW, "--add-to", trained.path, "-o", tmp_path / "m.safetensors")


def test_models_of_different_bases_are_not_joined(base, grown, tmp_path):
    with pytest.raises(UadtoolError, match=r"did not grow from one base: theirs are sha256:\w{12} and sha256:\w{12}"):
        run_here("export", grown("fp32"), base["int8"], "-o", tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_class_with_two_rows_is_not_joined(parts, base, grown, tmp_path):
    for path in sorted((parts / NEW / "train" / "good").iterdir())[:12]:
        target = tmp_path / "data" / NEW / "train" / "good" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    run_here("train", tmp_path / "data", "--add-to", base["fp32"], "-o", tmp_path / "other.safetensors")
    with pytest.raises(UadtoolError, match=rf"^the class {NEW} of .* is not that of .*; leave one out with --drop$"):
        run_here("export", grown("fp32"), tmp_path / "other.safetensors", "-o", tmp_path / "m.safetensors")
    run_here("train", tmp_path / "data", "--add-to", grown("fp32"), "--replace", NEW, "-o", tmp_path / "m.safetensors")
    one, other = (load_model(tmp_path / f"{name}.safetensors")[0] for name in ("m", "other"))
    assert torch.equal(one.memories[0].bank, other.memories[0].bank)


def test_no_class_is_left(base, tmp_path):
    with pytest.raises(UadtoolError, match=r"^no class of .*fp32.safetensors would be left$"):
        run_here("export", base["fp32"], "--drop", "dots,stripes", "-o", tmp_path / "m.onnx")
