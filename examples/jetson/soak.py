"""Score images for hours, as one process; a line of JSON per minute, and in the end a verdict.

usage: python soak.py MODEL IMAGES HOURS [--every SECONDS]      MODEL is an engine or an .onnx file

Prints a line for the machine, one for each minute, and the verdict, with exit code 1 if there are findings: the process
ended early, images failed, the same image got another score, memory grew, latency rose, or the machine throttled.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import IO, Any, Dict, Iterator, List

import numpy as np

from uadtool import host
from uadtool.benchmarking.sensors import Sensors, total

AHEAD = 128
"""Paths for each core that are written before their scores come; ``score`` reads 64 for each core at a time."""
MORE_MEMORY, SPARE_BYTES = 1.05, 10_000_000
SLOWER = 1.1
"""Factors from the first quarter of the minutes to the last that are findings; for memory, beyond the spare bytes."""
ANOTHER_SCORE = 0.001
"""Difference of two scores of an image, relative to the larger of the score and 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("hours", type=float)
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS")
    options = parser.parse_args()
    paths = sorted(str(path) for path in Path(options.images).rglob("*")
                   if path.suffix.lower() in (".png", ".jpg", ".jpeg") and "ground_truth" not in path.parts)
    if not paths:
        sys.exit(f"error: {options.images} has no PNG or JPEG files")
    say({"type": "start", **host.opening(), "model": options.model, "images": len(paths), "hours": options.hours})
    minutes: List[Dict[str, Any]] = []
    for minute in soak(options.model, paths, 3600 * options.hours, options.every):
        minutes.append(minute)
        say(minute)
    findings = judge(minutes)
    say({"type": "verdict", "ok": not findings, "findings": findings, "minutes": len(minutes),
         "images": sum(minute["images"] for minute in minutes)})
    sys.exit(bool(findings))


def say(record: Dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def soak(model: str, paths: List[str], seconds: float, every: float) -> Iterator[Dict[str, Any]]:
    """What was measured in each interval."""
    command = [sys.executable, "-m", "uadtool", "score", "-q", model, "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    scores: Dict[str, float] = {}
    sensors, minute, number, kind = Sensors(), Minute(), 0, ""
    ahead = threading.Semaphore(AHEAD * host.available_cores())
    threading.Thread(target=feed, args=(process.stdin, paths, time.monotonic() + seconds, ahead), daemon=True).start()
    try:
        for kind, record in ((record["type"], record) for record in map(json.loads, process.stdout)):
            if kind == "run":  # the model is open
                minute = Minute()
            elif kind == "image":
                ahead.release()
                minute.add(record, scores)
            if kind == "summary" or time.monotonic() >= minute.began + every:
                number += 1
                yield {"type": "minute", "minute": number, **minute.figures(process.pid, sensors)}
                minute = Minute()
        if process.wait() and kind != "summary":
            yield {"type": "minute", "minute": number + 1, **minute.figures(0, sensors),
                   "exit_code": process.returncode}
    finally:
        process.kill()


def feed(stdin: IO[str], paths: List[str], end: float, ahead: threading.Semaphore) -> None:
    """Write the paths again and again, a little ahead of the scores, until the time is over or nobody reads them."""
    with contextlib.suppress(BrokenPipeError), stdin:
        for path in itertools.cycle(paths):
            if not ahead.acquire(timeout=max(0, end - time.monotonic())):
                break
            stdin.write(f"{path}\n")
            stdin.flush()


class Minute:
    """The images of an interval."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.milliseconds: List[float] = []
        self.errors = self.changed = 0

    def add(self, record: Dict[str, Any], scores: Dict[str, float]) -> None:
        """Add an image; ``scores`` are the first ones of all images."""
        if "error" in record:
            self.errors += 1
            return
        self.milliseconds.append(record["milliseconds"])
        first = scores.setdefault(record["path"], record["score"])
        self.changed += abs(record["score"] - first) > ANOTHER_SCORE * max(1, abs(first))

    def figures(self, pid: int, sensors: Sensors) -> Dict[str, Any]:
        """The images, the memory of the process, and the machine."""
        found: Dict[str, Any] = {"seconds": round(time.monotonic() - self.began, 1), "errors": self.errors,
                                 "changed_scores": self.changed, "images": len(self.milliseconds) + self.errors}
        if self.milliseconds:
            values = np.percentile(self.milliseconds, [50, 90, 99, 100])
            found["milliseconds"] = {name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99", "max"),
                                                                                        values)}
        for name, path, key in (("resident_bytes", f"/proc/{pid}/status", "VmRSS:"),
                                ("available_bytes", "/proc/meminfo", "MemAvailable:")):
            with contextlib.suppress(OSError, IndexError):  # the process has ended, or another system
                found[name] = 1024 * int(Path(path).read_text().partition(key)[2].split()[0])
        watts = total(sensors.rails())
        return {**found, **sensors.state(), **({"watts": round(watts, 2)} if watts else {})}


def judge(minutes: List[Dict[str, Any]]) -> List[str]:
    """What went wrong, a sentence each. The first minute only warms up."""
    findings = [f"the process ended early, with exit code {minute['exit_code']}" for minute in minutes
                if "exit_code" in minute]
    for name, sentence in (("errors", "{} images could not be scored"),
                           ("changed_scores", "{} times an image got another score than the first time")):
        if count := sum(minute[name] for minute in minutes):
            findings.append(sentence.format(count))
    warm = [minute for minute in minutes[1:] if "milliseconds" in minute]
    if len(warm) < 4:
        return [*findings, "too short: there must be at least 5 minutes"]
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    for name, factor, spare, sentence in (
            ("p50", SLOWER, 0.0, "the median latency rose from {0:.2f} to {1:.2f} ms"),
            ("resident_bytes", MORE_MEMORY, SPARE_BYTES, "memory grew from {0:.0f} to {1:.0f} bytes")):
        before, after = ([one for one in ({**minute, **minute["milliseconds"]}.get(name) for minute in part)
                          if one is not None] for part in (first, last))
        if before and after and median(after) > factor * median(before) + spare:
            findings.append(sentence.format(median(before), median(after)))
    throttled = warm[-1].get("throttling", 0) - minutes[0].get("throttling", 0)
    return [*findings, f"the machine throttled {throttled} times"] if throttled else findings


if __name__ == "__main__":
    main()
