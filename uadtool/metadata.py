"""What a model knows about itself; it travels inside every model file as one JSON string."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from uadtool.errors import UadtoolError

KEY = "uadtool"
"""Under this key the JSON lies in a safetensors header and in an ONNX file's ``metadata_props``."""

SCHEMA = "uadtool.model/1"

MOST_SCORES = 1001


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized.

    ``method`` is ``ptq`` or ``qat``, ``calibration`` and ``source`` are those of the ranges file, ``scope`` tells which
    networks (``all`` or ``student``), and ``float_layers`` names the convolutions that are not in int8.
    """

    method: str
    calibration: str
    source: str
    scope: str
    float_layers: List[str]


@dataclass(frozen=True)
class Metadata:
    """Everything about a detector that is not a weight.

    ``image_size`` and ``map_size`` are (height, width) in pixels. ``threshold`` is in units of the normalised score
    (standard deviations above the mean of good images); held-out good images exceed it at ``false_positive_rate``, and
    ``good_scores`` are theirs, sorted.
    ``provenance`` lists the steps that made the file, oldest first, each with the digests of what went in.
    ``parameters`` counts weights and biases of both networks and ``macs`` the multiply-accumulates for one image.
    ``precision`` is fp32, fp16, int8, or mixed: int8 with layers that stay float.
    """

    method: str
    teacher: str
    classes: List[str]
    image_size: Tuple[int, int]
    map_size: Tuple[int, int]
    threshold: float
    false_positive_rate: float
    parameters: int
    macs: int
    good_scores: List[float] = field(default_factory=list)
    options: Dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    target: Optional[str] = None
    quantization: Optional[Quantization] = None
    provenance: List[Dict[str, Any]] = field(default_factory=list)
    tool_version: str = ""

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: Optional[str], source: str) -> "Metadata":
        """Parse what ``to_json`` wrote.

        Raises:
            UadtoolError: ``source`` (the file's name, for the message) has no metadata, or not ours.
        """
        if text is None:
            raise UadtoolError(f"{source} was not made by uadtool: it has no '{KEY}' metadata")
        try:
            fields = json.loads(text)
            if fields.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            fields["image_size"] = tuple(fields["image_size"])
            fields["map_size"] = tuple(fields["map_size"])
            if fields.get("quantization"):
                fields["quantization"] = Quantization(**fields["quantization"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UadtoolError(f"{source} has metadata that this version cannot read: {error}") from error

    def replace(self, **changes: Any) -> "Metadata":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def threshold_at(scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest of the scores that no more than this share of them exceeds.

    A rate below 1 / (number of scores) gives the highest one.
    """
    allowed = int(false_positive_rate * len(scores) + 1e-9)
    return sorted(scores)[len(scores) - 1 - allowed]


def bounded_scores(scores: Sequence[float]) -> List[float]:
    """The scores, sorted; of very many, as many quantiles as a file should hold."""
    count = min(len(scores), MOST_SCORES)
    quantiles = (sorted(scores)[round(place * (len(scores) - 1) / max(1, count - 1))] for place in range(count))
    return [float(f"{score:.6g}") for score in quantiles]
