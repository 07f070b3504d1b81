"""Scores of one model that came in parts: as if it had been one run."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import pytest
from conftest import run_here, validate
from hypothesis import given, settings
from hypothesis import strategies as st
from records import HOST, RUNTIME, lines, model

from uadtool.comparing.comparison import compare
from uadtool.errors import UadtoolError
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.pixel_metrics import count_pixels


class Example(NamedTuple):
    class_name: Optional[str]
    anomalous: bool
    score: float
    mask: Optional[np.ndarray]


def examples(seed: int, count: int) -> List[Example]:
    """Images of two classes, of which one has masks, and of none; some scores are equal."""
    random = np.random.default_rng(seed)
    found = []
    for name, anomalous in zip(random.choice(["bolt", "nut", ""], count), random.random(count) < 0.5):
        mask = random.random((6, 6)) < 0.2 if anomalous else np.zeros((6, 6), bool)
        found.append(Example(name or None, bool(anomalous), round(float(random.normal() + anomalous), 1),
                             None if anomalous and name == "nut" else mask))
    return found


def run_of(chosen: Sequence[int], images: Sequence[Example], machine: str = "some", threshold: float = 1.0,
           path: str = "m.onnx") -> List[Dict[str, Any]]:
    """The lines that ``score`` prints about the ``chosen`` images; their maps are as noisy as the images are wide."""
    evaluation, records = Evaluation(), []
    for index in chosen:
        name, anomalous, score, mask = images[index]
        records.append({"type": "image", "path": f"{index}.png", "score": score, "raw_score": -score,
                        "anomalous": score > threshold, "nearest_class": "bolt", "milliseconds": 1.0,
                        "label": "anomalous" if anomalous else "good", **({"class": name} if name else {})})
        evaluation.add(name or "", anomalous, score, -score, score > threshold)
        if mask is not None:
            noise = np.random.default_rng(index).normal(size=(6, 6)) + 2 * mask
            evaluation.add_pixels(name or "", count_pixels(noise.astype(np.float32), mask))
    summary = {"type": "summary", "images": len(records), "errors": 0, "anomalous": 0, "seconds": 1.0,
               "images_per_second": 1.0}
    if records:
        summary.update(metrics=evaluation.figures(), pixels=evaluation.pixels())
    return [{"schema": "uadtool.score/1", "type": "run", "tool": "uadtool 0.1.0", "started": "2026-01-01T12:00:00Z",
             "model": {**model(path), "digest": "sha256:" + "0" * 64}, "runtime": RUNTIME,
             "host": {**HOST, "cpu": machine}, "threshold": threshold}, *records, summary]


def written(folder: Path, *runs: List[Dict[str, Any]]) -> List[str]:
    paths = [folder / f"{index}.jsonl" for index in range(len(runs))]
    for path, records in zip(paths, runs):
        path.write_text(lines(records))
    return [str(path) for path in paths]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(0, 3), min_size=4, max_size=24))
def test_shards_of_any_split_are_exactly_one_run(tmp_path_factory, seed, shard_of):
    folder = tmp_path_factory.mktemp("shards")
    images = examples(seed, len(shard_of))
    whole = compare(written(folder, run_of(range(len(images)), images)))
    parts = [[index for index, of in enumerate(shard_of) if of == shard] for shard in range(4)]
    shards = written(folder, *(run_of(part, images) for part in parts))
    merged = compare(shards)
    assert merged["rows"] == whole["rows"]
    assert merged["models"][0]["shards"] == shards
    together = folder / "all.jsonl"
    together.write_text("".join(Path(path).read_text() for path in shards))  # as cat makes it
    assert compare([str(together)])["rows"] == whole["rows"]
    validate(json.loads(json.dumps(merged)), "compare")


def test_records_of_shards_honour_their_schema():
    for record in run_of(range(8), examples(0, 8)):
        validate(record, "score")


def test_shards_of_the_command_are_one_run(detector, mvtec, tmp_path):
    from uadtool.data.dataset import scoring_samples
    from uadtool.runtimes.opening import open_model
    from uadtool.scoring.records import score

    samples = list(scoring_samples([str(mvtec)]))
    whole, *shards = ([*score(open_model(str(detector), 1), part)]
                      for part in (samples, samples[:5], samples[5:6], samples[6:]))
    rows = compare(written(tmp_path, whole))["rows"]
    assert {"aupro", "image_auroc.red"} <= {row["metric"] for row in rows}
    assert compare(written(tmp_path, *shards))["rows"] == rows


def test_an_image_in_two_shards_is_one_line(tmp_path):
    images = examples(0, 12)
    names = written(tmp_path, run_of(range(8), images), run_of(range(7, 12), images))
    with pytest.raises(UadtoolError, match=r"0.jsonl and .*1.jsonl both hold scores of 7.png by one model") as caught:
        compare(names)
    assert "\n" not in str(caught.value)


def test_shards_need_one_threshold(tmp_path):
    images = examples(0, 12)
    names = written(tmp_path, run_of(range(8), images), run_of(range(8, 12), images, threshold=2.0))
    with pytest.raises(UadtoolError, match="different thresholds; score all with the same options"):
        compare(names)


def under(folder: str, run: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return [{**record, "path": f"{folder}/{record['path']}"} if record["type"] == "image" else record for record in run]


def test_two_machines_are_two_columns_wherever_their_images_lie(tmp_path):
    images = examples(1, 20)
    for other in (under("data", run_of(range(20), images, "arm")), run_of(range(8, 20), images, "arm")):
        record = compare(written(tmp_path, run_of(range(8), images, "x86"), other))
        assert [of["machine"] for of in record["models"]] == ["x86", "arm"]
        assert not any("shards" in of for of in record["models"])


def test_images_of_one_name_below_two_folders_are_the_same_images(tmp_path, caplog):
    caplog.set_level("INFO", "uadtool")
    images = examples(1, 20)
    ours, theirs = (under(folder, run_of(range(20), images)) for folder in ("parts/a/test/x", "/data/a/test/x"))
    assert len(compare(written(tmp_path, ours, theirs))["models"]) == 2
    assert "merged" not in caplog.text
    compare(written(tmp_path, under("parts/a/test/x", run_of(range(9), images)),
                    under("/data/a/test/x", run_of(range(9, 20), images))))
    assert "merged 2 files of m.onnx: " in caplog.text


def test_a_copy_of_images_whose_names_a_mac_stored_is_the_same_images(tmp_path):
    images = examples(0, 4)
    runs = [under(folder, run_of(range(4), images)) for folder in (
        "mac/Geha\u0308use/test/good", "copy/Gehäuse/test/good")]
    assert len(compare(written(tmp_path, *runs))["models"]) == 2


def test_images_scored_again_from_within_their_folder_stay_two_columns(tmp_path):
    images = examples(1, 20)
    whole = under("parts/a/test/good", run_of(range(20), images))
    for folder in ("a/test/good", "good"):
        part = under(folder, run_of(range(9), images))
        assert len(compare(written(tmp_path, whole, part))["models"]) == 2
        assert len(compare(written(tmp_path, part, whole))["models"]) == 2


def test_an_image_that_one_run_could_not_read_costs_a_warning(tmp_path, caplog):
    images = examples(1, 12)
    error = {"type": "image", "path": "11.png", "error": "11.png is cut short"}
    first, second = run_of(range(11), images), run_of(range(1, 12), images)
    first.insert(1, error)
    second.insert(1, {**error, "path": "0.png"})
    assert len(compare(written(tmp_path, first, second))["models"]) == 2  # each could not read another one
    assert "only one of them has 0.png: their figures are about different images" in caplog.text
    assert len(compare(written(tmp_path, run_of(range(12), images), run_of(range(4), images)))["models"]) == 2
    retried = compare(written(tmp_path, first, run_of([11], images)))
    assert retried["rows"] == compare(written(tmp_path, run_of(range(12), images)))["rows"]


def test_the_same_images_twice_stay_two_columns(tmp_path):
    images = examples(1, 20)
    record = compare(written(tmp_path, run_of(range(20), images), run_of(range(20), images)))
    assert [of["label"] for of in record["models"]] == ["m.onnx", "m.onnx (2)"]
    assert not any("shards" in of for of in record["models"])


def test_the_same_images_with_other_labels_are_refused(tmp_path):
    images = examples(1, 6)
    others = [image._replace(anomalous=not image.anomalous, mask=None) for image in images]
    with pytest.raises(UadtoolError, match="with different labels for the same images"):
        compare(written(tmp_path, run_of(range(6), images), run_of(range(6), others)))


def test_shards_without_pixel_counts_cost_the_pixel_metrics_and_a_warning(tmp_path, caplog):
    images = examples(1, 24)
    whole, *shards = (run_of(part, images) for part in (range(24), range(12), range(12, 24)))
    del shards[1][-1]["pixels"]
    merged = compare(written(tmp_path, *shards))
    assert "1.jsonl holds no pixel counts; score again" in caplog.text
    rows = compare(written(tmp_path, whole))["rows"]
    assert merged["rows"] == [row for row in rows if row["metric"] not in ("pixel_auroc", "aupro")]


@pytest.mark.parametrize("pixels", [3, {"bolt": 3}, {"bolt": {}}, {"bolt": {"regions": 1, "bins": "eJw="}}])
def test_damaged_pixel_counts_are_refused(tmp_path, pixels):
    images = examples(1, 24)
    shards = [run_of(part, images) for part in (range(12), range(12, 24))]
    shards[1][-1]["pixels"] = pixels
    with pytest.raises(UadtoolError, match=r"1.jsonl:14: .* its pixels|1.jsonl: its summary is damaged") as caught:
        compare(written(tmp_path, *shards))
    assert "\n" not in str(caught.value)


# score --shard


def shards_of(images: Sequence[Example], count: int, machines: Sequence[str] = ("some",)) -> List[List[Dict[str, Any]]]:
    """What ``--shard 1/count`` to ``count/count`` print, on these machines in turn."""
    found = []
    for index in range(count):
        opening, *rest = run_of(range(index, len(images), count), images, machines[index % len(machines)])
        found.append([{**opening, "shard": {"index": index + 1, "count": count}}, *rest])
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_all_shards_of_the_command_are_the_whole_run(detector, mvtec, tmp_path, count):
    def images(printed):
        return [{**record, "milliseconds": 0, "time": ""} for record in map(json.loads, printed.splitlines())
                if record["type"] == "image"]

    whole = run_here("score", detector, mvtec)
    printed = [run_here("score", detector, mvtec, "--shard", f"{index + 1}/{count}") for index in range(count)]
    for index, of_shard in enumerate(printed):
        assert images(of_shard) == images(whole)[index::count]
        for record in map(json.loads, of_shard.splitlines()):
            validate(record, "score")
    (tmp_path / "whole").write_text(whole)
    (tmp_path / "shards").write_text("".join(printed))
    assert compare([str(tmp_path / "shards")])["rows"] == compare([str(tmp_path / "whole")])["rows"]


def test_shards_of_several_machines_are_one_run(tmp_path, caplog):
    images = examples(0, 23)
    whole = compare(written(tmp_path, run_of(range(23), images)))["rows"]
    record = compare(written(tmp_path, *shards_of(images, 4, ["x86", "arm"])))
    assert record["rows"] == whole
    assert [model["machine"] for model in record["models"]] == ["x86, arm"]
    assert "missing" not in caplog.text


@pytest.mark.parametrize("run_on", [
    lambda machine, images: [run_of(part, images, machine) for part in (range(8), range(8, 20))],
    lambda machine, images: shards_of(images, 2, [machine]),
])
def test_a_machine_that_has_all_shards_is_a_column_of_its_own_in_any_order(tmp_path, run_on):
    ours, theirs = (run_on(machine, examples(1, 20)) for machine in ("x86", "arm"))
    for order in ([*ours, *theirs], [ours[0], theirs[1], theirs[0], ours[1]]):
        record = compare(written(tmp_path, *order))
        assert [model["machine"] for model in record["models"]] == ["x86", "arm"]
        assert all(len(model["shards"]) == 2 for model in record["models"])
        assert all(row["changes"][1] == 0 for row in record["rows"])


def test_a_missing_shard_is_named(tmp_path, caplog):
    first, _, third, _ = shards_of(examples(0, 23), 4)
    compare(written(tmp_path, first, third))
    assert caplog.messages[0] == "m.onnx: of 4 shards these are missing: 2, 4"


@pytest.mark.parametrize("value", ["0/2", "3/2", "1/0", "a/b", "1", "-1/2", "1/2/3"])
def test_invalid_shards(uadtool, detector, value):
    done = uadtool("score", detector, "photos", f"--shard={value}")
    assert done.returncode == 2
    assert f"{value!r} is not I/N with I from 1 to N, such as 2/8" in done.stderr


@pytest.mark.parametrize("shard", [{"index": 0, "count": 1}, {"index": 2, "count": 1}, {"index": 1}, 3,
                                   {"index": "1", "count": 2}])
def test_a_record_with_an_invalid_shard(tmp_path, shard):
    (opening, *rest), = shards_of(examples(0, 3), 1)
    with pytest.raises(UadtoolError, match=r"0.jsonl:1: not a record of a score or bench file: "):
        compare(written(tmp_path, [{**opening, "shard": shard}, *rest]))
