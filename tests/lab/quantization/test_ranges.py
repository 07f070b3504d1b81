import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.ranges import RangesFile

FINITE = st.floats(-1e30, 1e30)
RANGES = st.dictionaries(st.text(), st.tuples(FINITE, FINITE).map(lambda pair: tuple(sorted(pair))), min_size=1)
SOURCE = {"kind": "good", "count": 1, "seed": 0, "parts": [{"kind": "good", "count": 1}]}
FILE = RangesFile(f"sha256:{64 * '0'}", "minmax", SOURCE, {"a": (0.0, 1.0)}, "uadtool 0.1.0")


@given(ranges=RANGES)
def test_ranges_survive_being_written_and_read(tmp_path_factory, ranges):
    path = str(tmp_path_factory.getbasetemp() / "ranges.json")
    file = replace(FILE, ranges=ranges)
    file.write(path)
    assert RangesFile.read(path) == file


@pytest.mark.parametrize("ranges", [{}, {"a": (0.0, 1e39)}, {"a": (float("-inf"), 0.0)}, {"a": (float("nan"), 0.0)}])
def test_ranges_that_quantize_could_not_read_are_not_written(tmp_path, ranges):
    with pytest.raises(UadtoolError, match=r"^quantize could not use these ranges: its ranges.* must be "):
        replace(FILE, ranges=ranges).write(str(tmp_path / "ranges.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": "uadtool.bench/1"}, "is not a uadtool.ranges/1 file"),
    ({"ranges": {"a": [0, float("nan")]}}, r"is damaged: its ranges\.a\[1\] must be .*; run calibrate again"),
    ({"ranges": {"a": [0, float("inf")]}}, r"is damaged: its ranges\.a\[1\] must be"),
    ({"ranges": {"a": [2, 1]}}, "is damaged: the range of 'a' is 2 to 1"),
    ({"ranges": {"a": [0, 1e300]}}, r"is damaged: its ranges\.a\[1\] must be"),
    ({"ranges": {"a": [1]}}, "is damaged"),
    ({"ranges": {"a": 1}}, "is damaged"),
    ({"ranges": {"a": ["low", "high"]}}, "is damaged"),
    ({"ranges": {"a": [None, 1]}}, "is damaged"),
    ({"ranges": [[0, 1]]}, "is damaged"),
    ({"source": 3}, "is damaged"),
])
def test_damaged_ranges_are_refused(calibrated, tmp_path, change, message):
    record = {**json.loads(calibrated.path.read_text()), **change}
    (tmp_path / "ranges.json").write_text(json.dumps(record))
    with pytest.raises(UadtoolError, match=message) as error:
        RangesFile.read(str(tmp_path / "ranges.json"))
    assert str(tmp_path / "ranges.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_ranges_that_lack_a_part_are_refused(calibrated, tmp_path):
    record = json.loads(calibrated.path.read_text())
    for key in record:
        (tmp_path / "ranges.json").write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(UadtoolError, match=r"is damaged|is not a uadtool.ranges/1 file"):
            RangesFile.read(str(tmp_path / "ranges.json"))
