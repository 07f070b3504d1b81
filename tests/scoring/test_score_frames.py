"""``score --frames``: frames on stdin give what files give."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
from conftest import validate
from PIL import Image

from uadtool.host import parse_time

COMMAND = [sys.executable, "-m", "uadtool", "score", "-q"]
SAME = ("score", "raw_score", "threshold", "anomalous", "nearest_class", "class_distance", "unknown_class")


def score(*arguments: object, input: bytes = b"") -> Tuple[List[Dict[str, Any]], "subprocess.CompletedProcess[bytes]"]:
    """The records of a run, each valid, and the finished process."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=input, capture_output=True, timeout=120)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        validate(line, "score")
    return lines, done


@pytest.fixture(scope="session")
def photos(mvtec: Path) -> List[Path]:
    return sorted((mvtec / "red/test").rglob("*.png"))


@pytest.fixture(scope="session")
def jpegs(photos: List[Path], tmp_path_factory: pytest.TempPathFactory) -> List[Path]:
    folder = tmp_path_factory.mktemp("jpegs")
    for number, path in enumerate(photos):
        Image.open(path).save(folder / f"{number}.jpg", quality=95)
    return sorted(folder.iterdir())


def same(images: List[Dict[str, Any]]) -> List[List[Any]]:
    """What does not depend on where the images came from."""
    return [[image[key] for key in SAME] for image in images]


def stream(*paths: Path) -> bytes:
    return b"".join(path.read_bytes() for path in paths)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_frames_have_the_scores_of_files(detector, photos, jpegs, batch_size):
    for files in (photos, jpegs):
        (_, *expected, _), _ = score(detector, *files)
        (_, *images, summary), done = score(detector, "--frames", "--batch-size", batch_size, input=stream(*files))
        assert (done.returncode, done.stderr) == (0, b"")
        assert same(images) == same(expected)
        assert [image["frame"] for image in images] == list(range(1, len(files) + 1))
        assert all(image["arrived"] <= image["time"] for image in images)
        assert len({image["path"] for image in images}) == len(files)
        assert "dropped" not in summary


def test_a_broken_frame_costs_one_record(detector, photos, jpegs):
    frames = [stream(path) for path in (*photos[:2], *jpegs[:2])]
    broken = frames[1][:-20], frames[3][:-20]
    damaged = bytearray(frames[2])
    damaged[len(damaged) // 2:-2] = bytes(len(damaged) - len(damaged) // 2 - 2)  # its structure is whole
    data = b"".join([frames[0], broken[0], frames[2], broken[1], frames[3], frames[0]])
    (_, *images, summary), done = score(detector, "--frames", input=data)
    assert [image.get("error", "").partition(":")[0] for image in images] == [
        "", "frame 2 is cut off or damaged", "", "frame 4 is cut off or damaged", "", ""]
    assert [image["frame"] for image in images] == [1, 2, 3, 4, 5, 6]
    assert all("arrived" in image for image in images)
    assert (summary["images"], summary["errors"]) == (6, 2)
    assert done.returncode == 0
    assert done.stderr == f"uadtool: 2 of 6 images could not be scored; first: {images[1]['error']}\n".encode()


def test_raw_frames_have_the_scores_of_files(detector, photos):
    (_, *expected, _), _ = score(detector, *photos)
    pixels = np.stack([np.asarray(Image.open(path)) for path in photos])
    (_, *images, _), done = score(detector, "--frames", "--raw", "48x48", input=pixels.tobytes())
    assert done.returncode == 0
    assert same(images) == same(expected)
    (_, *images, _), done = score(detector, "--frames", "--raw", "48x50", input=pixels.tobytes())
    assert images[-1]["error"] == "frame 8 is cut off: 4896 of 7200 bytes; does --raw say its size?"


def test_pictures_copies_and_regions_of_frames(detector, jpegs, tmp_path):
    options = ["--heatmaps", tmp_path / "h", "--masks", tmp_path / "m", "--copy-anomalous", tmp_path / "c", "--regions",
               "--contact-sheet", tmp_path / "sheet.png"]
    (_, *images, _), done = score(detector, "--frames", *options, input=stream(*jpegs))
    assert (done.returncode, done.stderr) == (0, b"")
    assert {image["anomalous"] for image in images} == {True, False}
    for image, path in zip(images, jpegs):
        assert Path(image["heatmap"]).stem == Path(image["mask"]).stem == Path(image["path"]).stem
        assert Image.open(image["mask"]).size == (48, 48)
        if image["anomalous"]:
            assert Path(image["copy"]).read_bytes() == path.read_bytes()
            assert Path(image["copy"]).name == image["path"]
            assert image["regions"]
    assert Image.open(tmp_path / "sheet.png").width > 100
    (_, *again, _), _ = score(detector, "--frames", *options, input=stream(*jpegs))  # a service that starts again
    assert len(list((tmp_path / "h").glob("*.png"))) == 2 * len(jpegs)
    assert {image["path"] for image in images}.isdisjoint(image["path"] for image in again)


def test_frames_as_csv(detector, jpegs):
    done = subprocess.run([*COMMAND, str(detector), "--frames", "--format", "csv"], input=stream(*jpegs),
                          capture_output=True, timeout=60)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert [row["frame"] for row in rows] == [str(number) for number in range(1, len(jpegs) + 1)]
    assert all(row["path"].startswith(f"frame-{row['frame']}-") and row["arrived"] for row in rows)


def test_the_latest_frames_are_scored_and_the_others_counted(detector, jpegs):
    """The frames come faster than they are scored."""
    (_, *images, summary), done = score(detector, "--frames", "--latest", input=100 * stream(*jpegs))
    assert done.returncode == 0
    numbers = [image["frame"] for image in images]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 100 * len(jpegs)
    assert summary["images"] + summary["dropped"] == 100 * len(jpegs)
    assert summary["dropped"] > 0


def test_an_answer_comes_before_the_next_frame(detector, jpegs):
    for more in ([], ["--latest"]):
        with subprocess.Popen([*COMMAND, str(detector), "--frames", *more], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            for number, path in enumerate(jpegs, 1):
                process.stdin.write(path.read_bytes())
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["frame"] == number  # hangs here if it waits for more
            process.stdin.close()
            assert json.loads(process.stdout.readline())["images"] == len(jpegs)
        assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_its_summary(detector, jpegs, number):
    with subprocess.Popen([*COMMAND, str(detector), "--frames"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        process.stdout.readline()
        process.stdin.write(jpegs[0].read_bytes())
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(number)
        summary = json.loads(process.stdout.readline())
        assert (summary["type"], summary["images"]) == ("summary", 1)
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("data", "message"), [
    (b"", "no images to score"),
    (b"\0" * 9000, "no images to score"),
    (b"no image" * 9000, "1 of 1 images could not be scored; first: frame 1 is not JPEG or PNG: 72000 bytes without"),
    (b"\xff\xd8\xff\xe0", "1 of 1 images could not be scored; first: frame 1 is cut off or damaged: the stream ends"),
])
def test_a_stream_without_frames_fails(detector, data, message):
    (*_, summary), done = score(detector, "--frames", input=data)
    assert done.returncode == 1
    assert done.stderr.startswith(f"uadtool: error: {message}".encode())
    assert done.stderr.count(b"\n") == 1
    assert summary["type"] == "summary"


def test_a_stdin_that_cannot_be_read(detector, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        done = subprocess.run([*COMMAND, str(detector), "--frames"], stdin=file, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"uadtool: error: cannot read stdin: Bad file descriptor\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--frames", "photos"], "--frames reads stdin; leave out the PATHs."),
    (["--frames", "--follow", "photos"], "--frames reads stdin"),
    (["--frames", "--follow"], "--frames and --follow are mutually exclusive."),
    (["--frames", "--shard", "1/2"], "leave out --shard, --ray and --null."),
    (["--raw", "48x48", "-"], "--raw requires --frames."),
    (["--latest", "-"], "--latest requires --frames."),
    (["--frames", "--raw", "48"], "'48' is not HEIGHTxWIDTH in pixels, such as 1080x1920"),
    (["--frames", "--raw", "0x48"], "is not HEIGHTxWIDTH"),
    (["--frames", "--raw", "48x1000000"], "is not HEIGHTxWIDTH"),
    (["--frames", "--latest", "--batch-size", "2"], "--latest scores images one by one; leave out --batch-size."),
])
def test_options_that_contradict_each_other(detector, arguments, message):
    _, done = score(detector, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.decode().split())


def ffmpeg(*arguments: object) -> bytes:
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg on this machine")
    done = subprocess.run(["ffmpeg", "-v", "error", *map(str, arguments), "-"], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_frames_of_ffmpeg(detector, photos, tmp_path):
    """A film without loss, as JPEG, PNG and raw frames."""
    ffmpeg("-framerate", 10, "-pattern_type", "glob", "-i", f"{photos[0].parent.parent}/*/*.png", "-c:v", "ffv1",
           "-pix_fmt", "bgr0", "-y", tmp_path / "film.mkv", "-f", "null")
    (_, *expected, _), _ = score(detector, *photos)
    film = "-i", tmp_path / "film.mkv", "-fps_mode", "passthrough"
    pipe = *film, "-f", "image2pipe"
    for data, more, tolerance in (
            (ffmpeg(*pipe, "-c:v", "png"), [], 1e-4),
            (ffmpeg(*pipe, "-c:v", "mjpeg", "-q:v", 1, "-pix_fmt", "yuvj444p"), [], 0.5),
            (ffmpeg(*film, "-f", "rawvideo", "-pix_fmt", "rgb24"), ["--raw", "48x48"], 1e-4)):
        (_, *images, _), done = score(detector, "--frames", *more, input=data)
        assert (done.returncode, done.stderr) == (0, b"")
        scores, exact = ([image["score"] for image in those] for those in (images, expected))
        assert scores == pytest.approx(exact, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("latest", [[], ["--latest"]])
def test_memory_stays(detector, jpegs, latest):
    """The memory of a process that scores 100,000 frames."""
    frames = 1000 * stream(jpegs[0])
    with subprocess.Popen([*COMMAND, str(detector), "--frames", *latest], stdin=subprocess.PIPE,
                          stdout=subprocess.DEVNULL) as process:
        resident = []
        for _ in range(100):
            process.stdin.write(frames)
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        process.stdin.close()
        assert process.wait(60) == 0
    assert resident[-1] - resident[5] < 20


@pytest.mark.slow
def test_the_answer_is_about_now(detector, jpegs):
    """Frames come at 1,000 a second, as the model takes its time: what is answered has just arrived."""
    program = ("import time, uadtool.runtimes.onnxruntime as r; run = r.OnnxRuntime.run\n"
               "r.OnnxRuntime.run = lambda self, images: (time.sleep(0.1), run(self, images))[1]\n"
               "import sys; from uadtool.cli.main import main; main()")
    with subprocess.Popen([sys.executable, "-c", program, "score", "-q", str(detector), "--frames", "--latest",
                           "--threads", "8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(2000):
            process.stdin.write(jpegs[0].read_bytes())
            process.stdin.flush()
            time.sleep(0.001)
        process.stdin.close()
        *images, summary = [json.loads(line) for line in process.stdout]
    assert 5 < len(images) < 60
    assert summary["dropped"] == 2000 - len(images)
    ages = [parse_time(image["time"]) - parse_time(image["arrived"]) for image in images]
    assert np.median(ages) < 0.3
