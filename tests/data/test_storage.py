"""Images at URLs: in memory, and in the buckets of a real S3 server."""

import functools
import json
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator, List

import numpy as np
import pytest
from conftest import run_here
from PIL import Image

from uadtool.data import storage
from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.images import ImageError, read_image
from uadtool.data.samples import Sample
from uadtool.errors import MissingPackage, UadtoolError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(mvtec: Path) -> Iterator[str]:
    """The data set in the memory of this process."""
    system = fsspec.filesystem("memory")
    system.put(f"{mvtec}/", "/bucket/mvtec/", recursive=True)
    yield "memory://bucket/mvtec"
    system.rm("/bucket", recursive=True)


def elsewhere(samples: List[Sample], here: str, there: str) -> List[Sample]:
    def moved(name: Any) -> Any:
        return name and name.replace(here, there)

    return [sample.__class__(moved(sample.path), sample.class_name, sample.label, tuple(map(moved, sample.masks)))
            for sample in samples]


@pytest.mark.parametrize("inside", ["", "/red", "/red/test/spot", "/red/test/good/000.png"])
def test_remote_samples_equal_local_samples(memory: str, mvtec: Path, inside: str) -> None:
    found = list(scoring_samples([f"{memory}{inside}"]))
    assert found == elsewhere(list(scoring_samples([f"{mvtec}{inside}"])), str(mvtec), memory)
    assert np.array_equal(read_image(found[0].path, (32, 32)), read_image(
        found[0].path.replace(memory, str(mvtec)), (32, 32)))


def test_hidden_files_are_left_out(memory: str) -> None:
    system = fsspec.filesystem("memory")
    before = list(scoring_samples([memory]))
    system.copy("/bucket/mvtec/red/test/good/000.png", "/bucket/mvtec/red/test/.trash/000.png")
    system.copy("/bucket/mvtec/red/test/good/000.png", "/bucket/mvtec/red/test/good/.000.png")
    assert list(scoring_samples([memory])) == before


def test_a_manifest_names_local_and_remote_files(memory: str, mvtec: Path, tmp_path: Path) -> None:
    rows = [{"path": "red/test/spot/000.png", "mask": "red/ground_truth/spot/000_mask.png", "label": "spot"},
            {"path": str(mvtec / "red/test/good/000.png"), "label": "good"},
            {"path": f"{memory}/green/test/good/000.png"}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    fsspec.filesystem("memory").pipe("/bucket/mvtec/set.jsonl", text.encode())
    (tmp_path / "set.jsonl").write_text(text)
    assert [sample.path for sample in scoring_samples([f"{memory}/set.jsonl"])] == [
        f"{memory}/red/test/spot/000.png", str(mvtec / "red/test/good/000.png"), f"{memory}/green/test/good/000.png"]
    spot, *_ = scoring_samples([f"{memory}/set.jsonl"])
    assert (spot.masks, spot.class_name) == ((f"{memory}/red/ground_truth/spot/000_mask.png",), "set")
    *_, other = scoring_samples([str(tmp_path / "set.jsonl")])
    assert other.path == f"{memory}/green/test/good/000.png"


def test_pictures_and_copies_of_remote_images(memory: str, detector: Path, tmp_path: Path) -> None:
    run_here("score", detector, memory, "--heatmaps", tmp_path / "maps", "--masks", tmp_path / "masks",
             "--copy-anomalous", tmp_path / "copies", "--contact-sheet", tmp_path / "sheet.png")
    assert len(list((tmp_path / "maps").glob("[!.]*"))) == len(list((tmp_path / "masks").glob("[!.]*"))) == 16
    for copy in (tmp_path / "copies").glob("[!.]*"):
        Image.open(copy).load()


def test_file_urls_are_local_paths(mvtec: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").symlink_to(mvtec)
    url = f"file://{tmp_path}/a%20b"
    assert list(scoring_samples([url])) == list(scoring_samples([str(tmp_path / "a b")]))
    assert training_samples(url) == training_samples(str(tmp_path / "a b"))


def test_a_root_is_a_folder(memory: str) -> None:
    system = fsspec.filesystem("memory")
    system.copy("/bucket/mvtec/red/test/good/000.png", "/a.png")
    try:
        found = [sample.path for sample in scoring_samples(["memory://"])]
    finally:
        system.rm("/a.png")
    assert "memory://a.png" in found
    assert "memory://bucket/mvtec/red/test/good/000.png" in found


def test_the_query_of_a_signed_url_is_not_part_of_its_name(mvtec: Path, detector: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    asked: List[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(mvtec))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/red/test/spot/003.png?X-Sig=a.b#c"
        printed = run_here("score", detector, url, "--copy-anomalous", tmp_path / "copies", "--threshold", -100)
        server.shutdown()
    assert len(asked) == 2  # for scoring and for the copy
    copy = json.loads(printed.splitlines()[1])["copy"]
    assert Path(copy).name.endswith("003.png")
    assert Path(copy).read_bytes() == (mvtec / "red/test/spot/003.png").read_bytes()


def test_is_url() -> None:
    assert not any(map(storage.is_url, ("a", "/a", "C:\\a", "a:b", "1://a", "://", "a/b://c")))
    assert all(map(storage.is_url, ("s3://a", "gs://", "https://a/b.png", "memory://a")))


# What goes wrong


def test_missing_files(memory: str, detector: Path) -> None:
    with pytest.raises(ImageError, match=r"^cannot read memory://bucket/none.png: No such file or directory$"):
        read_image("memory://bucket/none.png", (32, 32))
    with pytest.raises(ImageError, match=r"^cannot read memory://bucket/mvtec: "):
        read_image(memory, (32, 32))
    with pytest.raises(UadtoolError, match=r"^cannot read memory://bucket/none.csv: No such file or directory$"):
        list(scoring_samples(["memory://bucket/none.csv"]))
    assert list(scoring_samples(["memory://nowhere"])) == [Sample("memory://nowhere")]  # reading it reports the error


def test_training_is_local(memory: str) -> None:
    with pytest.raises(UadtoolError, match="is remote, but training rereads its images every epoch; copy them"):
        training_samples(memory)


@pytest.mark.parametrize("row", ["memory://bucket/a.png,good,", "a.png,bad,memory://bucket/mask.png"])
def test_training_images_and_masks_are_local(tmp_path: Path, row: str) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "parts.csv").write_text(f"path,label,mask\na.png,good,\n{row}\n")
    with pytest.raises(UadtoolError, match=r"^memory://bucket/.*png is remote, but training rereads its images"):
        training_samples(str(tmp_path / "parts.csv"))


@pytest.mark.parametrize("url", ["abc://bucket/a", "abc://bucket/a.csv"])
def test_urls_of_unknown_kind(url: str) -> None:
    with pytest.raises(UadtoolError, match=f"^cannot read {url}: Protocol not known: abc"):
        list(scoring_samples([url]))
    with pytest.raises(ImageError, match=f"^cannot read {url}: Protocol not known: abc"):
        read_image(url, (32, 32))


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for url in ("s3://bucket/photos", "s3://bucket/a.csv"):
        with pytest.raises(MissingPackage, match="s3fs"):
            list(scoring_samples([url]))
    with pytest.raises(MissingPackage, match="s3fs"):
        read_image("s3://bucket/a.png", (32, 32))


def test_fsspec_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingPackage, match=r"fsspec is not installed; pip install 'uadtool\[remote\]'"):
        list(scoring_samples(["memory://bucket"]))


# A real server


@pytest.fixture(scope="module")
def s3(mvtec: Path) -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "key"),
                            ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(f"{mvtec}/", "bucket/mvtec/", recursive=True)
        yield "s3://bucket/mvtec"
    server.stop()


def lines(printed: str) -> List[Any]:
    def timeless(record: Any) -> Any:
        return {key: value for key, value in record.items()
                if key not in ("started", "time", "milliseconds", "seconds", "images_per_second")}

    return [timeless(json.loads(line)) for line in printed.splitlines()]


def test_a_data_set_in_a_bucket_has_the_same_scores(s3: str, mvtec: Path, detector: Path) -> None:
    found = lines(run_here("score", detector, s3))
    assert found == lines(run_here("score", detector, mvtec).replace(str(mvtec), s3))
    assert "aupro" in found[-1]["metrics"]


def test_files_that_a_bucket_does_not_have(s3: str, detector: Path) -> None:
    command = [sys.executable, "-m", "uadtool", "score", "-q", str(detector), "s3://bucket/none.png",
               "s3://nowhere/photos", f"{s3}/red/test/good/000.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    _, missing, no_bucket, image, _ = map(json.loads, done.stdout.splitlines())
    assert missing["error"] == "cannot read s3://bucket/none.png: No such file or directory"
    assert no_bucket["error"].startswith("cannot read s3://nowhere/photos: ")
    assert "score" in image
    assert done.stderr.count("\n") == 1
