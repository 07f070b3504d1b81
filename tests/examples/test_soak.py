"""examples/jetson/soak.py: the minutes and the verdict. test_jetson_example.py runs it over SSH."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "examples/jetson/soak.py"


@pytest.fixture(scope="module")
def soak():
    specification = importlib.util.spec_from_file_location("soak", SOAK)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(*arguments):
    done = subprocess.run([sys.executable, SOAK, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SOAK.parents[2])})
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_minutes_and_verdict(detector, mvtec):
    done, (start, *minutes, verdict) = run(detector, mvtec, 2.5 / 3600, "--every", 0.3)
    assert start["type"] == "start"
    assert start["images"] > 0
    assert len(minutes) >= 5
    for number, minute in enumerate(minutes, 1):
        assert minute["minute"] == number
        assert minute["errors"] == minute["changed_scores"] == 0
        times = minute["milliseconds"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"]
        assert minute["resident_bytes"] > 10e6
    assert verdict["type"] == "verdict"
    assert verdict["images"] == sum(minute["images"] for minute in minutes)
    assert verdict["ok"] == (not verdict["findings"])
    assert done.returncode == (not verdict["ok"])
    assert not [finding for finding in verdict["findings"] if "could not" in finding or "another score" in finding]


def test_images_that_fail_and_a_model_that_does_not_run(detector, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    done, records = run(detector, tmp_path, 0.5 / 3600, "--every", 0.1)
    assert done.returncode == 1
    assert "images could not be scored" in records[-1]["findings"][0]
    done, records = run("missing.onnx", tmp_path, 0.5 / 3600)
    assert done.returncode == 1
    assert records[-1]["findings"][0] == "the process ended early, with exit code 1"
    assert "missing.onnx: no such model file" in done.stderr
    done, records = run(detector, tmp_path / "nothing", 1)
    assert (done.returncode, records) == (1, [])
    assert done.stderr.endswith("nothing has no PNG or JPEG files\n")


def minutes(**last):
    """Eight good minutes and the last two, which differ in these figures."""
    good = {"images": 100, "errors": 0, "changed_scores": 0, "milliseconds": {"p50": 5.0}, "throttling": 3,
            "resident_bytes": 200_000_000}
    warm_up = {**good, "milliseconds": {"p50": 50.0}, "resident_bytes": 100_000_000}
    return [warm_up, *[good] * 7, *[{**good, **last}] * 2]


@pytest.mark.parametrize(("last", "findings"), [
    ({}, []), ({"resident_bytes": 215_000_000}, []), ({"milliseconds": {"p50": 5.4}}, []),
    ({"resident_bytes": 230_000_000}, ["memory grew from 200000000 to 230000000 bytes"]),
    ({"milliseconds": {"p50": 5.6}}, ["the median latency rose from 5.00 to 5.60 ms"]),
    ({"throttling": 5}, ["the machine throttled 2 times"]),
    ({"errors": 1}, ["2 images could not be scored"]),
    ({"changed_scores": 4}, ["8 times an image got another score than the first time"]),
    ({"exit_code": -9}, ["the process ended early, with exit code -9"] * 2),
])
def test_findings(soak, last, findings):
    assert soak.judge(minutes(**last)) == findings


def test_too_few_minutes_say_nothing(soak):
    assert soak.judge(minutes()[:4]) == ["too short: there must be at least 5 minutes"]


def test_another_score_of_the_same_image_is_seen(soak):
    minute, scores = soak.Minute(), {}
    for score in (2.0, 2.001, 2.1):
        minute.add({"path": "a.png", "score": score, "milliseconds": 1}, scores)
    assert minute.changed == 1
