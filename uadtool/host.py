"""The machine and the process: cores, memory, signals, and the opening of every record."""

import calendar
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

from uadtool import __version__

CPUINFO_KEYS = ("model name", "Model", "Hardware", "cpu model")
"""Keys of /proc/cpuinfo that name the processor on x86, on most ARM boards, on older ARM boards, and on MIPS."""

BOARD = Path("/proc/device-tree/model")
"""The name of a board, if the firmware gives it: "NVIDIA Jetson Xavier NX Developer Kit"."""


CGROUPS = Path("/sys/fs/cgroup")
"""Where the control groups of a container are mounted; those of version 1 lie in a folder for each controller."""

OWN_CGROUPS = Path("/proc/self/cgroup")
"""The groups of this process, a line each: number, controllers (none: version 2), path."""


def available_cores() -> int:
    """The number of cores that this process may use, at least 1: those of its affinity mask, or less in a container."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    quotas = [*_limits("cpu", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]  # microseconds
    # Rounded down: once the threads have used up the quota, all of them stop for the rest of the period, usually 0.1 s,
    # which is longer than most images take. A single thread never stops, and what remains serves the image readers.
    return max(1, min([cores, *(quota // period for quota, period in quotas if quota > 0)]))  # -1: none


def usable_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or less in a container."""
    limits = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, in limits)])


def _limits(controller: str, *files: str) -> Iterator[List[int]]:
    """The numbers in these files, for each control group that has them: this process's own, and those around it."""
    paths = {"": "/", controller: "/"}
    with contextlib.suppress(OSError, ValueError):  # other systems, some sandboxes
        for line in OWN_CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), path))
    for mount, path in ((CGROUPS, paths[""]), (CGROUPS / controller, paths[controller])):
        group = mount / path.lstrip("/")  # in a container, perhaps its path on the host: then only ``mount`` exists
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the other version, or no limit ("max")
                yield [int(word) for file in files for word in (folder / file).read_text(encoding="utf-8").split()]
            if folder == mount:
                break


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

    host = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": available_cores(),
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError):
        host["board"] = BOARD.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return {"tool": f"uadtool {__version__}", "started": now(), "host": host}


def now() -> str:
    """The time in UTC, such as 2026-01-31T12:00:00Z."""
    return _utc(time.time())


def now_exactly() -> str:
    """The time in UTC with milliseconds, such as 2026-01-31T12:00:00.123Z."""
    seconds = time.time()
    return f"{_utc(seconds)[:-1]}.{int(1000 * (seconds % 1)):03}Z"


def parse_time(text: str) -> float:
    """The seconds since 1970 of a time as ``now_exactly`` gives it.

    Raises:
        ValueError: the text is no such time.
    """
    return calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0{text[19:-1]}")


def build_time() -> str:
    """The time for a file that should be the same whenever it is made: ``SOURCE_DATE_EPOCH`` if set, otherwise now.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    try:
        return _utc(int(os.environ["SOURCE_DATE_EPOCH"]))
    except (KeyError, ValueError, OverflowError, OSError):
        return now()


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
