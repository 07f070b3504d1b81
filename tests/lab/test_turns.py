"""Classes of few images that are also learned turned and mirrored: train --turns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_here, validate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.dataset import training_samples
from uadtool.lab import grow
from uadtool.lab.models import load_model
from uadtool.lab.training.data import turned
from uadtool.lab.turns import in_copies, turned_samples

SIDE = 64
CLASSES = {"dots": 12, "grain": 4, "stripes": 4, "wide": 3}
"""Numbers of images. Grain looks the same in all directions; stripes only when they stay upright."""


@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 5))
def test_turns_are_those_of_pillow(turn, height, width):
    pixels = np.random.default_rng(turn).integers(0, 255, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).rotate(90 * (turn % 4), expand=True)
    if turn >= 4:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(turned(pixels, turn), np.asarray(image))


def test_all_turns_differ():
    image = np.arange(9).reshape(3, 3)
    assert len({turned(image, turn).tobytes() for turn in range(8)}) == 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("turns") / "parts", np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for name, count in CLASSES.items():
        folder = root / name / "train/good"
        folder.mkdir(parents=True)
        for number in range(count):
            phase, noise = random.uniform(0, 6), random.normal(0, 1, (SIDE, SIDE))
            wave = {"dots": np.sin(0.8 * x) * np.sin(0.8 * y) + 0.2 * noise, "grain": noise,
                    "stripes": np.sin(0.8 * x + phase) + 0.2 * noise}.get(name, noise)
            size = (SIDE, 2 * SIDE) if name == "wide" else (SIDE, SIDE)
            pixels = np.array([90, 120, 60]) + 40 * wave[..., None]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(size[::-1]).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def base(parts, random_teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    run_here("train", parts, "--classes", "dots", "-o", path, *random_teacher, "--image-size", SIDE, "--option",
             "entries=200")
    return path


@pytest.fixture
def added(parts, base, tmp_path, monkeypatch):
    """Add classes: the turns of each that were learned, and the path of the model."""
    def add(classes, *options):
        found = {}

        def noted(part, run, *arguments):
            samples = turned_samples(part, run, *arguments)
            found.update({name: {sample.turn for sample in samples if sample.class_name == name} for name in classes})
            return samples

        monkeypatch.setattr(grow, "turned_samples", noted)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        record = json.loads(run_here("train", parts, "--classes", ",".join(classes), "--add-to", base, "-o", path,
                                     *options))
        validate(record, "train")
        assert all(set(record["classes"][name].get("turns", [])) == found[name] - {0} for name in classes)
        assert {name: record["classes"][name]["training"] for name in classes} == {n: CLASSES[n] for n in classes}
        return found, path

    return add


def test_images_show_which_turns_are_free(added):
    found, path = added(["grain", "stripes", "wide"])
    assert found["grain"] == set(range(8))
    assert found["stripes"] == {0, 2, 4, 6}
    assert found["wide"] <= {0, 2, 4, 6}
    assert load_model(path)[1].classes == sorted(CLASSES)


def test_all_or_none_by_option(added):
    (all_turns, yes), (_, no) = (added(["stripes", "wide"], "--turns", option) for option in ("yes", "no"))
    assert all_turns == {"stripes": set(range(8)), "wide": {0, 2, 4, 6}}
    banks = [load_model(path)[0].state_dict()["memories.0.bank"] for path in (yes, no)]
    assert not torch.equal(*banks)


def test_a_part_that_is_left_out_is_left_out_of_turned_copies(parts):
    """Otherwise it would find itself there, and thresholds would be too low."""
    upright = training_samples(str(parts), ["grain"])[:1]
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, :2, :2] = 1
    quarter = in_copies(mask, upright, [*upright, *(
        replace(upright[0], turn=turn) for turn in range(1, 8))])
    for turn, one in enumerate(quarter):
        assert np.array_equal(one[0].numpy(), turned(mask[0, 0].numpy(), turn))
    assert {tuple(map(int, one[0].nonzero()[0])) for one in quarter} == {(0, 0), (0, 2), (2, 0), (2, 2)}


def test_a_turn_that_moves_the_region_of_interest_is_left_out(parts, added, tmp_path):
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, :SIDE // 2] = 255
    (tmp_path / "rois").mkdir()
    Image.fromarray(region).save(tmp_path / "rois/grain.png")
    found, path = added(["grain", "stripes"], "--turns", "yes", "--roi", tmp_path / "rois")
    assert found == {"grain": {0, 6}, "stripes": set(range(8))}  # mirrored after half a turn: upside down
    assert load_model(path)[0].roi.float().mean((1, 2)).tolist() == [1, 0.5, 1]


def test_one_image_with_a_small_region(parts, added, tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        (parts / "grain/train/good" / name).rename(tmp_path / name)
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:20, :20] = 255
    Image.fromarray(region).save(tmp_path / "roi.png")
    try:
        CLASSES["grain"] = 1
        _, path = added(["grain"], "--roi", tmp_path / "roi.png")
    finally:
        CLASSES["grain"] = 4
        for name in ("1.png", "2.png", "3.png"):
            (tmp_path / name).rename(parts / "grain/train/good" / name)
    detector, metadata = load_model(path)
    assert detector.score_std.isfinite().all()
    assert metadata.thresholds["grain"] > 0


def test_copies_do_not_narrow_the_distances_of_a_class(added):
    """Each image counts once: as many distances as images, and as far."""
    models = [load_model(added(["grain"], "--turns", option)[1]) for option in ("no", "yes")]
    (mean, std), (turned_mean, turned_std) = (
        [table[1].item() for table in (detector.distance_mean, detector.distance_std)] for detector, _ in models)
    assert [len(metadata.good_distances["grain"]) for _, metadata in models] == [4, 4]
    assert turned_mean == pytest.approx(mean, rel=0.3)
    assert turned_std > std / 2
