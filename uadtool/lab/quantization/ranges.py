"""The file between calibrate and quantize: the range of the activations at every point, and where they come from."""

from dataclasses import dataclass
from typing import Any

from uadtool.errors import UadtoolError
from uadtool.files import list_digest, read_json, write_json

SCHEMA = "uadtool.ranges/1"

MOST = 1e38
"""A bound of ranges: their widths are within float32."""

Ranges = dict[str, tuple[float, float]]
"""Name of a point -> (minimum, maximum) of the activations there."""


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
        """Write to ``path`` (``-``: stdout)."""
        write_json({"schema": SCHEMA, "tool": self.tool, "model_digest": self.model_digest, "method": self.method,
                    "source": self.source, "ranges": {name: list(pair) for name, pair in self.ranges.items()}}, path)

    def check_model(self, digest: str, path: str) -> None:
        """Require that the ranges are of the model file ``path``.

        Raises:
            UadtoolError: they were recorded with another one.
        """
        if self.model_digest != digest:
            raise UadtoolError(f"the ranges were recorded with model {self.model_digest}, but {path} is {digest}; "
                               "run calibrate with this model")

    @classmethod
    def read(cls, path: str) -> "RangesFile":
        """Read from ``path`` (``-``: stdin).

        Raises:
            UadtoolError: it is no ranges file, or a range is not a finite (minimum, maximum).
        """
        record, source = read_json(path, SCHEMA), "stdin" if path == "-" else path
        try:
            ranges = {str(name): (float(low), float(high)) for name, (low, high) in record["ranges"].items()}
            read = cls(str(record["model_digest"]), str(record["method"]), dict(record["source"]), ranges,
                       str(record["tool"]))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UadtoolError(f"{source} is damaged ({error!r}); run calibrate again") from error
        for name, (low, high) in ranges.items():
            if not -MOST <= low <= high <= MOST:
                raise UadtoolError(f"{source} has the range {low} to {high} for {name}; run calibrate again")
        return read
