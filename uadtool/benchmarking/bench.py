"""Speed, size, memory and energy of exported detectors on this machine."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from uadtool import host
from uadtool.benchmarking.roofline import require_peak, roofline
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
"""The program of a cold start. It finds packages where this process does, and writes its peak memory once it has a
score; the output of libraries goes to stderr.
"""

IDLE = 1.0
"""Seconds for which the power of the idle machine is measured."""

LAYER_RUNS = 20


@dataclass(frozen=True)
class Settings:
    """How to measure detectors.

    In each of ``repetitions`` rounds, each detector in turn starts in a fresh process, and then runs for
    ``duration / repetitions`` seconds at each batch size, after ``warmup`` untimed runs. Latency is measured at batch
    size 1, whether or not ``batch_sizes`` contains it. After the rounds, at batch size 1: ``layers`` times each layer,
    ``sweep`` times each detector on 1, 2, 4, ... threads, and ``roofline`` compares its rate with the peak rate of the
    runtime on this machine.
    """

    repetitions: int = 5
    duration: float = 3.0
    warmup: int = 3
    batch_sizes: Sequence[int] = (1, 8)
    threads: Optional[int] = None
    runtime: str = "auto"
    layers: bool = False
    sweep: bool = False
    roofline: bool = False


class _Load:
    """Measurements of a detector at one batch size, over all rounds."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.rates: List[float] = []  # by round
        self.joules: Dict[str, float] = {}  # by rail

    def add(self, images: int, times: Sequence[float], seconds: float, joules: Dict[str, float]) -> None:
        self.images += images
        self.seconds += seconds
        self.rates.append(images / sum(times))
        for rail, value in joules.items():
            self.joules[rail] = self.joules.get(rail, 0.0) + value


class _Measured:
    """Measurements of a detector. Times are in seconds, rates in images per second."""

    def __init__(self, runtime: Runtime, batch_sizes: Sequence[int]) -> None:
        self.runtime = runtime
        self.cold_starts: List[Tuple[float, int]] = []  # time and peak memory in bytes
        self.latencies: List[List[float]] = []  # by round
        self.loads = {size: _Load() for size in batch_sizes}
        self.layers: List[LayerTime] = []
        self.roofline: Dict[str, Any] = {}
        self.sweep: Dict[int, List[float]] = {}  # latencies by number of threads


def bench(paths: Sequence[str], settings: Settings = Settings(), sensors: Optional[Sensors] = None) -> Dict[str, Any]:
    """Measure the detectors in the files ``paths`` and return the record (schemas/bench.json).

    Ratios to the first detector are taken within each round. ``sensors`` are those of this machine if None.

    Raises:
        UadtoolError: a file cannot be opened here or in a fresh process, or the settings do not suit its runtime.
    """
    models = [_Measured(open_model(path, settings.threads, settings.runtime), settings.batch_sizes) for path in paths]
    opening = host.opening()
    for model in models:
        if settings.roofline:
            require_peak(model.runtime)
        if settings.sweep and model.runtime.name == "tensorrt":
            raise UadtoolError("--sweep-threads measures processors, but an engine runs on the GPU; leave it out")
    sensors = sensors or Sensors()
    before, idle = sensors.state(), _idle_power(sensors)
    sizes = sorted({1, *settings.batch_sizes})
    with Progress("bench", settings.repetitions * len(models) * (1 + len(sizes))) as progress:
        for _ in range(settings.repetitions):
            for model in models:
                model.cold_starts.append(_cold_start(model.runtime))
                progress.update()
                for size in sizes:
                    _run_batches(model, size, settings, sensors)
                    progress.update()
    for model in models:
        _measure_details(model, settings)
    return {
        "schema": SCHEMA,
        **opening,
        "settings": {"warmup": settings.warmup, "repetitions": settings.repetitions, "duration": settings.duration,
                     "threads": models[0].runtime.threads, "batch_sizes": list(settings.batch_sizes)},
        "machine": {"before": before, "after": sensors.state(), **({"idle_watts": idle} if idle else {})},
        "models": [_figures(model, models[0]) for model in models],
    }


def _run_batches(model: _Measured, size: int, settings: Settings, sensors: Sensors) -> None:
    """Run a detector at one batch size for its share of a round."""
    images = _random_images(model.runtime, size)
    for _ in range(settings.warmup):
        model.runtime.run(images)
    with PowerMeter(sensors) as meter:
        times = _run_times(model.runtime, images, settings.duration / settings.repetitions)
    if size == 1:
        model.latencies.append(times)
    if size in model.loads:
        # Only a Jetson measures its GPU, on which an engine runs. Other machines measure their processors.
        known = sensors.has_rails or model.runtime.name != "tensorrt"
        model.loads[size].add(size * len(times), times, meter.seconds, meter.joules if known else {})


def _measure_details(model: _Measured, settings: Settings) -> None:
    """Measure threads, roofline and layers, as far as the settings ask for them."""
    image = _random_images(model.runtime, 1)
    for threads in _thread_counts(model.runtime.threads) if settings.sweep else []:
        with open_model(model.runtime.path, threads, model.runtime.name) as runtime:
            for _ in range(1 + settings.warmup):
                runtime.run(image)
            model.sweep[threads] = _run_times(runtime, image, settings.duration / settings.repetitions)
    if settings.roofline:
        model.roofline = roofline(model.runtime, float(np.median(np.concatenate(model.latencies))))
    if settings.layers:
        model.layers = model.runtime.layer_times(image, LAYER_RUNS)


def _random_images(runtime: Runtime, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *runtime.metadata.image_size, 3), np.uint8)


def _thread_counts(most: int) -> List[int]:
    """1, 2, 4, ... up to ``most``, and ``most``."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _idle_power(sensors: Sensors) -> Dict[str, float]:
    """Watts by rail, and their total; empty, without waiting, if the machine has no sensors."""
    if not (sensors.rails() or sensors.energy()):
        return {}
    with PowerMeter(sensors) as meter:
        time.sleep(IDLE)
    return _watts(meter.joules, meter.seconds)


def _cold_start(runtime: Runtime) -> Tuple[float, int]:
    """Seconds from starting Python to the first score, and the peak memory in bytes of that process."""
    command = [sys.executable, "-c", FIRST_SCORE, runtime.path, str(runtime.threads), runtime.name, *sys.path]
    with tempfile.TemporaryFile() as stderr:  # a pipe could fill up
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
            try:
                assert process.stdout
                answer = process.stdout.readline()
                seconds = time.perf_counter() - began
                process.wait()
            finally:
                process.kill()  # if a signal ends this process
        stderr.seek(0)
        messages = stderr.read().decode(errors="replace").strip().split("\n")
    if not answer:
        raise UadtoolError(f"{runtime.path} cannot be run in a fresh process: {messages[-1]}")
    return seconds, int(answer)


def _run_times(runtime: Runtime, images: np.ndarray, seconds: float) -> List[float]:
    """The time of each run, one after the other for ``seconds``; at least one run."""
    times: List[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        runtime.run(images)
        times.append(time.perf_counter() - began)
    return times


def _figures(model: _Measured, first: _Measured) -> Dict[str, Any]:
    milliseconds = 1000 * np.concatenate(model.latencies)
    latency = {**{f"p{percent}": np.percentile(milliseconds, percent) for percent in (50, 90, 95, 99)},
               "mean": milliseconds.mean(), "std": milliseconds.std(), "min": milliseconds.min()}
    figures = {
        **describe(model.runtime),
        "file_bytes": Path(model.runtime.path).stat().st_size,
        "parameters": model.runtime.metadata.parameters,
        "macs": model.runtime.metadata.macs,
        "cold_start_ms": _spread([1000 * seconds for seconds, _ in model.cold_starts]),
        "peak_rss_bytes": int(np.median([peak for _, peak in model.cold_starts])),
        "latency_ms": {**{name: round(float(value), 4) for name, value in latency.items()}, "n": len(milliseconds)},
        "throughput": [{"batch_size": size, **_load_figures(load)} for size, load in model.loads.items()],
    }
    if model is not first:
        medians, first_medians = ([float(np.median(times)) for times in latencies]
                                  for latencies in (model.latencies, first.latencies))
        figures["ratios"] = {
            "latency": _spread_of_ratios(medians, first_medians),
            "throughput": [{"batch_size": size, "ratio": _spread_of_ratios(load.rates, first.loads[size].rates)}
                           for size, load in model.loads.items()],
        }
    details = {
        "threads": [{"threads": count, "latency_ms": round(1000 * float(np.median(times)), 4),
                     "images_per_second": round(len(times) / sum(times), 3)} for count, times in model.sweep.items()],
        "roofline": model.roofline,
        "gpu_bytes": model.runtime.gpu_bytes,
        "layers": [{**layer._asdict(), "milliseconds": round(layer.milliseconds, 4)} for layer in model.layers],
    }
    return {**figures, **{name: value for name, value in details.items() if value not in (None, [], {})}}


def _load_figures(load: _Load) -> Dict[str, Any]:
    figures: Dict[str, Any] = {"images_per_second": _spread(load.rates)}
    joules = total(load.joules)
    if joules is not None:
        figures["watts"] = _watts(load.joules, load.seconds)
        figures["millijoules_per_image"] = round(1000 * joules / load.images, 4)
    return figures


def _watts(joules: Dict[str, float], seconds: float) -> Dict[str, float]:
    by_rail = {rail: value / seconds for rail, value in joules.items()}
    return {rail: round(value, 4) for rail, value in {**by_rail, "total": total(by_rail) or 0.0}.items()}


def _spread(values: Sequence[float]) -> Dict[str, Any]:
    median = float(np.median(values))
    return {"median": round(median, 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}


def _spread_of_ratios(values: Sequence[float], references: Sequence[float]) -> Dict[str, Any]:
    return _spread([value / reference for value, reference in zip(values, references)])
