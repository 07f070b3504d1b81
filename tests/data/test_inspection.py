"""Inspecting images: copies, broken files, and images that hold nothing."""

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any, Dict, List

import click
import numpy as np
import pytest
from conftest import run_here, validate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.cli.main import cli
from uadtool.data.check import table
from uadtool.data.inspection import Look, inspect, look_at, near_pairs, originals
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError

PIXELS = np.random.default_rng(0).integers(30, 226, (12, 9, 9, 3), np.uint8)
"""Coarse pictures that all differ."""


def picture(number: int, shift: float = 0) -> Image.Image:
    image = Image.fromarray(PIXELS[number]).resize((96, 96), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(number).normal(shift, 2 * bool(shift), (96, 96, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """The data set with one class, which has twelve different good images and two to test on."""
    folder = tmp_path / "data" / "part"
    for number in range(12):
        save(folder / "train" / "good" / f"{number:02}.png", picture(number))
    save(folder / "test" / "good" / "0.png", picture(0).rotate(90))
    save(folder / "test" / "scratch" / "1.png", picture(1).rotate(90))
    return folder


def good(folder: Path) -> List[Sample]:
    return [Sample(str(path), folder.name, "good") for path in sorted((folder / "train" / "good").iterdir())]


def report(folder: Path, *options: object) -> Dict[str, Any]:
    record: Dict[str, Any] = json.loads(run_here("train", folder.parent, "--check", *options))
    validate(record, "check")
    return record


def test_different_images_are_no_copies(part: Path) -> None:
    inspection = inspect(good(part), 2)
    assert (inspection.originals, inspection.grey_bits, inspection.findings) == (list(range(12)), {}, [])


@pytest.mark.parametrize("suffix", ["png", "bmp", "jpg"])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_copies_are_found_in_any_format_and_with_noise(part: Path, suffix: str, shift: float) -> None:
    for number in (3, 5):
        save(part / "train" / "good" / f"{number:02}-again.{suffix}", picture(number, shift))
    samples = good(part)
    inspection = inspect(samples, 2)
    numbers = [Path(sample.path).name[:2] for sample in samples]
    assert inspection.originals == [numbers.index(number) for number in numbers]
    finding, = inspection.findings
    assert finding.startswith("copies of other images, or nearly;")
    assert finding.endswith(": 2 of 14 in part")


def test_copies_belong_to_a_class(part: Path) -> None:
    samples = good(part)
    assert inspect([*samples, Sample(samples[0].path, "other", "good")], 1).originals == list(range(13))


def test_near_pairs_against_all_pairs() -> None:
    random = np.random.default_rng(0)
    different = random.integers(0, 256, (40, 768))
    thumbnails = np.concatenate([different + random.integers(-k, k + 1, different.shape) for k in (1, 5, 9, 30)])
    thumbnails = thumbnails.clip(0, 255).astype(np.uint8)
    differences = np.abs(thumbnails[:, None].astype(int) - thumbnails).mean(2)
    usual = np.median(differences[np.triu_indices(160, 1)])
    expected = {pair for pair in itertools.combinations(range(160), 2) if differences[pair] < 0.05 * usual}
    assert len(expected) == 40
    assert {(min(pair), max(pair)) for pair in near_pairs(thumbnails)} == expected


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), max_size=12))
def test_originals(images: List[Any]) -> None:
    """Equal pixels are copies within a class, and the first of each group stands for it."""
    looks = [Look(Sample(str(number), str(name)), (1, 1), 8, bytes([content]), PIXELS[content].repeat(4)[:768],
                  (9, 9, 9)) for number, (name, content) in enumerate(images)]
    assert originals(looks) == [images.index(image) for image in images]


def test_all_broken_images_are_named_before_the_teacher_is_loaded(
    part: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = sorted((part / "train" / "good").iterdir())[1:8:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UadtoolError, match=r"^4 of 12 images cannot be read; mend or remove them$"):
        run_here("train", part, "--teacher", "none", "-o", tmp_path / "m.safetensors")  # there is no such teacher
    assert [str(path) in message for path, message in zip(broken, caplog.messages)] == 4 * [True]
    assert [item["path"] for item in look_report(part)["unreadable"]] == list(map(str, broken))


def look_report(folder: Path) -> Dict[str, Any]:
    """The report on data that training would refuse."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(UadtoolError, match="cannot be read"):
        cli.main(["train", str(folder.parent), "--check"], standalone_mode=False)
    record: Dict[str, Any] = json.loads(out.getvalue())
    validate(record, "check")
    assert record["refusal"]
    return record


@pytest.mark.parametrize(("image", "finding"), [
    (Image.new("L", (64, 64)), "blank images"),
    (Image.merge("RGBA", [*picture(0).split(), Image.new("L", (96, 96))]), "blank images"),
    (picture(0).point(lambda value: value // 20), "faint images"),
    (Image.merge("RGB", [*picture(0).split()[:2], Image.new("L", (96, 96), 9)]),
     "images with a constant colour channel"),
])
def test_images_that_hold_nothing_are_counted(part: Path, image: Image.Image, finding: str) -> None:
    save(part / "train" / "good" / "odd.png", image)
    line, = inspect(good(part), 1).findings
    assert line.startswith(finding)
    assert line.endswith("1 of 13 in part")


@pytest.mark.parametrize(("bits", "expected"), [(9, 10), (10, 10), (12, 12), (14, 14), (15, 16)])
def test_the_depth_of_a_class_is_the_fewest_bits_that_fit_all(part: Path, bits: int, expected: int) -> None:
    for number in range(12):
        grey = np.asarray(picture(number).convert("L"), np.uint16)
        deep = grey * np.uint16(2 ** (bits - 8) if number == 7 else 1)
        Image.fromarray(deep).save(part / "train" / "good" / f"{number:02}.png")
    inspection = inspect(good(part), 1)
    assert inspection.grey_bits == {"part": expected}


def test_look_does_not_depend_on_threads(part: Path) -> None:
    one, two = (list(look_at(good(part), threads)) for threads in (1, 4))
    assert [look._replace(thumbnail=0) for _, look in one] == [look._replace(thumbnail=0) for _, look in two]  # type: ignore[union-attr, arg-type]


def test_report_on_a_sound_data_set(part: Path) -> None:
    found = report(part)
    assert found["images"] == 14
    assert found["classes"]["part"] == {
        "train": {"good": 12}, "test": {"good": 1, "anomalous": 1}, "held_out": 3,
        "sizes": [{"height": 96, "width": 96, "images": 14}], "different_sizes": 1, "aspect_ratios": [1.0, 1.0],
        "bits": {"8": 14}}
    assert found["findings"] == ["held-out images: 3, too few for a false-positive rate of 0.01, which takes 99; new "
                                 "good images will exceed the threshold more often"]
    assert not report(part, "--false-positive-rate", 0.4)["findings"]
    for kind in ("copies", "leaks", "blank", "faint", "unreadable", "unused", "ignored"):
        assert found[kind] == []


def test_report_on_an_odd_data_set(part: Path) -> None:
    def put(place: str, image: Image.Image, **options: Any) -> str:
        return str(save(part / place, image, **options))

    twin, leak = put("train/good/twin.jpg", picture(4)), put("test/good/leak.png", picture(5, 0.5))
    blank = put("test/good/blank.png", Image.new("RGB", (50, 96)))
    put("validation/1.png", picture(6))
    thumbnail = put("train/good/@eaDir/00.png", picture(0))
    note = part / "notes.txt"
    note.write_text("none")
    unmasked = put("test/scratch/2.png", picture(7).rotate(90))
    put("ground_truth/scratch/1_mask.png", Image.new("L", (95, 96)))
    unused = put("ground_truth/scratch/9_mask.png", Image.new("L", (96, 96)))
    found = report(part)
    assert found["copies"] == [[str(part / "train/good/04.png"), twin]]
    assert found["leaks"] == [[str(part / "train/good/05.png"), leak]]
    assert found["blank"] == [blank]
    assert found["unused"] == [{"folder": str(part / "validation"), "images": 1}]
    assert found["ignored"] == sorted([str(note), str(Path(thumbnail).parent)])
    assert found["masks"] == {"missing": [unmasked], "unused": [unused], "unreadable": [],
                              "other_size": [str(part / "ground_truth/scratch/1_mask.png")]}
    assert found["classes"]["part"]["aspect_ratios"] == [round(50 / 96, 4), 1.0]
    assert len(found["findings"]) == 7
    text = table(found)
    assert all(f"- {finding}" in text for finding in found["findings"])


def test_report_in_place_of_a_model(part: Path, tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--check writes no model"):
        run_here("train", part, "--check", "-o", tmp_path / "a.safetensors")
    with pytest.raises(click.UsageError, match="Missing option '-o'"):
        run_here("train", part)
    with pytest.raises(UadtoolError, match="no class other"):
        run_here("train", part, "--check", "--classes", "other")
