import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.ranges import RangesFile

FINITE = st.floats(-1e30, 1e30)
RANGES = st.dictionaries(st.text(min_size=1), st.tuples(FINITE, FINITE).map(lambda pair: tuple(sorted(pair))))


@given(ranges=RANGES)
def test_ranges_survive_being_written_and_read(tmp_path_factory, ranges):
    path = str(tmp_path_factory.getbasetemp() / "ranges.json")
    file = RangesFile("sha256:0", "minmax", {"kind": "good-training-images"}, ranges, "uadtool 0.1.0")
    file.write(path)
    assert RangesFile.read(path) == file


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": "uadtool.bench/1"}, "is not a uadtool.ranges/1 file"),
    ({"ranges": {"a": [0, float("nan")]}}, "has the range 0.0 to nan for a; run calibrate again"),
    ({"ranges": {"a": [0, float("inf")]}}, "has the range 0.0 to inf for a"),
    ({"ranges": {"a": [2, 1]}}, "has the range 2.0 to 1.0 for a"),
    ({"ranges": {"a": [0, 1e300]}}, "has the range 0.0 to 1e.300 for a"),
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
