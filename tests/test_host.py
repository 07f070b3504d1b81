import platform
import subprocess
import sys

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
