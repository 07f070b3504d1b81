"""The file between calibrate and quantize (schemas/ranges.json): the range of the activations at every point."""

from dataclasses import dataclass
from typing import Any

from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.schemas.json_files import read_json, write_json
from uadtool.schemas.validation import validate

SCHEMA = "uadtool.ranges/1"

Ranges = dict[str, tuple[float, float]]
"""Name of a point -> (minimum, maximum) of its activations."""


def ranges_digest(ranges: Ranges) -> str:
    """``sha256:`` and the hex digest of ranges."""
    return list_digest(f"{name} {low} {high}" for name, (low, high) in ranges.items())


@dataclass(frozen=True)
class RangesFile:
    """Ranges, the digest of the model file they belong to, and how they were recorded."""

    model_digest: str
    method: str
    source: dict[str, Any]
    ranges: Ranges
    tool: str

    def write(self, path: str) -> None:
        """Write to ``path`` (``-``: stdout).

        Raises:
            UadtoolError: the file cannot be written, or a range is beyond the bounds of the schema.
        """
        record = {"schema": SCHEMA, "tool": self.tool, "model_digest": self.model_digest, "method": self.method,
                  "source": self.source, "ranges": {name: list(pair) for name, pair in self.ranges.items()}}
        try:
            _check(record)
        except ValueError as error:
            raise UadtoolError(f"quantize could not use these ranges: {error}") from error
        write_json(record, path)

    def check_model(self, digest: str, path: str) -> None:
        """Require that the ranges belong to the model file ``path``.

        Raises:
            UadtoolError: they were recorded with another model.
        """
        if self.model_digest != digest:
            raise UadtoolError(f"the ranges were recorded with model {self.model_digest}, but {path} is {digest}; "
                               "run calibrate with this model")

    @classmethod
    def read(cls, path: str) -> "RangesFile":
        """Read from ``path`` (``-``: stdin).

        Raises:
            UadtoolError: it is not a ranges file, or a range is beyond bounds.
        """
        record, source = read_json(path, SCHEMA), "stdin" if path == "-" else path
        try:
            _check(record)
        except ValueError as error:
            raise UadtoolError(f"{source} is damaged: {error}; run calibrate again") from error
        ranges = {name: (float(low), float(high)) for name, (low, high) in record["ranges"].items()}
        return cls(record["model_digest"], record["method"], record["source"], ranges, record["tool"])


def _check(record: dict[str, Any]) -> None:
    """Raise ValueError if the record does not obey its schema, or a range ends before it starts."""
    validate(record, "ranges")
    for name, (low, high) in record["ranges"].items():
        if low > high:
            raise ValueError(f"the range of {name!r:.80} is {low} to {high}")
