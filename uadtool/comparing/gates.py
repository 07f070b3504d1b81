"""Conditions on a comparison, for instance "the quantized model loses at most 0.01 image AUROC"."""

import operator
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

from uadtool.comparing.comparison import change
from uadtool.errors import UadtoolError

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_PATTERN = re.compile(
    r"\s*(?P<metric>[^<>=]*[^<>=\s])\s*(?P<operator>[<>]=?)"
    r"\s*(?P<sign>[+-]?)(?P<number>([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)(?P<ratio>x?)\s*"
)


@dataclass(frozen=True)
class Gate:
    """``metric operator number``: a condition on the value of a metric, or on its change against the first model.

    ``change`` is None (the value), ``difference`` or ``ratio``. The number has the unit of the table.
    """

    metric: str
    operator: str
    number: float
    change: Optional[str] = None

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Read ``METRIC OP NUMBER``. A signed number is a difference, a number followed by ``x`` a ratio.

        Raises:
            ValueError: the text is not a gate.
        """
        match = _PATTERN.fullmatch(text)
        if not match or (match["sign"] and match["ratio"]):
            raise ValueError(f"{text!r} is not METRIC OP NUMBER, such as 'image_auroc>=0.95', 'image_auroc>=-0.01' "
                             "(difference from the first model) or 'file_size<=0.3x' (ratio to it)")
        kind = "difference" if match["sign"] else "ratio" if match["ratio"] else None
        return cls(match["metric"], match["operator"], float(match["sign"] + match["number"]), kind)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self._format(self.number)}"

    def failures(self, record: Dict[str, Any]) -> Iterator[str]:
        """A line for each model of a ``uadtool.compare/1`` record that does not meet the gate.

        A condition on a value applies to every model, a condition on a change to every model but the first.

        Raises:
            UadtoolError: the record lacks the metric, a value of it, or a second model.
        """
        rows = {_composed(row["metric"]): row for row in record["rows"]}
        metric = _composed(self.metric)
        if metric not in rows:
            raise UadtoolError(f"gate {self}: the files hold no {self.metric}; they hold {', '.join(rows)}")
        labels = [model["label"] for model in record["models"]]
        if self.change and len(labels) == 1:
            raise UadtoolError(f"gate {self} is relative to the first model; add the files of a second model")
        values = rows[metric]["values"]
        for model, value in list(zip(record["models"], values))[1 if self.change else 0:]:
            label = model["label"]
            if self.change and not model.get("comparable", True) and rows[metric]["change"] == "difference":
                raise UadtoolError(f"gate {self} cannot be decided for {label}: {labels[0]} scored other images")
            measured = change(self.change, value, values[0]) if self.change else value
            if measured is None:
                raise UadtoolError(f"gate {self} cannot be decided for {label}: a value of {self.metric} is missing")
            if not _OPERATORS[self.operator](measured, self.number):
                yield (f"{label}: {self.metric} is {self._format(measured)}, wanted {self.operator} "
                       f"{self._format(self.number)}")

    def _format(self, number: float) -> str:
        if self.change == "difference":
            return f"{number:+.12g}"
        return f"{number:.12g}{'x' if self.change else ''}"


def _composed(metric: str) -> str:
    """The metric in NFC, since the name of a class may be typed with accents in characters of their own."""
    return unicodedata.normalize("NFC", metric)


class Verdict(NamedTuple):
    """The result of a gate: ``failures``, a line for each model that does not meet it, or the ``error`` of a gate that
    cannot be decided. Without either it is met.
    """

    gate: Gate
    failures: List[str]
    error: Optional[UadtoolError] = None


def decide(gates: Sequence[Gate], record: Dict[str, Any]) -> List[Verdict]:
    """A verdict for each gate on a ``uadtool.compare/1`` record."""
    verdicts = []
    for gate in gates:
        try:
            verdicts.append(Verdict(gate, list(gate.failures(record))))
        except UadtoolError as error:
            verdicts.append(Verdict(gate, [], error))
    return verdicts
