import csv
import fcntl
import io
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from conftest import METADATA, SPREAD, STATISTICS, validate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image
from uadtool.data.samples import Sample
from uadtool.data.watch import Watch
from uadtool.errors import UadtoolError
from uadtool.runtimes.opening import open_model
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.metrics import auroc
from uadtool.scoring.predict import Prediction, with_pixels
from uadtool.scoring.records import evaluate, score

COMMAND = [sys.executable, "-m", "uadtool", "score", "-q"]


def records(text: str) -> List[Dict[str, Any]]:
    """The lines of a run, each valid: first the run, then images, last the summary."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        validate(line, "score")
    assert [line["type"] for line in lines] == ["run", *["image"] * (len(lines) - 2), "summary"]
    return lines


@pytest.fixture
def photos(mvtec, tmp_path):
    """Three images in a plain folder: good, broken, anomalous."""
    (tmp_path / "photos").mkdir()
    good, broken, spot = (tmp_path / "photos" / name for name in ("a.png", "b.jpg", "c.png"))
    good.write_bytes((mvtec / "red/test/good/000.png").read_bytes())
    Image.open(good).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    spot.write_bytes((mvtec / "red/test/spot/003.png").read_bytes())
    return good.parent


def test_every_line_is_valid_and_says_what_the_detector_computes(uadtool, detector, mvtec):
    done = uadtool("score", "-q", detector, mvtec)
    assert (done.returncode, done.stderr) == (0, "")
    run, *images, summary = records(done.stdout)
    assert run["threshold"] == METADATA.threshold
    assert run["model"]["classes"] == METADATA.classes
    assert len(images) == summary["images"] == 16
    for image in images:
        name, _, kind = Path(image["path"]).parts[-4:-1]
        assert (image["class"], image["label"]) == (name, "good" if kind == "good" else "anomalous")
        assert image["nearest_class"] == name
        brightness = read_image(image["path"], (32, 32)).mean(-1).reshape(8, 4, 8, 4).mean((1, 3))
        raw = np.sort(brightness.ravel())[-4:].mean()
        assert image["raw_score"] == pytest.approx(raw, rel=1e-4)
        mean, std = STATISTICS[name]
        assert image["score"] == pytest.approx((raw - mean) / std, rel=1e-4, abs=1e-4)
        assert image["anomalous"] == (image["score"] > METADATA.threshold)
        assert image["class_distance"] < METADATA.class_distance_limit
        assert image["unknown_class"] is False
    assert "unknown_class" not in summary
    assert summary["anomalous"] == sum(image["anomalous"] for image in images)
    assert summary["metrics"]["image_auroc"]["per_class"] == {"green": 1.0, "red": 1.0}
    assert list(summary["metrics"]["aupro"]["per_class"]) == ["red"]  # green has no masks
    assert list(summary["pixels"]) == ["green", "red"]  # green has good images, and another shard may have its masks


def test_a_broken_image_costs_one_line(uadtool, detector, photos):
    done = uadtool("score", "-q", detector, photos)
    assert done.returncode == 1
    _, good, broken, spot, summary = records(done.stdout)
    assert "score" in good
    assert "score" in spot
    assert "b.jpg" in broken["error"]
    assert (summary["images"], summary["errors"], summary["anomalous"]) == (3, 1, 1)
    assert "metrics" not in summary
    assert "pixels" not in summary
    assert done.stderr.startswith("uadtool: error: 1 of 3 images could not be scored; first: ")
    assert done.stderr.count("\n") == 1


def test_an_image_of_no_known_class(uadtool, detector, photos):
    Image.new("RGB", (32, 32), (0, 30, 200)).save(photos / "blue.png")
    done = uadtool("score", detector, photos / "a.png", photos / "blue.png")
    _, known, unknown, summary = records(done.stdout)
    blue = np.array([0, 30, 200])
    assert unknown["class_distance"] == pytest.approx(np.sqrt(np.square(blue - [0, 80, 0]).sum()) / SPREAD, rel=1e-3)
    assert [image["unknown_class"] for image in (known, unknown)] == [False, True]
    assert summary["unknown_class"] == 1
    assert "1 of 2 images look like no class that the model was trained on (unknown_class)" in done.stderr
    assert unknown["anomalous"] == (unknown["score"] > unknown["threshold"])


def test_a_model_without_class_distances(make_detector, uadtool, photos, tmp_path):
    """As before 2026-12."""
    onnx = pytest.importorskip("onnx")
    path = make_detector(tmp_path / "old.onnx", METADATA.replace(class_distance_limit=None))
    proto = onnx.load(path)
    del proto.graph.output[-1]
    onnx.save(proto, path)
    *_, image, _ = records(uadtool("score", "-q", path, photos / "a.png").stdout)
    assert {"class_distance", "unknown_class"}.isdisjoint(image)
    assert np.isnan(open_model(str(path), 1).run(np.zeros((2, 32, 32, 3), np.uint8)).class_distance).all()


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_batches_change_nothing(detector, mvtec, photos, batch_size):
    def results(size):
        lines = list(score(open_model(str(detector), 1), scoring_samples([str(photos), str(mvtec)]), batch_size=size))
        return [[line["path"], line.get("error"), line.get("score")] for line in lines if line["type"] == "image"]

    one_by_one = results(1)
    assert len(one_by_one) == 19
    assert results(batch_size) == one_by_one


def test_answers_while_more_paths_are_to_come(detector, mvtec):
    with subprocess.Popen([*COMMAND, str(detector), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for path in sorted((mvtec / "red/test/good").iterdir()):
            process.stdin.write(os.fsencode(f"{path}\n"))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == str(path)  # hangs here if it waits for more
        process.stdin.close()
        assert json.loads(process.stdout.readline())["images"] == 4
    assert process.returncode == 0


def test_ends_quietly_when_the_reader_goes(detector, mvtec):
    path = os.fsencode(f"{mvtec}/red/test/good/000.png\n")
    with subprocess.Popen([*COMMAND, str(detector)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(path)
        process.stdin.flush()
        assert process.wait(30) == 141  # although stdin is still open
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_a_slow_reader_gets_whole_lines(detector, mvtec, tmp_path, number):
    """The output exceeds what a pipe holds; a signal that comes while the pipe is full loses no scored image."""
    paths = tmp_path / "paths"
    paths.write_text(f"{mvtec}/red/test/good/000.png\n" * 500)
    with paths.open() as stdin, subprocess.Popen(
            [*COMMAND, str(detector), "-"], stdin=stdin, stdout=subprocess.PIPE, preexec_fn=lambda: [
                signal.signal(ending, signal.SIG_DFL) for ending in (signal.SIGINT, signal.SIGTERM)]) as process:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        lines = [process.stdout.readline()]
        waiting = bytes(4)
        while int.from_bytes(waiting, sys.byteorder) < 3000:
            time.sleep(0.01)
            waiting = fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4))
        if number:
            process.send_signal(number)
        lines += process.stdout.readlines()
    assert process.returncode == (128 + number if number else 0)
    assert [json.loads(line)["type"] for line in lines][:2] == ["run", "image"]
    assert len(lines) == 502 if number is None else len(lines) < 502


def test_interrupt_while_waiting_for_paths(detector):
    with subprocess.Popen(
            [*COMMAND, str(detector)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:  # background jobs ignore it
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read().strip() == b"uadtool: interrupted"


def test_paths_of_any_bytes(detector, mvtec, tmp_path):
    names = [b"line\nbreak.png", b"latin-\xe9.png", "grün.png".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(
            (mvtec / "red/test/good/000.png").read_bytes())
    paths = b"\0".join(os.fsencode(tmp_path) + b"/" + name for name in names)  # the last one has no NUL
    done = subprocess.run([*COMMAND, str(detector), "-", "-0"], input=paths, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    images = records(done.stdout.decode("ascii"))[1:-1]
    assert [os.fsencode(image["path"]).split(b"/")[-1] for image in images] == names


def test_threshold_and_heatmaps(uadtool, detector, photos, tmp_path):
    (photos / "b.jpg").unlink()
    done = uadtool("score", detector, photos, "--threshold", "-1", "--heatmaps", tmp_path / "pictures")
    run, *images, _ = records(done.stdout)
    assert run["threshold"] == -1
    assert all(image["anomalous"] for image in images)
    assert sorted((tmp_path / "pictures").glob("[!.]*")) == sorted(Path(image["heatmap"]) for image in images)


def test_fail_above(uadtool, detector, photos):
    done = uadtool("score", "-q", detector, photos, "--fail-above", "5")
    assert done.returncode == 4
    assert len(records(done.stdout)) == 5
    unread, gate = done.stderr.splitlines()
    assert "1 of 3 images could not be scored" in unread
    assert f"1 of 3 images score above 5; worst: {photos}/c.png with 17.8" in gate
    (photos / "b.jpg").unlink()
    assert uadtool("score", detector, photos, "--fail-above", "50").returncode == 0


def test_fail_anomalous(uadtool, detector, photos):
    (photos / "b.jpg").unlink()
    assert uadtool("score", detector, photos, "--fail-anomalous").returncode == 4
    assert uadtool("score", detector, photos, "--fail-anomalous", "--threshold", "50").returncode == 0


def test_a_false_positive_rate_chooses_a_threshold(uadtool, detector, photos, make_detector, tmp_path):
    (photos / "b.jpg").unlink()
    for rate, threshold in ((0, 1.9), (0.05, 1.8), (0.5, 0.0)):  # of forty scores
        run, *_ = records(uadtool("score", detector, photos, "--false-positive-rate", rate).stdout)
        assert run["threshold"] == threshold
    without = make_detector(tmp_path / "old.onnx", METADATA.replace(good_scores={}))
    done = uadtool("score", without, photos, "--false-positive-rate", 0.1)
    assert done.returncode == 1
    assert "does not hold the scores of good images" in done.stderr


def test_pictures_of_an_earlier_run_are_not_scored(uadtool, detector, photos):
    (photos / "b.jpg").unlink()
    runs = [records(uadtool("score", "-q", detector, photos, "--heatmaps", photos / "pictures", "--copy-anomalous",
                            photos / "copies", "--threshold", -100).stdout) for _ in range(2)]
    paths = [[record.get("path") for record in run] for run in runs]
    assert paths[0] == paths[1] == [None, f"{photos}/a.png", f"{photos}/c.png", None]
    assert len(records(uadtool("score", detector, photos / "copies").stdout)) == 4  # as the user asks for them


def test_pictures_of_anomalous_images_alone(uadtool, detector, photos, tmp_path):
    (photos / "b.jpg").unlink()
    done = uadtool("score", detector, photos, "--heatmaps", tmp_path / "h", "--masks", tmp_path / "m", "--pictures",
                   "anomalous")
    images = records(done.stdout)[1:-1]
    assert {image["anomalous"] for image in images} == {True, False}
    for image in images:
        assert ("heatmap" in image) == ("mask" in image) == image["anomalous"]


def test_classes_that_the_model_does_not_know_are_named(uadtool, make_detector, mvtec, tmp_path):
    model = make_detector(tmp_path / "m.onnx", METADATA.replace(classes=["green", "blue"]))
    done = uadtool("score", model, mvtec)
    assert done.returncode == 0
    assert "8 of 16 images are of classes that the model was not trained on (red); it scores" in done.stderr


def test_recall_and_false_positive_rate_are_given_by_class(uadtool, detector, mvtec):
    scores = [image["score"] for image in records(uadtool("score", detector, mvtec).stdout)[1:-1]
              if (image["class"], image["label"]) == ("green", "anomalous")]
    *images, summary = records(uadtool("score", detector, mvtec, "--threshold", np.median(scores)).stdout)[1:]
    for name, label in (("recall", "anomalous"), ("false_positive_rate", "good")):
        figure = summary["metrics"][name]
        shares = {of: np.mean([image["anomalous"] for image in images if image["class"] == of
                               and image["label"] == label]) for of in ("green", "red")}
        assert figure["per_class"] == {of: pytest.approx(share) for of, share in shares.items()}
        assert figure["mean"] == figure["pooled"] == approx(np.mean(list(shares.values())))
    assert summary["metrics"]["recall"]["per_class"]["green"] == 0.5


def test_csv(uadtool, detector, mvtec, photos):
    done = uadtool("score", detector, mvtec, photos, "--format", "csv")
    assert done.returncode == 1
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    _, *lines, _ = records(uadtool("score", detector, mvtec, photos).stdout)
    assert [row["path"] for row in rows] == [line["path"] for line in lines]
    for row, line in zip(rows, lines):
        assert row["error"] == line.get("error", "")
        assert row["score"] == str(line.get("score", ""))
        assert row["anomalous"] == str(line.get("anomalous", ""))
        assert row["class"] == line.get("class", "")


@pytest.mark.parametrize("env", [{}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}])
@pytest.mark.parametrize("name", [b"latin-\xe9.png", "\u4e2d\xe9.png".encode()])
def test_csv_of_names_in_any_encoding(detector, mvtec, tmp_path, name, env):
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes((mvtec / "red/test/good/000.png").read_bytes())
    done = subprocess.run([*COMMAND, str(detector), path, "--format", "csv"], capture_output=True, timeout=60,
                          env={**os.environ, **env})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[1].startswith(path)


def test_records_name_the_files_written_for_each_image(uadtool, detector, mvtec, tmp_path):
    done = uadtool("score", detector, mvtec, "--masks", tmp_path / "masks", "--copy-anomalous", tmp_path / "copies",
                   "--contact-sheet", tmp_path / "sheet.png", "--top", 4)
    assert done.returncode == 0, done.stderr
    _, *images, _ = records(done.stdout)
    assert {image["mask"] for image in images} == {str(path) for path in (tmp_path / "masks").glob("[!.]*")}
    anomalous = [image for image in images if image["anomalous"]]
    assert 0 < len(anomalous) < len(images)
    assert {image["copy"] for image in anomalous} == {str(path) for path in (tmp_path / "copies").glob("[!.]*")}
    assert all(Path(image["copy"]).read_bytes() == Path(image["path"]).read_bytes() for image in anomalous)
    assert (tmp_path / "sheet.png").stat().st_size > 0


# Following a folder


@pytest.fixture
def following(detector, tmp_path):
    """A process that follows ``folder`` and has started, and the folder."""
    pytest.importorskip("watchdog")
    folder = tmp_path / "incoming"
    folder.mkdir()
    with subprocess.Popen(
            [*COMMAND, str(detector), "--follow", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)) as process:  # which nohup ignores
        assert json.loads(process.stdout.readline())["type"] == "run"
        yield process, folder
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_images_are_answered_as_they_appear(following, mvtec, number):
    process, folder = following
    pixels = (mvtec / "red/test/spot/003.png").read_bytes()
    (folder / "inner").mkdir()
    time.sleep(0.2)  # until it is also watched
    for name in ("a.png", "inner/b.png", "c.png"):
        (folder / "notes.txt").write_text("no image")
        (folder / ".hidden.png").write_bytes(pixels)
        (folder / name).write_bytes(pixels)
        answer = json.loads(process.stdout.readline())
        assert (answer["path"], answer["anomalous"]) == (str(folder / name), True)
    (folder / "broken.png").write_bytes(pixels[:100])
    assert "error" in json.loads(process.stdout.readline())
    process.send_signal(number)
    summary = json.loads(process.stdout.readline())
    assert (summary["type"], summary["images"], summary["errors"]) == ("summary", 4, 1)
    assert process.wait(30) == 0
    assert "1 of 4 images could not be scored" in process.stderr.read().decode()


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda folder: folder.rename(f"{folder}.old")])
def test_a_folder_that_is_gone_ends_the_run(following, remove):
    process, folder = following
    remove(folder)
    folder.mkdir()
    assert process.wait(30) == 1
    assert f"error: {folder} was removed or replaced" in process.stderr.read().decode()


def test_folders_that_vanish_at_once_do_no_harm(following, mvtec, tmp_path):
    process, folder = following
    for index in range(200):
        (tmp_path / f"many/{index}/inner").mkdir(parents=True)
    (tmp_path / "many").rename(folder / "many")
    time.sleep(0.4)  # they are about to be scanned
    shutil.rmtree(folder / "many")
    (folder / "a.png").write_bytes((mvtec / "red/test/spot/003.png").read_bytes())
    assert json.loads(process.stdout.readline())["path"] == str(folder / "a.png")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert process.stderr.read() == b""


def test_a_watch_that_died_ends_the_run(tmp_path):
    pytest.importorskip("watchdog")
    watch = Watch(str(tmp_path))
    watch._observer.stop()
    with pytest.raises(UadtoolError, match="cannot be followed any longer; start again"):
        next(iter(watch))


def test_images_moved_in_from_elsewhere_are_found(following, mvtec, tmp_path):
    process, folder = following
    pixels = (mvtec / "red/test/spot/003.png").read_bytes()
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    for name in ("x.png", "inner/y.png"):
        (tmp_path / "elsewhere" / name).write_bytes(pixels)
    (tmp_path / "elsewhere/x.png").rename(folder / "x.png")
    assert json.loads(process.stdout.readline())["path"] == str(folder / "x.png")
    (tmp_path / "elsewhere/inner").rename(folder / "moved")  # a folder
    assert json.loads(process.stdout.readline())["path"] == str(folder / "moved/y.png")
    (folder / "new").mkdir()
    (folder / "new/z.png").write_bytes(pixels)  # before it is watched
    assert json.loads(process.stdout.readline())["path"] == str(folder / "new/z.png")


def test_folders_that_are_copied_and_moved_give_each_image_once(following, mvtec, tmp_path):
    process, folder = following
    pixels = (mvtec / "red/test/spot/003.png").read_bytes()
    (tmp_path / "batch/inner").mkdir(parents=True)
    names = ["a.png", "b.png", "inner/c.png"]
    for name in names:
        (tmp_path / "batch" / name).write_bytes(pixels)
    (folder / ".stage").mkdir()
    shutil.copytree(tmp_path / "batch", folder / ".stage/batch")
    shutil.copytree(tmp_path / "batch", folder / "copied")
    answers = [json.loads(process.stdout.readline())["path"] for _ in names]
    time.sleep(1.5)  # until the new folder is scanned
    (folder / "copied").rename(folder / "moved")
    answers += [json.loads(process.stdout.readline())["path"] for _ in names]
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert json.loads(process.stdout.readline())["type"] == "summary"
    assert sorted(answers) == [str(folder / place / name) for place in ("copied", "moved") for name in names]


@pytest.mark.parametrize("name", ["slow.png", "new/slow.png"])
def test_a_half_written_image_is_waited_for(following, mvtec, name):
    process, folder = following
    pixels = (mvtec / "red/test/spot/003.png").read_bytes()
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        for start in range(0, 1000, 100):
            file.write(pixels[start:start + 100])
            file.flush()
            time.sleep(0.15)
        file.write(pixels[1000:])
    (folder / ".moved.part").write_bytes(pixels)
    (folder / ".moved.part").rename(folder / "moved.png")
    answers = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [Path(answer["path"]).name for answer in answers] == ["slow.png", "moved.png"]
    assert all("error" not in answer for answer in answers)


def test_a_restart_goes_on_where_the_last_run_ended(uadtool, detector, mvtec, tmp_path):
    folder, log = tmp_path / "incoming", tmp_path / "scores.jsonl"
    folder.mkdir()
    images = sorted((mvtec / "red/test/spot").glob("*.png"))
    command = f"{shlex.join(COMMAND)} {detector} --follow {folder} --done {log} >> {log}"
    log.touch()
    for begun, arrived in enumerate(images[:2], 1):  # each before its run
        shutil.copy(arrived, folder)
        with subprocess.Popen(["bash", "-c", f"exec {command}"], stderr=subprocess.PIPE, text=True) as process:
            while log.read_text().count('"image"') < begun:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL if begun == 1 else signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert stderr == ""
        if begun == 1:
            log.write_text(log.read_text() + '{"type": "im')  # what a power failure leaves
    half, = (number for number, line in enumerate(log.read_text().splitlines(), 1) if line.endswith('"im'))
    thresholds = uadtool("score", detector, images[0], "--threshold-from", log)
    assert thresholds.returncode == 0
    assert f"{log}:{half}: the line is cut short and left out" in thresholds.stderr
    assert "2 good images promise a false-positive rate of 0.33" in thresholds.stderr
    assert "a rate of 0.05 requires 19" in thresholds.stderr
    lines = log.read_text().splitlines()
    del lines[half - 1]
    scored = [line for line in map(json.loads, lines) if line["type"] == "image"]
    assert [line["path"] for line in scored] == [str(folder / image.name) for image in images[:2]]
    for line in scored:
        validate(line, "score")


def test_a_folder_that_cannot_be_followed(uadtool, detector):
    pytest.importorskip("watchdog")
    done = uadtool("score", detector, "--follow", "missing")
    assert done.returncode == 1
    assert "missing is not a directory" in done.stderr


def test_no_paths(uadtool, detector, tmp_path):
    done = uadtool("score", "-q", detector)
    assert (done.returncode, done.stderr) == (1, "uadtool: error: no images to score\n")
    assert records(done.stdout)[-1]["images"] == 0
    terminal, other_end = pty.openpty()
    try:
        done = subprocess.run([*COMMAND, str(detector)], stdin=other_end, capture_output=True, timeout=60)
    finally:
        os.close(terminal)
        os.close(other_end)
    assert done.returncode == 2
    assert b"Give a PATH" in done.stderr


def test_a_path_on_stdin_that_gives_no_images_does_not_end_the_run(uadtool, detector, mvtec, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.csv").write_text("no column of paths\n")
    image = mvtec / "red/test/good/000.png"
    paths = [image, tmp_path / "empty", tmp_path / "broken.csv", image]
    done = uadtool("score", "-q", detector, "-", input="".join(f"{path}\n" for path in paths))
    _, *images, summary = records(done.stdout)
    assert [image["path"] for image in images] == list(map(str, paths))
    assert images[1]["error"] == f"no images to score in {tmp_path / 'empty'}"
    assert "broken.csv" in images[2]["error"]
    assert (done.returncode, summary["images"], summary["errors"]) == (1, 4, 2)
    assert done.stderr == f"uadtool: error: 2 of 4 images could not be scored; first: {images[1]['error']}\n"


@pytest.mark.parametrize(("output", "message"), [
    ({"nearest_class": np.array([-1], np.int32)}, "the model gave class -1 of"),
    ({"score": np.array([np.nan], np.float32)}, "not a finite number"),
    ({"raw_score": np.array([np.inf], np.float32)}, "not a finite number"),
    ({"class_distance": np.array([np.nan], np.float32)}, "not a finite number"),
])
def test_outputs_that_cannot_be_right(detector, mvtec, monkeypatch, output, message):
    runtime = open_model(str(detector), 1)
    run = runtime.run
    monkeypatch.setattr(runtime, "run", lambda images: run(images)._replace(**output))
    _, image, summary = score(runtime, [Sample(str(mvtec / "red/test/good/000.png"), "red", "good")])
    assert message in image["error"]
    assert summary["errors"] == 1


def test_the_model_is_not_replaced_by_the_contact_sheet(uadtool, detector, photos, tmp_path):
    shutil.copy(detector, tmp_path / "model.onnx")
    (tmp_path / "sheet.png").symlink_to("model.onnx")
    done = uadtool("score", tmp_path / "model.onnx", photos, "--contact-sheet", tmp_path / "sheet.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sheet.png is an input of this command; give" in done.stderr
    assert (tmp_path / "model.onnx").read_bytes() == detector.read_bytes()


def test_a_corrupt_model_is_one_line(uadtool, detector, tmp_path):
    content = bytearray(detector.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    (tmp_path / "model.onnx").write_bytes(content)
    done = uadtool("score", tmp_path / "model.onnx", "x.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_a_broken_mask_costs_its_pixels_only(detector, mvtec, tmp_path, caplog):
    def scored():
        _, *images, summary = score(open_model(str(detector), 1), scoring_samples([str(tmp_path / "data")]))
        return [(image["path"], image["score"]) for image in images], summary

    shutil.copytree(mvtec, tmp_path / "data")
    images, whole = scored()
    masks = sorted((tmp_path / "data" / "red" / "ground_truth").rglob("*.png"))
    masks[0].write_bytes(masks[0].read_bytes()[:40])
    again, summary = scored()
    assert again == images
    assert summary["errors"] == 0
    assert f"cannot read {masks[0]}" in caplog.text
    assert "does not count in pixel metrics" in caplog.text
    assert summary["pixels"]["red"]["regions"] == whole["pixels"]["red"]["regions"] - 1
    assert summary["metrics"]["image_auroc"] == whole["metrics"]["image_auroc"]


def test_images_that_show_nothing_are_counted(detector, tmp_path, caplog):
    for name, pixels in (("black", np.zeros((40, 40), np.uint8)), ("sound", np.arange(1600, dtype=np.uint8) % 200)):
        Image.fromarray(pixels.reshape(40, 40)).save(tmp_path / f"{name}.png")
    *_, summary = score(open_model(str(detector), 1), scoring_samples([str(tmp_path)]))
    assert summary["faint"] == 1
    assert "1 of 2 images are blank or faint: they use less than 16 of 256 levels" in caplog.text


# Evaluation


SIZE = (4, 4)


def add(evaluation: Evaluation, sample: Sample, value: float, raw: float = 0.0, mask: Any = None) -> None:
    prediction = Prediction(value, raw, "a", np.full((2, 2), value, np.float32), mask, 1.0, 1.0)
    record = {"path": sample.path, "label": sample.label, "score": value, "raw_score": raw, "anomalous": value > 1}
    if sample.class_name:
        record["class"] = sample.class_name
    evaluate(evaluation, record, with_pixels(prediction, sample, SIZE))


labelled = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.booleans(), st.integers(-3, 3)), max_size=30)


@settings(max_examples=50, deadline=None)
@given(labelled)
def test_image_figures(images):
    evaluation = Evaluation()
    for name, anomalous, value in images:
        sample = Sample("x.png", name, "anomalous" if anomalous else "good")
        add(evaluation, sample, value, -value)
    found = evaluation.figures()
    labels, scores = [i[1] for i in images], [i[2] for i in images]
    good, bad = [s for _, label, s in images if not label], [s for _, label, s in images if label]
    for figure, of in (("false_positive_rate", False), ("recall", True)):
        above = {name: [s > 1 for n, label, s in images if label == of and n == name] for name in ("a", "b", None)}
        everything = [verdict for verdicts in above.values() for verdict in verdicts]
        if not everything:
            assert figure not in found
            continue
        assert found[figure]["pooled"] == approx(np.mean(everything))
        by_class = {name: approx(np.mean(verdicts)) for name, verdicts in above.items() if name and verdicts}
        assert found[figure]["per_class"] == by_class
    assert "aupro" not in found  # no anomalous image has a mask
    if not (good and bad):
        assert "image_auroc" not in found
        return
    figure = found["image_auroc"]
    assert figure["pooled"] == pytest.approx(auroc(labels, scores), rel=1e-5)
    assert figure["pooled_raw"] == pytest.approx(1 - figure["pooled"], abs=1e-5)
    both = {name for name in "ab" if {label for n, label, _ in images if n == name} == {True, False}}
    assert set(figure["per_class"]) == both
    if both:
        assert figure["mean"] == pytest.approx(np.mean(list(figure["per_class"].values())), rel=1e-5)
    else:  # an AUROC between classes is the mean of none
        assert figure.get("mean") == (None if any(name for name, *_ in images) else figure["pooled"])


def test_good_images_of_a_class_with_masks_count_for_its_pixels():
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    evaluation = Evaluation()
    add(evaluation, Sample("1", "a", "good"), 9.0)
    add(evaluation, Sample("2", "a", "anomalous", ("mask",)), 5.0, mask=mask)
    add(evaluation, Sample("3", "b", "good"), 1.0)  # its pixels do not count: b has no masks
    found = evaluation.figures()
    # 8 anomalous pixels, against 16 good ones above and 8 equal to them.
    assert found["pixel_auroc"] == {"mean": approx(1 / 6), "pooled": approx(1 / 6), "per_class": {"a": approx(1 / 6)}}
    assert set(found["aupro"]["per_class"]) == {"a"}


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-5)
