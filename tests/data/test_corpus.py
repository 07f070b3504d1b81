"""Every item of the corpus through train, calibrate and score."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from conftest import Step, run_here
from corpus import Item, corpus, good, make

from uadtool.data.images import read_image
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.files import WRITTEN
from uadtool.runtimes.opening import open_model
from uadtool.scoring.records import score
from uadtool.terminal import printable

MEMORY = 256 << 20
"""Bytes of memory that scoring the whole corpus may take on two threads."""

MEASURED = """
import atexit, sys
from pathlib import Path
from uadtool.cli.main import main
from uadtool.host import peak_memory
atexit.register(lambda file: Path(file).write_text(str(peak_memory())), sys.argv.pop(1))
main()
"""
"""uadtool, which writes its peak memory to a file at its end. `wait4` would include the memory of the parent."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Dict[str, Item]]:
    folder = tmp_path_factory.mktemp("hostile") / "images"
    return folder, make(corpus(), folder)


def run(*line: object, folder: Path) -> Tuple[int, str, str, int]:
    """Exit code, output, messages and peak memory in bytes of a command. Ghostscript leaves a file if it is run."""
    trap = folder / "bin" / "gs"
    trap.parent.mkdir(exist_ok=True)
    trap.write_text(f"#!/bin/sh\ntouch {folder}/ghostscript-was-run\n")
    trap.chmod(0o755)
    environment = {**os.environ, "PATH": f"{trap.parent}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.run([sys.executable, "-c", MEASURED, folder / "memory", *map(str, line)], stdout=out,
                                 stderr=err, env=environment)
    printed, messages = ((folder / name).read_bytes().decode("utf-8", "surrogateescape") for name in ("out", "err"))
    return process.returncode, printed, messages, int((folder / "memory").read_text())


@pytest.mark.slow  # it draws hundreds of pictures
def test_score_answers_each_with_one_line(hostile: Tuple[Path, Dict[str, Item]], detector: Path,
                                          tmp_path: Path) -> None:
    folder, items = hostile
    code, printed, messages, memory = run(
        "score", "-q", detector, folder, "--threads", 2, "--threshold", -100, "--heatmaps", tmp_path / "maps",
        "--masks", tmp_path / "masks", "--copy-anomalous", tmp_path / "copies", "--contact-sheet",
        tmp_path / "sheet.png", "--top", 500, folder=tmp_path)
    images = {record["path"]: record for record in map(json.loads, printed.splitlines()) if record["type"] == "image"}
    assert code == 1
    *warnings, error = messages.splitlines()
    assert "could not be scored; first: " in error
    assert all("images are blank or faint" in line or "look like no class" in line for line in warnings)
    assert all(printable(line) == line for line in messages.splitlines())
    assert images.keys() == {path for path in items if Path(path).suffix}
    for path, record in images.items():
        assert items[path].read in (None, "score" in record), record
        assert ("score" in record) != ("error" in record)
        assert path in record.get("error", path)
    scored = sum("score" in record for record in images.values())
    assert scored >= len(READABLE)
    for written in ("maps", "masks", "copies"):
        assert len([path for path in (tmp_path / written).iterdir() if path.name != WRITTEN]) == scored
    assert memory < MEMORY
    assert not (tmp_path / "ghostscript-was-run").exists()


def test_the_reader_reads_or_refuses_each(hostile: Tuple[Path, Dict[str, Item]]) -> None:
    for path, item in hostile[1].items():
        try:
            read_image(path, (32, 32))
            read = True
        except UadtoolError:
            read = False
        assert item.read in (None, read), path


def test_csv_holds_each(hostile: Tuple[Path, Dict[str, Item]], detector: Path, tmp_path: Path) -> None:
    folder, items = hostile
    code, printed, _, _ = run("score", "-q", detector, folder, "--format", "csv", folder=tmp_path)
    assert code == 1
    rows = csv.DictReader(io.StringIO(printed, newline=""))
    assert {row["path"] for row in rows} == {path for path in items if Path(path).suffix}


READABLE = [item for item in corpus() if item.read]
REFUSED = [item for item in corpus() if item.read is False]
KINDS = [b"cut-00000.png", b"zeros-by-nature.png", b"bomb-3.6-gigapixels.png", b"float-nan.tif", b"fifo.png",
         b"loop.png"]
"""Refused images, one for each reason."""


def dataset(folder: Path, items: List[Item]) -> Path:
    """A data set of one class, with two good images and these."""
    images = folder / "part" / "train" / "good"
    make(items, images)
    for index in range(2):
        good(images / f"good{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(step: Callable[..., Step], textures: Path) -> Path:
    """The smallest model, since each item loads it."""
    return step("train", textures, "--method", "stfpm", "--image-size", 32, "--steps", 1,
                output="smallest.safetensors").path


def test_train_and_calibrate_use_each_readable_image(model: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", READABLE)
    report = json.loads(run_here("train", data, "--check"))
    assert (report["classes"]["part"]["train"], report["unreadable"]) == ({"good": 2 + len(READABLE)}, [])
    record = json.loads(run_here("train", data, "--image-size", 32, "-o", tmp_path / "m.safetensors"))
    copies = sum(len(group) - 1 for group in report["copies"])
    assert record["classes"]["part"]["copies"] == copies
    assert record["classes"]["part"]["training"] > len(READABLE) - copies  # copies are trained on
    record = json.loads(run_here("calibrate", model, data, "--classes", "part", "--count", 1000,
                                 "-o", tmp_path / "r.json"))
    assert record["images"] == 2 + len(READABLE)


@pytest.mark.parametrize("item", [
    pytest.param(item, marks=[] if item.name in KINDS else pytest.mark.slow, id=ascii(item.name)) for item in REFUSED])
def test_train_and_calibrate_name_an_unreadable_image(item: Item, model: Path, tmp_path: Path) -> None:
    data, output = dataset(tmp_path / "data", [item]), tmp_path / "output"
    for line in (["train", data, "--image-size", 32], ["calibrate", model, data, "--classes", "part"]):
        with pytest.raises(UadtoolError) as error:
            run_here(*line, "-o", output)
        assert str(item.path(data / "part/train/good")) in str(error.value)
        assert "\n" not in str(error.value)
        assert not output.exists()


def test_images_that_change_and_vanish_while_they_are_read(detector: Path, tmp_path: Path) -> None:
    path, over = tmp_path / "changing.png", threading.Event()

    def change() -> None:
        while not over.is_set():
            good(path)
            os.truncate(path, 500)
            path.unlink()

    runtime, changing = open_model(str(detector), 2), threading.Thread(target=change)
    changing.start()
    try:
        lines: List[Dict[str, Any]] = list(score(runtime, [Sample(str(path))] * 500))
    finally:
        over.set()
        changing.join()
    assert len(lines) == 502
    assert all(("score" in record) != ("error" in record) for record in lines[1:-1])
    assert lines[-1]["errors"] > 0


def test_folders_as_deep_as_they_get(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python's stack, and than the longest path."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2200):
        os.mkdir("d")  # noqa: PTH102 - relative, since the absolute path is too long
        os.chdir("d")
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(UadtoolError, match=r"cannot read .*: (File name too long|.* nested too deeply)"):
            run_here("score", detector, tmp_path)
    finally:
        subprocess.run(["rm", "-rf", "d"], check=True)  # pytest cannot


def test_paths_on_stdin_have_an_end(detector: Path, tmp_path: Path) -> None:
    (tmp_path / "paths").write_bytes(b"a\0b.csv\nc\0d.png\n" + 3 * (1 << 20) * b"x")
    with (tmp_path / "paths").open("rb") as paths:
        done = subprocess.run([sys.executable, "-m", "uadtool", "score", "-q", str(detector), "-"], stdin=paths,
                              capture_output=True, text=True, check=False)
    assert done.returncode == 1
    errors = [json.loads(line) for line in done.stdout.splitlines() if "error" in line]
    assert [record["path"] for record in errors] == ["a\0b.csv", "c\0d.png"]
    assert all("embedded null byte" in record["error"] for record in errors)
    assert done.stderr == ("uadtool: error: stdin is not a list of paths: a line does not end; after find -print0, "
                           "use -0\n")
