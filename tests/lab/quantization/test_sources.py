import json
import re
from collections import Counter

import click
import numpy as np
import pytest
import torch
from conftest import validate
from hypothesis import given
from hypothesis import strategies as st

from uadtool.cli.calibrate import calibrate as command
from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.images import ImageError, read_image
from uadtool.data.samples import Sample
from uadtool.data.splits import balanced
from uadtool.errors import UadtoolError
from uadtool.files import file_digest, list_digest
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.models import save_model
from uadtool.lab.quantization.sources import calibration_batches
from uadtool.metadata import Metadata, Reading

SIZE = (32, 48)
METADATA = Metadata(
    method="stfpm", teacher="mobilenetv2_035", classes=["dots", "stripes"], image_size=SIZE, map_size=(8, 12),
    threshold=3.0, false_positive_rate=0.01, parameters=1, macs=1, options={"fusion": "sum"},
)
DETECTOR = STFPM(METADATA.teacher, SIZE, 2).fold_batch_norm()


@pytest.fixture(scope="module")
def good(textures):
    return training_samples(str(textures))


@pytest.fixture(scope="module")
def choose(good):
    """The images as one tensor, and the record."""
    def choose(*sources, count=8, seed=0, good=good):
        batches, record = calibration_batches(sources, good, count, seed, DETECTOR, Reading(SIZE))
        return torch.cat([batch.float() for batch in batches]), record

    return choose


def pixels(samples):
    return torch.from_numpy(np.stack([read_image(sample.path, SIZE) for sample in samples])).float()


# Each source


def test_good_images_of_all_classes(choose, good):
    images, record = choose("good", count=10, seed=3)
    chosen = balanced(good, 10, 3)
    assert Counter(sample.class_name for sample in chosen) == {"dots": 5, "stripes": 5}
    assert torch.equal(images, pixels(chosen))
    digest = list_digest(sample.path for sample in chosen)
    assert record == {"kind": "good", "count": 10, "seed": 3,
                      "parts": [{"kind": "good", "count": 10, "images": digest}]}


def test_synthetic_anomalies_are_the_good_images_changed(choose):
    before, _ = choose("good")
    after, record = choose("synthetic-anomalies")
    changed = (after != before).any(-1)
    assert changed.any(-1).any(-1).all()
    assert changed.float().mean() < 0.4
    assert record["parts"][0]["images"] == choose("good")[1]["parts"][0]["images"]


@pytest.mark.parametrize("detector", [DETECTOR, STFPM("tf_efficientnet_lite0", SIZE, 2)],
                         ids=["means of channels", "one mean"])
def test_the_networks_see_standard_normal_values(detector):
    batches, record = calibration_batches(["random-normal"], [], 40, 0, detector, Reading(SIZE))
    batches = list(batches)
    assert [(batch.dtype, *batch.shape) for batch in batches] == [(torch.float32, 32, *SIZE, 3),
                                                                  (torch.float32, 8, *SIZE, 3)]
    seen = torch.cat([detector.normalize(batch) for batch in batches])
    assert seen.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=0.02)
    assert seen.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=0.02)
    assert seen.abs().max() > 4  # beyond any image, not clipped
    assert not torch.equal(seen[0], seen[32])
    assert record == {"kind": "random-normal", "count": 40, "seed": 0,
                      "parts": [{"kind": "random-normal", "count": 40}]}


def test_images_of_a_data_set_are_its_test_split(choose, textures):
    images, record = choose(f"images:{textures}", count=4)
    chosen = balanced(list(scoring_samples([str(textures)])), 4, 0)
    assert torch.equal(images, pixels(chosen))
    assert all("/test/" in sample.path for sample in chosen)
    assert record["kind"] == record["parts"][0]["kind"] == f"images:{textures}"


def test_a_folder_with_few_images_gives_all(choose, textures):
    folder = textures / "dots" / "test" / "blot"
    images, record = choose(f"images:{folder}", count=100, good=[])
    assert len(images) == record["count"] == record["parts"][0]["count"] == len(list(folder.iterdir()))


# Mixtures


def test_a_mixture_has_the_parts_of_its_sources(choose):
    images, record = choose("random-normal", "good", "synthetic-anomalies", count=11)
    assert [(part["kind"], part["count"]) for part in record["parts"]] == [
        ("random-normal", 4), ("good", 4), ("synthetic-anomalies", 3)]
    assert (record["kind"], record["count"]) == ("random-normal+good+synthetic-anomalies", 11)
    alone = [choose(part["kind"], count=part["count"]) for part in record["parts"]]
    assert torch.equal(images, torch.cat([part for part, _ in alone]))
    assert record["parts"] == [part for _, one in alone for part in one["parts"]]


@given(st.integers(1, 200), st.sets(st.sampled_from(["random-normal", "good", "synthetic-anomalies"]), min_size=1))
def test_the_count_is_divided_evenly(count, sources):
    samples = [Sample(str(number), "a", "good") for number in range(200)]
    _, record = calibration_batches(sorted(sources), samples, count, 0, DETECTOR, Reading(SIZE))
    shares = [part["count"] for part in record["parts"]]
    assert sum(shares) == record["count"] == count
    assert sorted(shares, reverse=True) == shares
    assert shares[0] - shares[-1] <= 1


@pytest.mark.parametrize("source", ["good", "synthetic-anomalies", "random-normal"])
def test_the_seed_decides_everything(choose, source):
    first, again, other = (choose(source, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_are_read_when_they_are_needed(choose, good, tmp_path, caplog):
    """At most 32 at a time: the others are not opened."""
    missing = [Sample(str(tmp_path / f"{number}.png"), "dots", "good") for number in range(40)]
    batches, record = calibration_batches(["random-normal", "good"], missing, 80, 0, DETECTOR, Reading(SIZE))
    assert record["count"] == 80
    assert [len(next(batches)) for _ in range(2)] == [32, 8]
    with pytest.raises(UadtoolError, match="32 of 32 images cannot be read"):
        next(batches)
    assert all(re.search(r"cannot read .*png: No such file", message) for message in caplog.messages)


# Errors


def test_an_empty_folder_is_refused_with_the_cure(choose, tmp_path):
    with pytest.raises(UadtoolError) as error:
        choose(f"images:{tmp_path}")
    assert str(error.value) == (
        f"cannot calibrate on images:{tmp_path}: no images to score in {tmp_path}; give an image, a folder "
        "with images, or a data set with a test split")


def test_a_missing_or_broken_image_is_refused(choose, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    for path in (broken, tmp_path / "nowhere"):
        with pytest.raises(ImageError, match=f"cannot read {path}"):
            choose(f"images:{path}")


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(DETECTOR, METADATA, path)
    return path


@pytest.fixture
def calibrate(model, tmp_path, capsys):
    """The record that the command printed and the ranges file; both match their schemas."""
    def run(*arguments):
        command.main([str(word) for word in (model, *arguments, "-o", tmp_path / "ranges.json")],
                     standalone_mode=False)
        records = json.loads(capsys.readouterr().out), json.loads((tmp_path / "ranges.json").read_text())
        for record, name in zip(records, ("calibrate", "ranges")):
            validate(record, name)
        return records

    return run


def test_random_normal_needs_no_data(calibrate, model):
    printed, ranges = calibrate("--source", "random-normal", "--count", 3)
    assert ranges["source"] == {"kind": "random-normal", "count": 3, "seed": 0,
                                "parts": [{"kind": "random-normal", "count": 3}]}
    assert (printed["source"], printed["images"], printed["points"]) == ("random-normal", 3, len(ranges["ranges"]))
    assert printed["model_digest"] == ranges["model_digest"] == file_digest(model)


def test_the_ranges_file_records_the_sources_of_a_mixture(calibrate, textures):
    folder = f"images:{textures / 'dots' / 'test' / 'good'}"
    sources = ("good", "synthetic-anomalies", folder)
    _, ranges = calibrate(textures, *(word for source in sources for word in ("--source", source)), "--count", 6,
                          "--classes", "dots", "--seed", 5)
    assert [(part["kind"], part["count"]) for part in ranges["source"]["parts"]] == [(s, 2) for s in sources]
    chosen = balanced(training_samples(str(textures), ["dots"]), 2, 5)
    assert ranges["source"]["parts"][0]["images"] == list_digest(sample.path for sample in chosen)


@pytest.mark.parametrize(("options", "method"), [
    (["--method", "percentile"], "percentile-99.99"), (["--method", "percentile", "--percentile", 99], "percentile-99"),
    (["--method", "moving-average"], "moving-average"),
])
def test_the_method_is_recorded(calibrate, options, method):
    printed, ranges = calibrate("--source", "random-normal", "--count", 2, *options)
    assert printed["method"] == ranges["method"] == method


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "Missing argument 'DATA'"),
    (["--source", "random-normal", "--source", "synthetic-anomalies"], "Missing argument 'DATA'"),
    (["data", "--source", "bad"], "'bad' is not good, synthetic-anomalies, random-normal or images:PATH"),
    (["data", "--source", "images:"], "'images:' is not good"),
    (["data", "--source", "good", "--source", "good"], "each source may be given once"),
    (["data", "--source", "good", "--source", "random-normal", "--count", 1], "--count 1 is too few for 2 sources"),
    (["data", "--percentile", 99], "--percentile requires --method percentile"),
    (["data", "--method", "percentile", "--percentile", 0], "0.0 is not in the range 0<x<=100"),
])
def test_wrong_usage(calibrate, tmp_path, arguments, message):
    with pytest.raises(click.UsageError) as error:
        calibrate(*arguments)
    assert message in error.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["empty"], ["--source", "images:empty"]])
def test_an_empty_folder_ends_the_command(calibrate, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UadtoolError, match="no images"):
        calibrate(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
