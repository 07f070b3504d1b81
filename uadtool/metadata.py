"""What a model knows about itself; it travels inside every model file as one JSON string."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

from uadtool.errors import UadtoolError
from uadtool.files import refuse_newer

KEY = "uadtool"
"""Under this key the JSON lies in a safetensors header and in an ONNX file's ``metadata_props``."""

SCHEMA = "uadtool.model/1"

PRECISIONS = ("fp32", "fp16", "int8", "mixed")
"""mixed: int8, with layers that stay float."""

MOST_CHARACTERS, MOST_CLASSES, LONGEST_SIDE, MOST_OF_AN_OPTION = 16 << 20, 10_000, 4096, 1_000_000
"""Bounds of what is read: of the JSON, classes, pixels, and options of a method. Far more than any model has."""


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized.

    ``method`` is ``ptq`` or ``qat``, ``calibration`` and ``source`` are those of the ranges file, ``scope`` tells which
    networks (``all`` or ``student``), and ``float_layers`` names the convolutions and linear layers that are not in
    int8.
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
    ``provenance`` lists the steps that made the file, oldest first, each with a digest of the model file that
    went in, and of the names of images.
    ``parameters`` counts weights and biases, memories too, and ``macs`` the multiply-accumulates for one image.
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
    options: Dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    target: Optional[str] = None
    quantization: Optional[Quantization] = None
    provenance: List[Dict[str, Any]] = field(default_factory=list)
    tool_version: str = ""
    good_scores: List[float] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: Optional[str], source: str) -> "Metadata":
        """Parse what ``to_json`` wrote.

        Raises:
            UadtoolError: ``source`` (the file's name, for the message) has no metadata, or not ours, or newer ones, or
                ones beyond bounds.
        """
        if text is None:
            raise UadtoolError(f"{source} was not made by uadtool: it has no '{KEY}' metadata")
        try:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it is longer than {MOST_CHARACTERS >> 20} MiB")
            return cls.from_fields(json.loads(text), source)
        except (ValueError, RecursionError) as error:
            raise _unreadable(source, error) from error

    @classmethod
    def from_fields(cls, fields: Any, source: str) -> "Metadata":
        """``from_json`` of what is no text any more.

        Raises:
            UadtoolError: as ``from_json``.
        """
        try:
            fields = dict(fields)
            schema = fields.pop("schema")
            refuse_newer(schema, SCHEMA, source)
            if schema != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            fields["image_size"] = tuple(fields["image_size"])
            fields["map_size"] = tuple(fields["map_size"])
            if fields.get("quantization"):
                fields["quantization"] = Quantization(**fields["quantization"])
            found = cls(**fields)
            found._check()
            found.to_json()  # later commands write it
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _unreadable(source, error) from error

    def _check(self) -> None:
        """Raises ValueError where a field is not of its type: all of them come out of a file."""
        size = f"two whole numbers from 1 to {LONGEST_SIDE}"
        checks = {
            "classes": (_is_list(self.classes, _is_text) and 0 < len(self.classes) <= MOST_CLASSES,
                        f"a list of 1 to {MOST_CLASSES} names"),
            "image_size": (_is_size(self.image_size), size),
            "map_size": (_is_size(self.map_size), size),
            "good_scores": (_is_list(self.good_scores, _is_finite), "a list of finite numbers"),
            "options": (isinstance(self.options, dict) and all(map(_is_option, self.options.values())),
                        f"an object of texts, booleans and numbers up to {MOST_OF_AN_OPTION}"),
            "provenance": (_is_list(self.provenance, lambda step: isinstance(step, dict)), "a list of objects"),
            "target": (self.target is None or _is_text(self.target), "a text or null"),
            "quantization": (self.quantization is None or _is_quantization(self.quantization), "that of a model"),
            "threshold": (_is_finite(self.threshold), "a finite number"),
            "false_positive_rate": (_is_finite(self.false_positive_rate) and 0 <= self.false_positive_rate < 1,
                                    "a number from 0 to below 1"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            **{name: (_is_count(getattr(self, name)), "a whole number from 0 to 2^63")
               for name in ("parameters", "macs")},
            **{name: (_is_text(getattr(self, name)), "a text")
               for name in ("method", "teacher", "tool_version")},
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"its {name} is not {wanted}")

    def replace(self, **changes: Any) -> "Metadata":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _unreadable(source: str, error: Exception) -> UadtoolError:
    reason = " ".join(str(error)[:500].split())  # a field's name may hold any character
    return UadtoolError(f"{source} has metadata that this version cannot read: {reason}")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    value.encode("utf-8", "surrogateescape")  # a ValueError of what no name of a file and no output can hold
    return True


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_option(value: Any) -> bool:
    return isinstance(value, (bool, str)) or (_is_finite(value) and abs(value) <= MOST_OF_AN_OPTION)


def _is_finite(value: Any) -> bool:
    most = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -most <= value <= most


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(of(item) for item in value)


def _is_size(value: Any) -> bool:
    return len(value) == 2 and all(_is_count(side) and 0 < side <= LONGEST_SIDE for side in value)


def _is_quantization(value: Any) -> bool:
    return (isinstance(value, Quantization) and _is_list(value.float_layers, _is_text)
            and all(_is_text(text) for text in (value.method, value.calibration, value.source, value.scope)))
