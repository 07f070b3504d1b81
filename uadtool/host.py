"""The machine and the process: cores, memory, signals, and the opening of every record."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Dict, List

from uadtool import __version__

CPUINFO_KEYS = ("model name", "Model", "Hardware", "cpu model")
"""Keys of /proc/cpuinfo that name the processor on x86, on most ARM boards, on older ARM boards, and on MIPS."""

BOARD = Path("/proc/device-tree/model")
"""The name of a board, if the firmware gives it: "NVIDIA Jetson Xavier NX Developer Kit"."""


def available_cores() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def adds_int8_exactly() -> bool:
    """Whether this processor adds int8 products in 32 bits.

    x86 processors without VNNI or AMX add pairs of u8 x s8 products in 16 bits, which overflow.
    """
    import platform  # lazy, as in the functions below: --help takes only the signals from here

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    info = _cpu_info()
    return not info or any(flag in info for flag in ("_vnni", "amx_int8"))


def keep_freed_memory() -> None:
    """Let this process reuse the memory it frees.

    glibc returns large blocks to the system at once, so every new tensor causes page faults, which take up to three
    quarters of the time of torch on a CPU. Does nothing with other C libraries.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    import ctypes  # lazy: most commands do not need it

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def opening() -> Dict[str, Any]:
    """The ``tool``, ``started`` (now, UTC) and ``host`` of a record.

    The host has system, machine, cpu, board (such as a Jetson), available cores and python.
    """
    import platform
    from datetime import datetime, timezone

    host = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": available_cores(),
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError):
        host["board"] = BOARD.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"tool": f"uadtool {__version__}", "started": started, "host": host}


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes."""
    try:
        # On Linux, getrusage also counts the memory of the parent before exec.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # gVisor's status lacks VmHWM
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu() -> str:
    import platform

    lines = (line.partition(":") for line in _cpu_info().splitlines())
    names = {key.strip(): value.strip() for key, _, value in lines}
    name = next(filter(None, map(names.get, CPUINFO_KEYS)), None)
    return name or platform.processor() or platform.machine() or "unknown"


def _cpu_info() -> str:
    with contextlib.suppress(OSError):  # Windows, macOS
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""


def ending_signals() -> List[signal.Signals]:
    """The signals that ask a process to end: SIGTERM, and SIGHUP when the terminal closes unless nohup ignores it."""
    has_hangup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGHUP] if has_hangup else [signal.SIGTERM]
