"""How fast and how big exported detectors are on this machine."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from uadtool import host
from uadtool.benchmarking.sensors import PowerMeter, Sensors, total
from uadtool.errors import UadtoolError
from uadtool.progress import Progress
from uadtool.runtimes.contract import LayerTime, Runtime, describe
from uadtool.runtimes.opening import open_model

SCHEMA = "uadtool.bench/1"

FIRST_SCORE = """
import os, sys
sys.path[:] = sys.argv[4:]
answer = os.dup(1)
os.dup2(2, 1)
import numpy
from uadtool.host import peak_memory
from uadtool.runtimes.opening import open_model
model = open_model(sys.argv[1], int(sys.argv[2]), sys.argv[3])
model.run(numpy.zeros((1, *model.metadata.image_size, 3), numpy.uint8))
os.write(answer, b"%d\\n" % peak_memory())
"""
"""The program of a cold start, which finds packages where this process does; it answers with its peak memory once it
has a score. What libraries print is no answer.
"""

IDLE = 1.0
"""Seconds for which the power of the idle machine is taken."""

LAYER_RUNS = 20


class _Load:
    """What a detector was seen to do at one batch size, in all rounds; joules are by rail."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.rates: List[float] = []
        self.joules: Dict[str, float] = {}

    def add(self, images: int, times: Sequence[float], seconds: float, joules: Dict[str, float]) -> None:
        self.images += images
        self.seconds += seconds
        self.rates.append(images / sum(times))
        for rail, value in joules.items():
            self.joules[rail] = self.joules.get(rail, 0.0) + value


class _Measured:
    """What a detector was seen to do. Times are in seconds, rates in images per second, one for each round."""

    def __init__(self, runtime: Runtime, batch_sizes: Sequence[int]) -> None:
        self.runtime = runtime
        self.cold_starts: List[float] = []
        self.peaks: List[int] = []
        self.latencies: List[float] = []
        self.medians: List[float] = []  # of the latencies of each round
        self.loads = {size: _Load() for size in batch_sizes}
        self.layers: List[LayerTime] = []
        self.roofline: Dict[str, Any] = {}
        self.sweep: Dict[int, List[float]] = {}  # latencies by number of threads


def bench(paths: Sequence[str], repetitions: int = 5, duration: float = 3.0, warmup: int = 3,
          batch_sizes: Sequence[int] = (1, 8), threads: Optional[int] = None, runtime: str = "auto",
          layers: bool = False, sweep: bool = False, against_peak: bool = False,
          sensors: Optional[Sensors] = None) -> Dict[str, Any]:
    """Measure the detectors in the files ``paths`` and return the record (schemas/bench.json).

    In each of ``repetitions`` rounds every detector in turn is started in a fresh process, and then runs for
    ``duration / repetitions`` seconds at each batch size, after ``warmup`` runs that do not count. Latency is that of
    batch size 1, which is measured whether or not it is among ``batch_sizes``. Further models are set against the first
    round by round. In the end, at batch size 1, each layer is timed with ``layers``, and with ``sweep`` each model on
    1, 2, 4, ... threads; with ``against_peak`` its rate is set against the peak of the runtime here. ``sensors`` are
    this machine's if None.

    Raises:
        UadtoolError: a file cannot be opened, or not in a fresh process, or its runtime has no known peak.
    """
    sizes = sorted({1, *batch_sizes})
    models = [_Measured(open_model(path, threads, runtime), batch_sizes) for path in paths]
    record = {
        "schema": SCHEMA,
        **host.opening(),
        "settings": {
            "warmup": warmup,
            "repetitions": repetitions,
            "duration": duration,
            "threads": models[0].runtime.threads,
            "batch_sizes": list(batch_sizes),
        },
    }
    if against_peak:
        from uadtool.benchmarking.roofline import require_peak, roofline

        for model in models:
            require_peak(model.runtime)
    if sweep and any(model.runtime.name == "tensorrt" for model in models):
        raise UadtoolError("--sweep-threads is for processors; an engine runs on the GPU whatever the threads")
    sensors = sensors or Sensors()
    before = sensors.state()
    idle = _idle_power(sensors)
    random = np.random.default_rng(0)
    with Progress("bench", repetitions * len(models) * (1 + len(sizes))) as progress:
        for _ in range(repetitions):
            for model in models:
                seconds, peak = _cold_start(model.runtime)
                model.cold_starts.append(seconds)
                model.peaks.append(peak)
                progress.update()
                for size in sizes:
                    images = random.integers(0, 256, (size, *model.runtime.metadata.image_size, 3), np.uint8)
                    for _ in range(warmup):
                        model.runtime.run(images)
                    with PowerMeter(sensors) as meter:
                        times = _run_times(model.runtime, images, duration / repetitions)
                    if size == 1:
                        model.latencies += times
                        model.medians.append(float(np.median(times)))
                    if size in model.loads:
                        # What is no Jetson counts the energy of its processors alone, and an engine runs on a GPU.
                        known = sensors.has_rails or model.runtime.name != "tensorrt"
                        model.loads[size].add(size * len(times), times, meter.seconds, meter.joules if known else {})
                    progress.update()
    for model in models:
        one = random.integers(0, 256, (1, *model.runtime.metadata.image_size, 3), np.uint8)
        for count in _thread_counts(model.runtime.threads) if sweep else []:
            alone = open_model(model.runtime.path, count, model.runtime.name)
            for _ in range(1 + warmup):
                alone.run(one)
            model.sweep[count] = _run_times(alone, one, duration / repetitions)
        if against_peak:
            model.roofline = roofline(model.runtime, float(np.median(model.latencies)))
        if layers:
            model.layers = model.runtime.layer_times(one, LAYER_RUNS)
    machine = {"before": before, "after": sensors.state(), **({"idle_watts": idle} if idle else {})}
    return {**record, "machine": machine, "models": [_figures(model, models[0]) for model in models]}


def _thread_counts(most: int) -> List[int]:
    """1, 2, 4, ... and the most."""
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})


def _idle_power(sensors: Sensors) -> Dict[str, float]:
    """Watts by rail, and their total; none without sensors, which then costs no time."""
    if not (sensors.rails() or sensors.energy()):
        return {}
    with PowerMeter(sensors) as meter:
        time.sleep(IDLE)
    return _watts(meter.joules, meter.seconds)


def _cold_start(runtime: Runtime) -> Tuple[float, int]:
    """Seconds from starting Python to the first score, and the peak memory in bytes of that process."""
    command = [sys.executable, "-c", FIRST_SCORE, runtime.path, str(runtime.threads), runtime.name, *sys.path]
    with tempfile.TemporaryFile() as said:  # a pipe could fill up
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
            try:
                assert process.stdout
                answer = process.stdout.readline()
                seconds = time.perf_counter() - began
                process.wait()
            finally:
                process.kill()  # if a signal ends this process
        said.seek(0)
        complaint = said.read().decode(errors="replace").strip().split("\n")
    if not answer:
        raise UadtoolError(f"{runtime.path} cannot be run in a fresh process: {complaint[-1]}")
    return seconds, int(answer)


def _run_times(runtime: Runtime, images: np.ndarray, seconds: float) -> List[float]:
    """How long each run took, one after the other for ``seconds``; at least one."""
    times: List[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        runtime.run(images)
        times.append(time.perf_counter() - began)
    return times


def _figures(model: _Measured, first: _Measured) -> Dict[str, Any]:
    milliseconds = 1000 * np.array(model.latencies)
    p50, p90, p95, p99 = np.percentile(milliseconds, [50, 90, 95, 99])
    latency = {"p50": p50, "p90": p90, "p95": p95, "p99": p99, "mean": milliseconds.mean(), "std": milliseconds.std(),
               "min": milliseconds.min()}
    found = {
        **describe(model.runtime),
        "file_bytes": Path(model.runtime.path).stat().st_size,
        "parameters": model.runtime.metadata.parameters,
        "macs": model.runtime.metadata.macs,
        "cold_start_ms": _spread([1000 * seconds for seconds in model.cold_starts]),
        "peak_rss_bytes": int(np.median(model.peaks)),
        "latency_ms": {**{name: round(float(value), 4) for name, value in latency.items()}, "n": len(milliseconds)},
        "throughput": [{"batch_size": size, **_load_figures(load)} for size, load in model.loads.items()],
    }
    if model is not first:
        found["ratios"] = {
            "latency": _spread([one / other for one, other in zip(model.medians, first.medians)]),
            "throughput": [{"batch_size": size, "ratio": _spread([one / other for one, other in zip(
                load.rates, first.loads[size].rates)])} for size, load in model.loads.items()],
        }
    if model.sweep:
        found["threads"] = [{"threads": count, "latency_ms": round(1000 * float(np.median(times)), 4),
                             "images_per_second": round(len(times) / sum(times), 3)}
                            for count, times in model.sweep.items()]
    if model.roofline:
        found["roofline"] = model.roofline
    if model.runtime.gpu_bytes is not None:
        found["gpu_bytes"] = model.runtime.gpu_bytes
    if model.layers:
        found["layers"] = [{**layer._asdict(), "milliseconds": round(layer.milliseconds, 4)} for layer in model.layers]
    return found


def _load_figures(load: _Load) -> Dict[str, Any]:
    found: Dict[str, Any] = {"images_per_second": _spread(load.rates)}
    joules = total(load.joules)
    if joules is not None:
        found["watts"] = _watts(load.joules, load.seconds)
        found["millijoules_per_image"] = round(1000 * joules / load.images, 4)
    return found


def _watts(joules: Dict[str, float], seconds: float) -> Dict[str, float]:
    by_rail = {rail: value / seconds for rail, value in joules.items()}
    return {rail: round(value, 4) for rail, value in {**by_rail, "total": total(by_rail) or 0.0}.items()}


def _spread(values: Sequence[float]) -> Dict[str, Any]:
    median = float(np.median(values))
    return {"median": round(median, 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}
