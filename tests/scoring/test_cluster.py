"""Scoring on a real Ray cluster of several nodes on this machine, which loses nodes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from conftest import run_after, run_here, validate

from uadtool.comparing.comparison import compare
from uadtool.runtimes.opening import open_model

ray = pytest.importorskip("ray", reason="Ray is not installed")

COPIES = 40
"""Copies of the 16 images: enough to lose a node in the middle of a run."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, and three nodes of one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def manifest(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set many times, through links: each copy of an image has its own path."""
    folder = tmp_path_factory.mktemp("many")
    rows = []
    for copy in range(COPIES):
        (folder / str(copy)).symlink_to(mvtec)
        for image in sorted(mvtec.glob("*/test/*/*.png")):
            inside = image.relative_to(mvtec)
            mask = Path(inside.parts[0], "ground_truth", "spot", f"{inside.stem}_mask.png")
            rows.append({"path": f"{copy}/{inside}", "class": inside.parts[0], "label": inside.parts[2],
                         **({"mask": f"{copy}/{mask}"} if (mvtec / mask).exists() and "spot" in inside.parts else {})})
    (folder / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "set.jsonl"


def start(address: str, *words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "uadtool", "score", "-q", *map(str, words), "--ray", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def images(printed: str) -> List[Dict[str, Any]]:
    return [{**record, "milliseconds": 0, "time": ""} for record in map(json.loads, printed.splitlines())
            if record["type"] == "image"]


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_image(cluster, detector: Path, manifest: Path, tmp_path: Path) -> None:
    process = start(cluster.address, detector, manifest)
    printed = [process.stdout.readline() for _ in range(100)]
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    cluster.wait_for_nodes()
    assert process.poll() is None  # it waits for a reader
    rest, said = process.stdout.read(), process.stderr.read()
    assert process.wait() == 0
    assert [line for line in said.splitlines() if line.startswith("uadtool: ")] == [  # Ray also has something to say
        "uadtool: the cluster lost a node; the 3 remaining nodes repeat its unfinished work"]
    printed = "".join(printed) + rest
    run = json.loads(printed.splitlines()[0])
    validate(run, "score")
    assert run["cluster"] == {"nodes": 4, "cores": 3}
    here = run_here("score", detector, manifest)
    assert images(printed) == images(here)
    assert len(images(printed)) == 16 * COPIES
    (tmp_path / "here").write_text(here)
    (tmp_path / "there").write_text(printed)
    assert compare([str(tmp_path / "there")])["rows"] == compare([str(tmp_path / "here")])["rows"]


@pytest.mark.slow
def test_shards_on_a_cluster_are_merged(cluster, detector: Path, manifest: Path, tmp_path: Path) -> None:
    for index in (1, 2):
        process = start(cluster.address, detector, manifest, "--shard", f"{index}/2")
        (tmp_path / str(index)).write_text(process.communicate(timeout=300)[0])
    (tmp_path / "here").write_text(run_here("score", detector, manifest))
    assert compare([str(tmp_path / "1"), str(tmp_path / "2")])["rows"] == compare([str(tmp_path / "here")])["rows"]


@pytest.mark.slow
def test_pictures_are_drawn_here_and_paths_start_here(cluster, detector: Path, mvtec: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mvtec)
    printed, said = start(cluster.address, detector, "red", "--heatmaps", tmp_path / "maps").communicate(timeout=300)
    assert said == ""
    assert images(printed)[0]["path"] == "red/test/good/000.png"
    assert len(list((tmp_path / "maps").glob("*.png"))) == 8


@pytest.mark.slow
def test_unreadable_images_are_lines(cluster, detector: Path, mvtec: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    process = start(cluster.address, detector, mvtec / "red", tmp_path / "broken.png", tmp_path / "none.png")
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.startswith("uadtool: error: 2 of 10 images could not be scored; first: cannot read ")
    assert ["error" in record for record in images(printed)] == 8 * [False] + 2 * [True]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_whole_lines(cluster, detector: Path, manifest: Path, number: int,
                                                  code: int) -> None:
    process = start(cluster.address, detector, manifest)
    first = [process.stdout.readline() for _ in range(50)]
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == code
    for line in [*first, *rest.splitlines()]:
        json.loads(line)


@pytest.mark.slow
def test_nodes_need_the_same_versions(cluster, detector: Path, mvtec: Path) -> None:
    done = run_after("import uadtool.scoring.cluster\nuadtool.scoring.cluster.__version__ = '0.0.9'",
                     "score", "-q", detector, mvtec, "--ray", cluster.address)
    assert done.returncode == 1
    version = re.escape(open_model(str(detector), runtime="onnxruntime").version)
    assert re.fullmatch(rf"uadtool: error: a node has uadtool 0\.1\.0 and onnxruntime {version}, this machine 0\.0\.9 "
                        rf"and {version}; install the same versions on all machines \(on .*\)\n", done.stderr)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x"])
def test_no_cluster_answers(detector: Path, mvtec: Path, address: str) -> None:
    began = time.monotonic()
    process = start(address, detector, mvtec)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert said.startswith(f"uadtool: error: no Ray cluster answers at {address}: ")
    assert said.count("\n") == 1
    assert time.monotonic() - began < 30


def test_ray_is_not_installed(detector: Path, mvtec: Path) -> None:
    done = run_after("sys.modules['ray'] = None", "score", "-q", detector, mvtec, "--ray", "auto")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "uadtool: error: ray is not installed; pip install 'uadtool[ray]'\n"
