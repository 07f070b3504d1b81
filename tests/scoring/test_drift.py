"""The watch for drift: false alarms, delays, and going on after a restart."""

import json

import numpy as np
import pytest
from conftest import METADATA, run_here, validate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uadtool.errors import UadtoolError
from uadtool.scoring import drift as module
from uadtool.scoring.drift import Drift, Evidence

CLASSES = ["a", "b", "c"]


def watched(seed, count, shift=0.0, start=0, references=40, classes=CLASSES, share=1.0):
    """The place of the first alarm among images of which, from ``start`` on, a share lies farther; or None."""
    random = np.random.default_rng(seed)
    drift = Drift(classes, {name: random.normal(size=references) for name in classes}, str(seed))
    for number in range(count):
        distance = random.normal() + (shift if number >= start and random.random() < share else 0)
        if alarm := drift.add(str(number), classes[number % len(classes)], distance):
            return number, alarm
    return None


@pytest.mark.parametrize("references", [0, 40])
def test_unchanged_images_raise_an_alarm_as_rarely_as_promised(monkeypatch, references):
    """At a level of 20, at most one of 20 runs does; so few that the fewest references are the hardest case."""
    monkeypatch.setattr(module, "LEVEL", 20.0)
    alarms = sum(watched(seed, 400, references=references) is not None for seed in range(400))
    assert 1 <= alarms <= 400 / 20 + 4 * (400 * 0.05 * 0.95) ** 0.5


def test_the_evidence_is_expected_to_stay_1():
    random = np.random.default_rng(0)
    values = []
    for _ in range(4000):
        evidence = Evidence()
        for p_value in random.random(5):
            evidence.bet(p_value, "")
        values.append(evidence.value)
    assert np.mean(values) == pytest.approx(1, abs=4 * np.std(values) / 4000**0.5)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_an_image_at_most_doubles_the_evidence(p_values):
    evidence = Evidence()
    for p_value in p_values:
        before = evidence.value
        evidence.bet(p_value, "")
        assert evidence.value <= 2 * before + 1e-12


@pytest.mark.parametrize(("shift", "start", "most"), [(2, 0, 25), (2, 2000, 60), (1, 2000, 150)])
def test_a_change_is_found_soon_and_dated(shift, start, most):
    found = [watched(seed, start + 400, shift, start) for seed in range(10)]
    assert all(found)
    assert max(number - start for number, _ in found) <= most
    assert np.median([abs(int(alarm["since"]) - start) for _, alarm in found]) <= 60
    for _, alarm in found:
        validate(alarm, "score#/$defs/drift")


def test_a_change_of_one_class_is_put_down_to_it():
    random = np.random.default_rng(0)
    drift = Drift(CLASSES, {name: random.normal(size=40) for name in CLASSES}, "seed")
    for number in range(2000):
        name = CLASSES[number % 3]
        alarm = drift.add(str(number), name, random.normal() + 3 * (name == "b" and number > 500))
        if alarm:
            break
    assert alarm["class"] == "b"


def test_some_defective_images_far_from_all_good_ones_are_no_drift():
    assert [watched(seed, 1000, shift=100, share=0.1) for seed in range(5)] == [None] * 5
    assert all(watched(seed, 1000, shift=100, share=0.5) for seed in range(5))


def test_after_an_alarm_the_new_images_are_what_is_usual():
    random = np.random.default_rng(0)
    drift = Drift(["a"], {"a": random.normal(size=100)}, "seed")
    for number in range(2000):
        drift.add(str(number), "a", random.normal() + 3 * (number >= 200))
    assert len(drift.alarms) == 1


def test_references_stay_few_and_alarms_rare(monkeypatch):
    monkeypatch.setattr(module, "MOST_REFERENCES", 100)
    assert [watched(seed, 3000, classes=["a"]) for seed in range(10)] == [None] * 10
    drift = Drift(["a"], {})
    for number in range(500):
        drift.add("", "a", float(number % 7))
    assert len(drift.to_json("")["references"]["a"]) <= 100


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_a_run_that_goes_on_is_as_one_without_a_pause(pause, seed):
    random = np.random.default_rng(seed)
    images = [(str(number), CLASSES[random.integers(3)], float(random.normal() + number / 300))
              for number in range(300)]
    good = {"a": random.normal(size=10).tolist()}
    whole, first = Drift(CLASSES, good, "seed"), Drift(CLASSES, good, "seed")
    for image in images:
        whole.add(*image)
    for image in images[:pause]:
        first.add(*image)
    state = json.loads(json.dumps(first.to_json("sha256:" + 64 * "0")))
    validate(state, "drift")
    second = Drift(CLASSES, good)
    second.restore(state, "sha256:" + 64 * "0", "file")
    for image in images[pause:]:
        second.add(*image)
    assert second.to_json("") == whole.to_json("")
    assert [alarm["path"] for alarm in first.alarms + second.alarms] == [alarm["path"] for alarm in whole.alarms]


# On the command line


@pytest.fixture
def line(make_detector, tmp_path):
    """A model that knows distances, and a folder of 30 images that are as usual and then 60 that are too blue."""
    random, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(90):
        green = [random.normal(0, 3), 80 + random.normal(0, 3), (40 if number >= 30 else 0) + random.normal(0, 3)]
        Image.fromarray(np.full((32, 32, 3), np.clip(green, 0, 255), np.uint8)).save(folder / f"{number:02}.png")
    plain = make_detector(tmp_path / "plain.onnx")
    lines = map(json.loads, run_here("score", plain, *sorted(folder.iterdir())[:30]).splitlines())
    usual = sorted(line["class_distance"] for line in lines if line["type"] == "image")
    return make_detector(tmp_path / "m.onnx", METADATA.replace(good_distances={"green": usual})), folder


def test_score_tells_of_drift(line, tmp_path, caplog):
    model, folder = line
    state = tmp_path / "drift.json"
    *records, summary = map(json.loads, run_here("score", model, folder, "--drift-state", state).splitlines())
    for record in (*records, summary):
        validate(record, "score")
    alarm, = (record for record in records if record["type"] == "drift")
    assert summary["drift"] == [alarm]
    assert alarm.get("class", "green") == "green"
    assert 30 < int(alarm["path"][-6:-4]) < 75
    assert 10 <= int(alarm["since"][-6:-4]) <= 32  # by chance, a rise may begin somewhat before the change
    assert f"have changed since {alarm['since']}" in caplog.text
    validate(json.loads(state.read_text()), "drift")
    assert '"drift"' not in run_here("score", model, folder)
    assert len(run_here("score", model, folder, "--format", "csv", "--drift-state",
                        tmp_path / "other.json").splitlines()) == 1 + 90


def test_the_state_carries_the_watch_over_a_restart(line, tmp_path):
    model, folder = line
    paths, state = sorted(folder.iterdir()), tmp_path / "drift.json"
    whole = run_here("score", model, *paths, "--drift-state", tmp_path / "whole.json")
    parts = [run_here("score", model, *part, "--drift-state", state) for part in (paths[:35], paths[35:40], paths[40:])]

    def alarms(text):
        return [(record["path"], record["since"]) for record in map(json.loads, text.splitlines())
                if record["type"] == "drift"]

    # Ties between distances are broken at random, so a run is repeated only with the same seed.
    assert len([alarm for part in parts for alarm in alarms(part)]) == len(alarms(whole)) == 1
    assert json.loads(state.read_text())["watched"] == len(paths)


def test_a_state_that_cannot_be_saved_stops_no_run(line, tmp_path, monkeypatch, caplog):
    """Until the end, which reports it."""
    model, folder = line
    monkeypatch.setattr(module, "SAVED_EVERY", 0.0)
    calls = []

    def full(record, path):
        calls.append(path)
        raise UadtoolError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(UadtoolError, match="no space left"):
        run_here("score", model, folder, "--drift-state", tmp_path / "drift.json")
    assert len(calls) == 90 + 1
    assert "no space left" in caplog.text


@pytest.mark.parametrize(("content", "message"), [
    ("{}", "is not a uadtool.drift/1 file"), ("{", "is not JSON"),
    ('{"schema": "uadtool.drift/2"}', "newer uadtool"), ('{"schema": "uadtool.drift/1"}', "its model_digest|lacks"),
])
def test_a_damaged_state_is_refused(line, tmp_path, content, message):
    state = tmp_path / "drift.json"
    state.write_text(content)
    with pytest.raises(UadtoolError, match=message):
        run_here("score", *line, "--drift-state", state)
    assert state.read_text() == content


def test_the_state_of_another_model_is_refused(line, make_detector, tmp_path):
    model, folder = line
    state = tmp_path / "drift.json"
    run_here("score", model, folder, "--drift-state", state)
    other = make_detector(tmp_path / "other.onnx", METADATA.replace(threshold=3.0))
    with pytest.raises(UadtoolError, match="is about another model"):
        run_here("score", other, folder, "--drift-state", state)
