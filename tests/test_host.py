import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from uadtool import host

PROGRAM = """
import resource, numpy as np
from uadtool.host import keep_freed_memory
if %s:
    keep_freed_memory()
np.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    without, kept = (int(subprocess.run([sys.executable, "-c", PROGRAM % keep], capture_output=True, check=True).stdout)
                     for keep in (False, True))
    assert kept < without / 10


@pytest.mark.parametrize(("flags", "exactly"), [("avx2", False), ("avx2 avx_vnni", True), ("", True)])
def test_int8_products_are_added_exactly_with_vnni(monkeypatch, flags, exactly):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(host, "_cpu_info", lambda: flags)
    assert host.adds_int8_exactly() is exactly


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8 cores and these control groups: the lines of /proc/self/cgroup, and the content of files."""
    def machine(lines, files):
        (tmp_path / "own").write_text("\n".join(lines))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return machine


NO_LIMIT_1 = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
              "memory/memory.limit_in_bytes": str(2**63 - 4096)}


@pytest.mark.parametrize(("lines", "files", "cores"), [
    ([], {}, 8),
    (["0::/"], {"cpu.max": "max 100000"}, 8),
    (["0::/"], {"cpu.max": "200000 100000"}, 2),
    (["0::/"], {"cpu.max": "199999 100000"}, 1),
    (["0::/"], {"cpu.max": "1000 100000"}, 1),
    (["0::/"], {"cpu.max": "1600000 100000"}, 8),
    (["0::/a/b"], {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 50000"}, 3),
    (["0::/a/b"], {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000", "a/c/cpu.max": "100000 100000"}, 2),
    (["0::/../../host"], {"cpu.max": "300000 100000"}, 3),
    (["3:cpu,cpuacct:/"], NO_LIMIT_1, 8),
    (["3:cpu,cpuacct:/docker/1a2b"], {**NO_LIMIT_1, "cpu/cpu.cfs_quota_us": "250000"}, 2),  # seen from inside
    (["3:cpu:/a:b", "0::/"], {**NO_LIMIT_1, "cpu/a:b/cpu.cfs_quota_us": "99999",
                              "cpu/a:b/cpu.cfs_period_us": "50000"}, 1),
    (["3:cpuset:/a", "2:cpu:/"], {**NO_LIMIT_1, "cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, 8),
])
def test_cores_are_those_of_the_quota(machine, lines, files, cores):
    machine(lines, files)
    assert host.available_cores() == cores


@pytest.mark.parametrize(("lines", "files", "limit"), [
    (["0::/"], {"memory.max": "max"}, None),
    (["0::/a/b"], {"a/b/memory.max": "20000", "a/memory.max": "10000", "memory.max": "max"}, 10000),
    (["3:memory:/", "2:cpu:/"], NO_LIMIT_1, None),
    (["3:memory:/a"], {**NO_LIMIT_1, "memory/a/memory.limit_in_bytes": "4096"}, 4096),
])
def test_memory_is_that_of_the_limit(machine, lines, files, limit):
    machine(lines, files)
    assert host.usable_memory() == (limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def test_a_real_quota():
    mount = next((path for path in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
                  if (path / "cgroup.procs").exists()), Path("/missing"))
    group = mount / f"uadtool-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups cannot be made")
    program = f"""
from pathlib import Path
from uadtool.host import available_cores
group = Path({str(group)!r})
try:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_quota_us").write_text("100000")
        (group / "cpu.cfs_period_us").write_text("100000")
    else:
        (group / "cpu.max").write_text("100000 100000")
    (group / "cgroup.procs").write_text("0")
except OSError:
    raise SystemExit(77)
print(available_cores())
"""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    finally:
        group.rmdir()
    if done.returncode == 77:
        pytest.skip("quotas cannot be set")
    assert (done.stdout, done.stderr) == ("1\n", "")
