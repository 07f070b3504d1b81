"""The images of a run: their split, copies included, as later steps find it again."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import METADATA, run_here
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.dataset import training_samples
from uadtool.data.inspection import inspect
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.lab.models import load_model
from uadtool.lab.training.data import calibration_images, names_digest, pack_originals, read_images, split_again
from uadtool.metadata import PREPROCESSING, Metadata, Reading

SAMPLES = [Sample(f"{number}.png", "part", "good") for number in range(40)]


def trained_with(originals: list[int]) -> Metadata:
    origin = {"held_out": 0.25, "seed": 0, "names": names_digest(SAMPLES), "originals": pack_originals(originals)}
    return METADATA.replace(provenance=[{name: value for name, value in origin.items() if value is not None}])


@given(st.lists(st.integers(0, 39), min_size=40, max_size=40))
def test_later_steps_split_as_training_did(wanted: list[int]) -> None:
    originals: list[int] = []
    for number, first in enumerate(wanted):
        originals.append(originals[first] if first < number else number)
    metadata = trained_with(originals)
    training, held_out = split_again(metadata, SAMPLES)
    groups = [{originals[SAMPLES.index(sample)] for sample in side} for side in (training, held_out)]
    assert not groups[0] & groups[1] or len(groups[0] | groups[1]) == 1
    assert len(held_out) == len(groups[1])
    chosen = calibration_images(metadata, SAMPLES)
    assert {originals[SAMPLES.index(sample)] for sample in chosen} == groups[0]
    assert len(chosen) == len(groups[0])


def test_other_images_are_calibrated_on_as_they_are() -> None:
    others = [replace(sample, path=f"x{sample.path}") for sample in SAMPLES]
    assert calibration_images(trained_with([0] * 40), others) == others
    with pytest.raises(UadtoolError, match="not the good images"):
        split_again(trained_with([0] * 40), others)


@pytest.mark.parametrize("record", ["", "x", 3, None, "AAAA", pack_originals([0] * 39), pack_originals([0] * 41)])
def test_a_broken_record_of_copies_is_refused(record: object) -> None:
    metadata = trained_with([0] * 40)
    metadata.provenance[0]["originals"] = record
    if record is None:
        assert len(split_again(metadata, SAMPLES)[1]) == 10
        return
    with pytest.raises(UadtoolError, match="record of copied images cannot be read"):
        split_again(metadata, SAMPLES)


def test_copies_in_the_chain(textures: Path, tmp_path: Path) -> None:
    shutil.copytree(textures, tmp_path / "data")
    good = tmp_path / "data" / "dots" / "train" / "good"
    for path in sorted(good.iterdir())[:10]:
        Image.open(path).save(good / f"{path.stem}-again.bmp")
    model = tmp_path / "m.safetensors"
    record = json.loads(run_here("train", tmp_path / "data", "--image-size", 64, "-o", model))
    assert record["classes"]["stripes"] == {"training": 16, "held_out": 4, "copies": 0, "recognised": 4}
    assert (record["classes"]["dots"]["held_out"], record["classes"]["dots"]["copies"]) == (4, 10)
    samples = training_samples(str(tmp_path / "data"))
    training, held_out = split_again(load_model(str(model))[1], samples)
    counts = Counter(sample.class_name for sample in training)
    assert counts["dots"] == record["classes"]["dots"]["training"]
    stems = [{Path(sample.path).stem.removesuffix("-again") for sample in side if sample.class_name == "dots"}
             for side in (training, held_out)]
    assert len(stems[0]) == 16
    assert not stems[0] & stems[1]


def test_twelve_bits_are_read_as_such_from_training_to_scores(textures: Path, tmp_path: Path) -> None:
    """Grey of 12 bits in 16-bit files gives the model of the same grey in 8 bits, but for rounding."""
    for name, depth in (("eight", 8), ("twelve", 12)):
        shutil.copytree(textures, tmp_path / name)
        for path in (tmp_path / name).glob("*/*/*/*.png"):
            if "ground_truth" not in path.parts:
                grey = np.asarray(Image.open(path).convert("L"))
                grey = grey if depth == 8 else np.rint(grey / np.float32(255) * 4095).astype(np.uint16)
                Image.fromarray(grey).save(path)
    (metadata, samples), (_, plain) = (
        (Metadata(METADATA.method, METADATA.teacher, ["dots", "stripes"], (64, 64), (8, 8), 1.0, 0.1, 1, 1,
                  preprocessing={**PREPROCESSING, "grey_bits": inspect(found, 1).grey_bits}), found)
        for found in (training_samples(str(tmp_path / name)) for name in ("twelve", "eight")))
    assert metadata.reading == Reading((64, 64), (12,))
    twelve = read_images(samples, metadata.reading, 1).int()
    eight = read_images(plain, Reading((64, 64)), 1).int()
    assert (twelve - eight).abs().max() <= 1
    run_here("train", tmp_path / "twelve", "--image-size", 64, "-o", tmp_path / "m.safetensors")
    assert load_model(str(tmp_path / "m.safetensors"))[1].preprocessing["grey_bits"] == {"dots": 12, "stripes": 12}
    run_here("train", tmp_path / "twelve", "--image-size", 64, "-o", tmp_path / "m.safetensors",
             "--grey-bits", 16)
    assert load_model(str(tmp_path / "m.safetensors"))[1].reading == Reading((64, 64), (16,))
