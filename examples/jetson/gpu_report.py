"""Build, run and time exported detectors on this machine's GPU, and compare them with ONNX Runtime on real images.

usage: python gpu_report.py MODELS IMAGES OUT [options]     writes OUT/report.json and OUT/report.md
       python gpu_report.py --expect MODELS IMAGES          only what ONNX Runtime gives, MODELS/NAME.npz each

MODELS is a folder with *.onnx files for TensorRT, IMAGES one with PNG or JPEG files, of which 64 are used. Where ONNX
Runtime is not installed, run --expect elsewhere first. Each build and each run is a process of its own: one that fails
or hangs is a line in the report. Python 3.8, TensorRT 8.5 to 11 or TensorRT-RTX.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np

from uadtool import host
from uadtool.data.images import read_image
from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, file_digest
from uadtool.runtimes.contract import Output
from uadtool.runtimes.onnx_file import read_metadata
from uadtool.runtimes.opening import open_model
from uadtool.scoring.anomaly_maps import inside_roi
from uadtool.tensorrt.builder import BuildOptions, build_engine
from uadtool.tensorrt.driver import Device, current_gpu
from uadtool.tensorrt.engine_file import save_engine

TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.25, "mixed": 0.25}
"""Of a score, relative to the larger of it and 1."""
IMAGES = 64
BATCHES = (1, 4, 16, 64)
THREADS, PROCESSES = 4, 2
SLOWEST = 10
"""Layers whose times are reported."""
TYPES = {"int8": r"\b(Int8|INT8)", "fp16": "Half|FP16", "fp32": "Float|FP32", "int": r"Int32|INT32|Int64|INT64|UI"}
"""Names of types in the answers of TensorRT's inspector."""
COLUMNS = ("model", "TensorRT", "scores", "build, s", "engine, MB", "GPU, MB", "p50, ms", "p99, ms",
           "p50 without graph, ms", *(f"images/s, {size}" for size in BATCHES), f"images/s, {PROCESSES} processes",
           "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="MODELS IMAGES OUT")
    parser.add_argument("--expect", action="store_true", help="only write what ONNX Runtime gives")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after this time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a build or run, after which it is killed")
    parser.add_argument("--jobs", type=int, default=1, help="builds at the same time")
    parser.add_argument("--only", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--max-batch", type=int, default=max(BATCHES))
    parser.add_argument("--optimal-batch", type=int, default=1)
    parser.add_argument("--duration", type=float, default=1, help="seconds of each measurement")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if len(options.paths) != (2 if options.expect else 3):
        parser.error("takes MODELS IMAGES OUT, or --expect MODELS IMAGES")
    if options.step:
        answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries may print
        print(json.dumps(STEPS[options.step](*options.paths, options)), file=answer, flush=True)
    elif options.expect:
        for path in sorted(Path(options.paths[0]).glob("*.onnx")):
            expected(str(path), options.paths[1])
    else:
        sys.exit(Report(*options.paths, options).run())


# One model


def build(path: str, _: str, out: str, options: Any) -> Dict[str, Any]:
    metadata = read_metadata(path)
    began = time.perf_counter()
    settings = BuildOptions(max_batch=options.max_batch, optimal_batch=options.optimal_batch)
    engine = build_engine(path, metadata, settings)
    seconds = time.perf_counter() - began
    save_engine(engine, metadata, file_digest(path), engine_path(path, out))
    return {"seconds": round(seconds, 1), "bytes": len(engine.plan), **engine.build}


def run(path: str, folder: str, out: str, options: Any) -> Dict[str, Any]:
    metadata, wanted = read_metadata(path), expected(path, folder)
    images = read_images(folder, metadata.image_size)
    if len(wanted.score) != len(images):
        raise UadtoolError(f"{Path(path).with_suffix('.npz')} is of other images; delete it")
    with open_model(engine_path(path, out)) as model:
        execution = model.execution  # type: ignore[attr-defined]
        graphs = execution.graphs
        found: Dict[str, Any] = {"gpu_bytes": model.gpu_bytes}
        together = model.run(images)
        found["scores"] = compare(wanted, together, TOLERANCE[metadata.precision])
        found["scores"]["batches"] = max(float(np.abs(model.run(images[:count]).score - together.score[:count]).max())
                                         for count in (1, 3, 16))
        found["layers"] = by_type(execution.layers())
        found["latency"] = {}
        for size in [size for size in BATCHES if size <= execution.max_batch]:
            again = functools.partial(model.run, images[np.arange(size) % len(images)])
            found["latency"][size] = {}
            for name in ["graph"] * graphs + ["plain"]:
                execution.graphs = name == "graph"
                found["latency"][size][name] = percentiles(run_times(again, options.duration), size)
        execution.graphs = graphs
        found["threads"] = in_threads(lambda: model.run(images[:1]), options.duration)
        found["grown_bytes"] = growth(lambda: model.run(images[:4]))
        times = sorted(model.layer_times(images[:1], 20), key=lambda layer: -layer.milliseconds)[:SLOWEST]
        found["slowest"] = [[layer.name, round(layer.milliseconds, 4)] for layer in times]
    return found


def load(path: str, folder: str, out: str, options: Any) -> Dict[str, Any]:
    """The rate of single images, while other processes do the same."""
    images = read_images(folder, read_metadata(path).image_size)[:1]
    with open_model(engine_path(path, out)) as model:
        return percentiles(run_times(lambda: model.run(images), options.duration), 1)


STEPS: Dict[str, Callable[..., Dict[str, Any]]] = {"build": build, "run": run, "load": load}


def engine_path(path: str, out: str) -> str:
    return str(Path(out, f"{Path(path).stem}.engine"))


def read_images(folder: str, size: Any) -> np.ndarray:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UadtoolError(f"{folder} has no PNG or JPEG files")
    chosen = [paths[place * len(paths) // IMAGES] for place in range(IMAGES)] if len(paths) > IMAGES else paths
    return np.stack([read_image(str(path), size) for path in chosen])


def expected(path: str, folder: str) -> Output:
    """What ONNX Runtime gives, from the file beside the model if it exists."""
    beside = Path(path).with_suffix(".npz")
    if not beside.exists():
        with open_model(path, runtime="onnxruntime") as model:
            outputs = model.run(read_images(folder, model.metadata.image_size))
        with atomic_write(beside) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **outputs._asdict())
    with np.load(beside) as content:
        return Output(*(content[name] for name in Output._fields))


def compare(wanted: Output, found: Output, tolerance: float) -> Dict[str, Any]:
    """Differences of the scores of images that are of the same class for both."""
    same = found.nearest_class == wanted.nearest_class
    scores = np.abs(found.score - wanted.score) / np.maximum(1, np.abs(wanted.score))
    finite = bool(np.isfinite(found.score).all() and np.isfinite(found.anomaly_map).all())
    worst = float(scores[same].max()) if same.any() and finite else None
    return {"images": len(same), "same_class": float(same.mean()), "difference": worst, "tolerance": tolerance,
            "map_difference": float(np.median(np.abs(found.anomaly_map - wanted.anomaly_map)[inside_roi(
                wanted.anomaly_map)])) if finite else None,
            "within": worst is not None and worst <= tolerance and float(same.mean()) >= 0.9}


def by_type(layers: List[Dict[str, Any]]) -> Dict[str, int]:
    """The number of layers by the type of their first output."""
    kinds: Counter = Counter()
    for layer in layers:
        words = " ".join(str(value) for output in layer.get("Outputs", [])[:1] for name, value in output.items()
                         if "type" in name.lower() or "format" in name.lower())
        places = {kind: match.start() for kind, names in TYPES.items() for match in [re.search(names, words)] if match}
        kinds[min(places, key=places.__getitem__) if places else "other"] += 1
    return dict(kinds.most_common())


def run_times(function: Callable[[], Any], seconds: float) -> List[float]:
    for _ in range(5):
        function()
    times: List[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times


def percentiles(times: Sequence[float], images: int) -> Dict[str, Any]:
    values = np.percentile(1000 * np.array(times), [50, 90, 99])
    return {**{f"p{percent}": round(float(value), 4) for percent, value in zip((50, 90, 99), values)},
            "images_per_second": round(images * len(times) / sum(times), 1), "runs": len(times)}


def in_threads(function: Callable[[], Output], seconds: float) -> Dict[str, Any]:
    """Several threads that share the engine: all scores must be the same."""
    scores: List[np.ndarray] = []
    end = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < end:
            scores.append(function().score)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"threads": THREADS, "same": all(np.allclose(score, scores[0], rtol=0.02, atol=0.02) for score in scores),
            "images_per_second": round(len(scores) / seconds, 1)}


def growth(function: Callable[[], Any]) -> int:
    """Bytes of the GPU that 200 runs take and do not give back."""
    device = Device()
    with device.current():
        before = device.free_memory()
        for _ in range(200):
            function()
        grown = before - device.free_memory()
    device.close()
    return grown


# All models


class Report:
    """Runs the steps of all models, and writes what is known after each."""

    def __init__(self, models: str, images: str, out: str, options: Any) -> None:
        self.images, self.out, self.options = images, Path(out), options
        self.end = time.perf_counter() + options.seconds
        paths = sorted(Path(models).glob("*.onnx"), key=lambda path: (path.stat().st_size, path))  # a quick one first
        self.paths = [path for path in paths if re.search(options.only, path.stem)]
        gpu = current_gpu()
        self.record: Dict[str, Any] = {**host.opening(), "gpu": gpu._asdict() if gpu else None, "models": {}}

    def run(self) -> int:
        """All steps; the exit code is 1 if one failed, or scores are off."""
        if not self.paths:
            raise UadtoolError("no models; MODELS must have *.onnx files")
        self.out.mkdir(parents=True, exist_ok=True)
        waiting = list(self.paths)
        while waiting and time.perf_counter() < self.end:
            chunk, waiting = waiting[:self.options.jobs], waiting[self.options.jobs:]
            built = [(path, self.start("build", path)) for path in chunk]
            for path, process in built:
                self.note(path, "build", self.finish(process))
            for path in chunk:
                if "error" not in self.record["models"][path.stem]["build"]:
                    self.note(path, "run", self.finish(self.start("run", path)))
                    processes = [self.start("load", path) for _ in range(PROCESSES)]
                    self.note(path, "processes", [self.finish(process) for process in processes])
        for path in waiting:
            self.note(path, "build", {"error": "no time was left"})
        return int(not all(fine(found) for found in self.record["models"].values()))

    def start(self, step: str, path: Path) -> "subprocess.Popen[str]":
        values = {name: str(getattr(self.options, name)) for name in ("max_batch", "optimal_batch", "duration")}
        options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
        command = [sys.executable, __file__, str(path), self.images, str(self.out), "--step", step, *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, process: "subprocess.Popen[str]") -> Dict[str, Any]:
        try:
            answer, messages = process.communicate(timeout=self.options.limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"no answer within {self.options.limit:.0f} s"}
        if process.returncode or not answer:
            last = messages.strip().splitlines()[-1:] or ["no message"]
            return {"error": f"exit {process.returncode}: {last[0]}"}
        return dict(json.loads(answer))

    def note(self, path: Path, step: str, found: Any) -> None:
        """Add the result of a step, and write both files."""
        self.record["models"].setdefault(path.stem, {})[step] = found
        print(f"{path.stem}: {step} {'failed' if 'error' in str(found) else 'done'}", file=sys.stderr, flush=True)
        for name, text in (("report.json", json.dumps(self.record, indent=1)), ("report.md", table(self.record))):
            with atomic_write(self.out / name) as temporary:
                temporary.write_text(f"{text}\n", encoding="utf-8")


def fine(found: Dict[str, Any]) -> bool:
    return bool(found.get("run", {}).get("scores", {}).get("within")) and "error" not in str(found)


def table(record: Dict[str, Any]) -> str:
    lines = [f"{record['gpu'] and record['gpu']['name']}, {record['host'].get('board', record['host']['cpu'])}, "
             f"Python {record['host']['python']}, {record['tool']}, {record['started']}", ""]
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *(row(*item) for item in record["models"].items())):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def row(name: str, found: Dict[str, Any]) -> List[Any]:
    errors = [f"{step}: {one['error']}" for step, result in found.items()
              for one in (result if isinstance(result, list) else [result]) if "error" in one]
    built, measured = found["build"], found.get("run", {})
    if "scores" not in measured:
        return [name, built.get("version", ""), *errors, *[""] * (len(COLUMNS) - 2 - len(errors))]
    scores, latency = measured["scores"], measured["latency"]
    first = latency["1"]
    best = first.get("graph", first["plain"])
    difference = "not finite" if scores["difference"] is None else f"{scores['difference']:.4f}"
    rates = [latency[str(size)] for size in BATCHES if str(size) in latency]
    return [name, built["version"], f"{'ok' if scores['within'] else 'OFF'} {difference}", built["seconds"],
            f"{built['bytes'] / 1e6:.1f}", f"{measured['gpu_bytes'] / 1e6:.0f}", best["p50"], best["p99"],
            first["plain"]["p50"], *(one.get("graph", one["plain"])["images_per_second"] for one in rates),
            *[""] * (len(BATCHES) - len(rates)), errors[0] if errors else
            round(sum(one["images_per_second"] for one in found.get("processes", [])), 1),
            ", ".join(f"{count} {kind}" for kind, count in measured["layers"].items())]


if __name__ == "__main__":
    try:
        main()
    except UadtoolError as problem:
        sys.exit(f"error: {problem}")
