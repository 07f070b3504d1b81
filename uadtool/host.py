"""What ran, when and where: the opening of every record of a run."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List

from uadtool import __version__

CPUINFO_KEYS = ("model name", "Model", "Hardware", "cpu model")
"""Keys of /proc/cpuinfo that name the processor on x86, on most ARM boards, on older ones, and on MIPS."""

BOARD = Path("/proc/device-tree/model")
"""What a board calls itself, where the firmware describes it: "NVIDIA Jetson Xavier NX Developer Kit"."""


def available_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for its next request.

    glibc returns large blocks to the system at once, and every new tensor costs page faults: up to three quarters of
    the time that torch takes on a CPU. Does nothing with other C libraries.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def opening() -> Dict[str, Any]:
    """The ``tool``, ``started`` (now, UTC) and ``host`` of a record."""
    return {
        "tool": f"uadtool {__version__}",
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "host": describe_host(),
    }


def describe_host() -> Dict[str, Any]:
    """The ``host`` object of a record: system, machine, cpu, board (of a Jetson, ...), cores (available) and python."""
    found = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": available_cores(),
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError):
        found["board"] = BOARD.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return found


def peak_memory() -> int:
    """The most memory, in bytes, that this process has held (resident)."""
    try:
        # On Linux getrusage counts what the parent held before exec, too.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # gVisor's status lacks it
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for key in CPUINFO_KEYS:
        if names.get(key):
            return names[key]
    return platform.processor() or platform.machine() or "unknown"


def ending_signals() -> List[signal.Signals]:
    """Those that ask a process to end: SIGTERM, and SIGHUP when the terminal closes, unless nohup has it ignored."""
    hangs_up = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGHUP] if hangs_up else [signal.SIGTERM]
