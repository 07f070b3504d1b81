"""Thresholds from good images: of a share of them, by class, from training and from a score file."""

import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from conftest import METADATA, run_here, validate
from hypothesis import given
from hypothesis import strategies as st

from uadtool.comparing.good_images import with_thresholds_from
from uadtool.errors import UadtoolError
from uadtool.scoring.thresholds import PSEUDO_COUNT, Thresholds, bounded_scores, threshold_at

SCORES = st.lists(st.floats(-100, 100), min_size=1, max_size=50)


@given(SCORES, st.floats(0, 0.5))
def test_a_threshold_is_exceeded_at_the_given_rate(scores, rate):
    threshold, count = threshold_at(scores, rate), len(scores) + 1
    assert threshold in scores
    assert (np.sum(np.array(scores) > threshold) + 1) / count <= max(rate, 1 / count) + 1e-9
    lower = [score for score in scores if score < threshold]
    if lower:  # the next lower score would be exceeded too often
        assert (np.sum(np.array(scores) > max(lower)) + 1) / count > rate - 1e-9
    assert threshold_at(scores, 0) == threshold_at(scores, 1.99 / count) == max(scores)


@pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (160, 0.01), (19, 0.05), (150, 0.05), (40, 0.1)])
def test_new_images_exceed_a_threshold_as_often_as_promised(count, rate):
    """1,000 draws of good images: the mean rate, with its standard error, is at most that which was asked for.

    The threshold that this share of the images themselves exceeds promises less.
    """
    random = np.random.default_rng(0)
    draws = random.gumbel(size=(1000, count + 400))
    images, new = draws[:, :count], draws[:, count:]
    thresholds = np.array([threshold_at(scores.tolist(), rate) for scores in images])
    rates = (new > thresholds[:, None]).mean(1)
    expected = int(rate * (count + 1) + 1e-9) / (count + 1)
    error = 4 * rates.std() / 1000**0.5
    assert expected - error < rates.mean() < min(rate, expected) + error
    plain = np.sort(images)[:, count - 1 - int(rate * count + 1e-9)]
    assert (new > plain[:, None]).mean() > rates.mean() or int(rate * count + 1e-9) == 0


@given(SCORES, st.floats(-100, 100))
def test_a_p_value_counts_good_images_that_score_at_least_as_high(scores, score):
    thresholds = Thresholds(0.0, {}, {"a": sorted(scores)})
    assert thresholds.p_value(score, "a") == pytest.approx(
        (1 + sum(good >= score for good in scores)) / (1 + len(scores)), rel=1e-5)
    assert thresholds.p_value(score, "b") is None
    assert thresholds.p_value(score, "a") <= thresholds.p_value(score - 1, "a")


def test_p_values_of_good_images_are_as_small_as_p_at_a_rate_of_p():
    random = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        *good, new = random.normal(size=40)
        found.append(Thresholds(0.0, {}, {"a": sorted(good)}).p_value(new, "a"))
    for p in (0.05, 0.1, 0.3, 0.5):
        assert np.mean(np.array(found) <= p) == pytest.approx(int(p * 40) / 40, abs=4 * (p * (1 - p) / 1000) ** 0.5)


@given(st.dictionaries(st.sampled_from(["", "a", "b", "c"]), SCORES, min_size=1), st.floats(0, 0.5))
def test_a_class_has_a_threshold_between_its_own_and_the_common_one(scores, rate):
    thresholds = Thresholds.at(rate, scores)
    assert thresholds.common == threshold_at([score for values in scores.values() for score in values], rate)
    assert set(thresholds.by_class) == scores.keys() - {""}
    for name, threshold in thresholds.by_class.items():
        own = threshold_at(scores[name], rate)
        low, high = sorted([own, thresholds.common])
        assert low - 1e-3 <= threshold <= high + 1e-3
        assert thresholds.of(name) == threshold
    assert thresholds.of("another") == thresholds.common


def test_many_images_outweigh_the_common_threshold():
    random = np.random.default_rng(0)
    calm, usual = random.normal(0, 0.2, 2000).tolist(), random.normal(0, 1, 2000).tolist()
    thresholds = Thresholds.at(0.01, {"calm": calm, "usual": usual, "few": calm[:2]})
    assert thresholds.of("calm") == pytest.approx(threshold_at(calm, 0.01), abs=0.05)
    assert thresholds.of("few") > 0.8 * thresholds.common


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        Thresholds.at(0.01, {"a": []})


def test_very_many_scores_are_kept_as_quantiles():
    scores = np.random.default_rng(0).normal(size=20_000)
    kept = bounded_scores({"a": scores.tolist(), "b": [2.0, 1.0]})
    assert len(kept["a"]) == 10_001
    assert kept["a"] == sorted(kept["a"])
    for rate in (0, 0.001, 0.01, 0.1, 0.5):
        assert threshold_at(kept["a"], rate) == pytest.approx(threshold_at(scores.tolist(), rate), abs=0.02)
    assert kept["b"] == [1.0, 2.0]


# From a score file


@pytest.fixture
def scored(detector: Path, mvtec: Path, tmp_path: Path) -> Path:
    file = tmp_path / "good.jsonl"
    file.write_text(run_here("score", detector, mvtec))
    return file


def images(text: str) -> List[Dict[str, Any]]:
    return [record for record in map(json.loads, text.splitlines()) if record["type"] == "image"]


def test_good_images_of_a_score_file_set_the_thresholds_by_class(detector, mvtec, scored):
    records = [json.loads(line) for line in run_here("score", detector, mvtec, "--threshold-from", scored,
                                                     "--false-positive-rate", "25%").splitlines()]
    for record in records:
        validate(record, "score")
    good = {name: [image["score"] for image in images(scored.read_text())
                   if image["label"] == "good" and image["class"] == name] for name in ("green", "red")}
    expected = Thresholds.at(0.25, good)
    run, *scores, _ = records
    assert run["threshold"] == expected.common
    assert run["thresholds"] == expected.by_class
    for image in scores:
        assert image["threshold"] == expected.of(image["nearest_class"])
        assert image["anomalous"] == (image["score"] > image["threshold"])


def test_images_without_labels_count_as_good(detector, mvtec, tmp_path):
    file = tmp_path / "photos.jsonl"
    file.write_text(run_here("score", detector, *(mvtec / "red/test/good").glob("*.png")))
    scores = [image["score"] for image in images(file.read_text())]
    metadata = with_thresholds_from(METADATA, [str(file)])
    assert metadata.good_scores == {"red": sorted(scores)}
    assert metadata.threshold == max(scores)
    assert set(metadata.thresholds) == {"red"}
    assert metadata.provenance[-1]["images"] == len(scores)
    assert metadata.from_json(metadata.to_json(), "x") == metadata


def test_images_that_were_taken_for_another_class_only_count_in_the_common_threshold(scored):
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    moved = next(line for line in lines if line.get("label") == "good")
    moved.update(nearest_class="green" if moved["class"] == "red" else "red", score=50.0)
    scored.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    metadata = with_thresholds_from(METADATA, [str(scored)], 0)
    assert metadata.threshold == 50
    assert metadata.good_scores[""] == [50.0]
    assert max(max(metadata.good_scores[name]) for name in ("red", "green")) < 50


@pytest.mark.parametrize(("change", "message"), [
    ({"method": "stfpm"}, "another model .*, which differs in its method"),
    ({"classes": ["red"]}, "differs in its classes"), ({"image_size": (64, 32)}, "differs in its image size"),
])
def test_scores_of_another_model_are_refused(scored, change, message):
    with pytest.raises(UadtoolError, match=message):
        with_thresholds_from(METADATA.replace(**change), [str(scored)])


def test_several_files_count_together(detector, mvtec, tmp_path):
    files = []
    for name in ("green", "red"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(run_here("score", detector, mvtec / name))
    both = [word for file in files for word in ("--threshold-from", file)]
    run, *records, _ = map(json.loads, run_here("score", detector, mvtec, *both).splitlines())
    good = {name: [image["score"] for image in records if (image["class"], image["label"]) == (name, "good")]
            for name in ("green", "red")}
    assert run["thresholds"] == Thresholds.at(METADATA.false_positive_rate, good).by_class
    for image in records:
        scores = good[image["nearest_class"]]
        assert image["p_value"] == pytest.approx(
            (1 + sum(score >= image["score"] for score in scores)) / (1 + len(scores)), rel=1e-5)


def test_an_image_counts_once(detector, mvtec, scored, caplog):
    """Otherwise few images would promise a rate of many."""
    once, twice = (json.loads(run_here("score", detector, mvtec, *files).splitlines()[0]) for files in (
        ("--threshold-from", scored), ("--threshold-from", scored, "--threshold-from", scored)))
    assert once["thresholds"] == twice["thresholds"]
    count = sum(image["label"] == "good" for image in images(scored.read_text()))
    assert caplog.text.count(f"{count} good images promise") == 2


def test_scores_of_another_size_are_refused(scored):
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    lines[0]["model"]["entries"] = 1000
    scored.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with_thresholds_from(METADATA.replace(options={"entries": 1000}), [str(scored)])
    with pytest.raises(UadtoolError, match="differs in its entries"):
        with_thresholds_from(METADATA.replace(options={"entries": 250}), [str(scored)])


def test_scores_of_the_camera_s_own_size_are_those_of_the_model(scored):
    metadata = METADATA.replace(image_size=(16, 16))
    assert with_thresholds_from(metadata, [str(scored)], None, METADATA.image_size).good_scores
    with pytest.raises(UadtoolError, match="differs in its image size"):
        with_thresholds_from(metadata, [str(scored)], None, (64, 64))


@pytest.mark.parametrize("rate", [1e-320, 1e-300, 0])
def test_a_rate_of_nothing_cannot_be_promised(detector, mvtec, scored, rate, caplog):
    run_here("score", detector, mvtec, "--threshold-from", scored, "--false-positive-rate", rate)
    assert "cannot be promised" in caplog.text


def test_a_model_without_scores_of_good_images_says_so(make_detector, mvtec, tmp_path):
    path = make_detector(tmp_path / "empty.onnx", METADATA.replace(good_scores={"red": []}))
    with pytest.raises(UadtoolError, match="does not hold the scores of good images"):
        run_here("score", path, mvtec, "--false-positive-rate", 0.1)


def test_too_few_images_say_what_they_can_promise(detector, mvtec, scored, caplog):
    count = sum(image["label"] == "good" for image in images(scored.read_text()))
    for rate, remedy in ((0.01, "requires 99"), (0, "cannot be promised")):
        caplog.clear()
        run_here("score", detector, mvtec, "--threshold-from", scored, "--false-positive-rate", rate)
        assert f"{count} good images promise a false-positive rate of {1 / (count + 1):.2g}" in caplog.text
        assert remedy in caplog.text
    caplog.clear()
    run_here("score", detector, mvtec, "--threshold-from", scored, "--false-positive-rate", 1 / (count + 1))
    assert "promise" not in caplog.text


def test_a_file_without_good_images_is_refused(detector, mvtec, tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = run_here("score", detector, mvtec).splitlines()
    file.write_text("".join(f"{line}\n" for line in lines if json.loads(line).get("label") != "good"))
    with pytest.raises(UadtoolError, match="holds no scores of good images"):
        with_thresholds_from(METADATA, [str(file)])


def test_one_threshold_for_all_classes(make_detector, mvtec, tmp_path):
    model = make_detector(tmp_path / "m.onnx", METADATA.replace(thresholds={"red": 0.5}))
    by_class = images(run_here("score", model, mvtec))
    assert {image["threshold"] for image in by_class} == {0.5, METADATA.threshold}
    for choice, expected in (("common", METADATA.threshold), ("7", 7.0)):
        run, *_ = map(json.loads, run_here("score", model, mvtec, "--threshold", choice).splitlines())
        assert run["threshold"] == expected
        assert "thresholds" not in run


def test_the_weight_of_the_common_threshold_is_what_the_documentation_says():
    text = (Path(__file__).parents[2] / "uadtool/scoring/README.md").read_text(encoding="utf-8")
    assert f"counts as {PSEUDO_COUNT} images more" in text
