import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import METADATA, validate

from uadtool.benchmarking import bench as benchmark
from uadtool.benchmarking.bench import Settings, _thread_counts, bench
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.host import peak_memory

QUICK = ["--repetitions", "2", "--duration", "0.02", "--warmup", "1"]


def test_two_models(uadtool, detector, make_detector, tmp_path):
    other = make_detector(tmp_path / "other.onnx", METADATA.replace(precision="int8"), divisor=2.0)
    done = uadtool("bench", "-q", detector, other, *QUICK, "--batch-sizes", "4,2", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    validate(record, "bench")
    assert record["settings"] == {"warmup": 1, "repetitions": 2, "duration": 0.02, "threads": 1, "batch_sizes": [2, 4]}
    assert [entry["model"]["digest"] for entry in record["models"]] == [file_digest(detector), file_digest(other)]
    assert [entry["model"]["precision"] for entry in record["models"]] == ["fp32", "int8"]
    for entry, path in zip(record["models"], (detector, other)):
        assert entry["file_bytes"] == path.stat().st_size
        assert (entry["parameters"], entry["macs"]) == (METADATA.parameters, METADATA.macs)
        latency = entry["latency_ms"]
        figures = [latency[name] for name in ("min", "p50", "p90", "p95", "p99")]
        assert figures == sorted(figures)
        assert latency["n"] >= 2
        assert [batch["batch_size"] for batch in entry["throughput"]] == [2, 4]
        for spread in (entry["cold_start_ms"], *(batch["images_per_second"] for batch in entry["throughput"])):
            assert spread["min"] <= spread["median"] <= spread["max"]
            assert spread["n"] == 2
        assert entry["peak_rss_bytes"] > 10e6
    first, second = record["models"]
    assert "ratios" not in first
    assert second["ratios"]["latency"]["n"] == 2
    assert [one["batch_size"] for one in second["ratios"]["throughput"]] == [2, 4]
    for ratio, *rates in zip(second["ratios"]["throughput"], first["throughput"], second["throughput"]):
        low, high = (rates[1]["images_per_second"][a] / rates[0]["images_per_second"][b]
                     for a, b in (("min", "max"), ("max", "min")))
        assert low - 0.01 <= ratio["ratio"]["min"] <= ratio["ratio"]["max"] <= high + 0.01


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_threads_of_the_sweep(most, counts):
    assert _thread_counts(most) == counts


def test_a_sweep_over_threads(detector):
    record = bench([str(detector)], Settings(1, 0.02, threads=2, sweep=True))
    validate(record, "bench")
    assert [one["threads"] for one in record["models"][0]["threads"]] == [1, 2]


@pytest.mark.parametrize("sizes", ["0", "2,-1", "1,x", ""])
def test_invalid_batch_sizes(uadtool, detector, sizes):
    done = uadtool("bench", detector, "--batch-sizes", sizes)
    assert done.returncode == 2
    assert "give positive integers, separated by commas" in done.stderr


def test_every_model_is_opened_before_anything_is_timed(uadtool, detector, tmp_path):
    done = uadtool("bench", "-q", detector, tmp_path / "missing.onnx")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"uadtool: error: {tmp_path}/missing.onnx: no such model file\n"


def test_a_fresh_process_that_fails_is_reported(detector, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UadtoolError, match="cannot be run in a fresh process"):
        bench([str(detector)], Settings(1, 0.01))


def test_a_fresh_process_finds_the_same_packages_and_may_log_much(detector, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # megabytes on stderr
    record = bench([str(detector)], Settings(1, 0.01))
    assert record["models"][0]["peak_rss_bytes"] > 10e6


def test_peak_memory_where_the_kernel_does_not_report_it(monkeypatch):
    """The kernel of gVisor does not report VmHWM."""
    expected = peak_memory()
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding: "VmSize: 9 kB\nVmRSS: 3 kB\n")
    assert peak_memory() == pytest.approx(expected, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's memory is counted in only on Linux")
def test_peak_memory_is_not_that_of_the_parent():
    program = "from uadtool.host import peak_memory; print(peak_memory())"
    held = np.ones(30_000_000)
    peak = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert 1e6 < peak < held.nbytes


def runs(process: str) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_process_is_left_when_a_signal_ends_it(detector):
    with subprocess.Popen([sys.executable, "-m", "uadtool", "bench", str(detector)], stdout=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("this system does not list children")
        while not (found := children.read_text().split()) and process.poll() is None:
            time.sleep(0.001)
        process.terminate()
        printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (143, b"")
    # If the signal arrives while a child starts, the child ends by itself.
    end = time.monotonic() + 60
    while (left := [child for child in found if runs(child)]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def test_a_model_that_is_replaced_meanwhile_has_no_figures(uadtool, detector, make_detector, tmp_path, monkeypatch):
    path = make_detector(tmp_path / "model.onnx")
    monkeypatch.setattr(benchmark, "_cold_start", lambda runtime: (make_detector(path), (1.0, 1))[1])
    with pytest.raises(UadtoolError, match=r"model.onnx was replaced while this ran; run it again"):
        bench([str(path)], Settings(1, 0.01))
