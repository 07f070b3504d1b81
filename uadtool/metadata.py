"""The metadata of a model, which travel inside every model file as one JSON string (schemas/model.json)."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

from uadtool.errors import UadtoolError
from uadtool.schemas.json_files import refuse_newer
from uadtool.schemas.validation import validate

KEY = "uadtool"
"""Key of the JSON text in a safetensors header and in the ``metadata_props`` of an ONNX file."""

SCHEMA = "uadtool.model/1"

MOST_CHARACTERS = 16 << 20
"""Bound of the JSON text; ``schemas/model.json`` has the others. They are far beyond any real model."""


PREPROCESSING = {
    "channels": "RGB", "orientation": "exif-applied", "transparency": "on-white", "resize": "bilinear-antialiased",
    "aspect_ratio": "not-kept",
}
"""What happens between an image file and the model's input, besides the grey depths; see data/README.md."""

OF_A_SIZE = ("threshold", "thresholds", "false_positive_rate", "good_scores", "held_out", "map_units")
"""The fields that depend on the size of banks, besides the option ``entries``."""


class Reading(NamedTuple):
    """How image files are read for a model: the arguments of ``data.images.read_image`` besides the path."""

    size: Tuple[int, int]
    depths: Tuple[int, ...] = ()

    @classmethod
    def at(cls, size: Tuple[int, int], grey_bits: Dict[str, int]) -> "Reading":
        """For images of any class, whose ``grey_bits`` may differ: the depths of all."""
        return cls(size, tuple(sorted(set(grey_bits.values()))))


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized.

    ``method`` is ``ptq`` or ``qat``. ``calibration`` and ``source`` come from the ranges file. ``scope`` names the
    quantized networks (``all`` or ``student``), ``float_layers`` the convolutions and linear layers that are not int8.
    """

    method: str
    calibration: str
    source: str
    scope: str
    float_layers: List[str]


@dataclass(frozen=True)
class Metadata:
    """Everything about a detector that is not a weight.

    ``image_size`` and ``map_size`` are (height, width) in pixels. ``thresholds`` judge an image by its nearest class,
    ``threshold`` the images of a class without one. Both are in units of the normalised score (standard deviations
    above the mean of good images). Held-out good images exceed them at ``false_positive_rate``; ``good_scores`` are
    their scores, sorted, by class. Scores of images that were taken for another class, or of no known class, are those
    of the class ``""``.
    ``held_out`` are the scores of the single held-out images by class and, below it, by ``tail_digest``, unless they
    are too many; so models that saw the same images can be combined.
    An image whose class distance exceeds ``class_distance_limit`` is of no class of the model; None if no distances
    are known (files before 2026-12). ``good_distances`` are class distances of good images, each by the prototype of
    the others, sorted, by class.
    ``map_units`` are the units of the raw maps in their sum; classes that are added to the model are measured in them.
    ``sizes`` are smaller banks that the model holds, ascending: their ``entries``, and the fields in ``OF_A_SIZE``.
    ``preprocessing`` says how image files become the input: ``PREPROCESSING``, and ``grey_bits``, the bits of the
    values in 16-bit grey files, by class.
    ``provenance`` lists the steps that made the file, oldest first, each with digests of the model file that went in
    and of the names of images.
    ``parameters`` counts weights, biases and memories, ``macs`` the multiply-accumulates for one image.
    ``precision`` is fp32, fp16, int8, or mixed (int8 with layers that stay float).
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
    thresholds: Dict[str, float] = field(default_factory=dict)
    good_scores: Dict[str, List[float]] = field(default_factory=dict)
    held_out: Dict[str, Dict[str, float]] = field(default_factory=dict)
    class_distance_limit: Optional[float] = None
    good_distances: Dict[str, List[float]] = field(default_factory=dict)
    map_units: List[float] = field(default_factory=list)
    preprocessing: Dict[str, Any] = field(default_factory=lambda: {**PREPROCESSING, "grey_bits": {}})
    sizes: List[Dict[str, Any]] = field(default_factory=list)

    @property
    def identity(self) -> Dict[str, Any]:
        """The part of a record's ``model`` that says which scores are comparable with this model's."""
        return {"method": self.method, "teacher": self.teacher, "classes": self.classes,
                "image_size": list(self.image_size), "precision": self.precision}

    @property
    def reading(self) -> Reading:
        """How image files are read for this model."""
        return Reading.at(self.image_size, self.preprocessing["grey_bits"])

    def to_json(self) -> str:
        """The JSON text for a model file.

        Raises:
            UadtoolError: a field is beyond the bounds that ``from_json`` checks.
            ValueError: a number is not finite.
        """
        text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, allow_nan=False)
        try:
            validate(_decode(text), "model", strict=True)
        except ValueError as error:
            raise UadtoolError(f"no command could read the metadata of this model: {error}") from error
        return text

    @classmethod
    def from_json(cls, text: Optional[str], source: str) -> "Metadata":
        """Parse what ``to_json`` wrote; messages name its ``source``, a file.

        Raises:
            UadtoolError: ``text`` is None, is not metadata of this version, or is beyond bounds.
        """
        if text is None:
            raise UadtoolError(f"{source} was not made by uadtool: it has no '{KEY}' metadata")
        try:
            return cls.from_fields(_decode(text), source)
        except (ValueError, RecursionError) as error:
            raise _unreadable(source, error) from error

    @classmethod
    def from_fields(cls, fields: Any, source: str) -> "Metadata":
        """Metadata from decoded JSON.

        Raises:
            UadtoolError: as ``from_json``.
        """
        if isinstance(fields, dict):
            refuse_newer(fields.get("schema"), SCHEMA, source)
        try:
            validate(fields, "model", strict=True)
            json.dumps(fields.get("provenance"), allow_nan=False)  # it may hold anything, and later commands write it
        except (ValueError, RecursionError) as error:
            raise _unreadable(source, error) from error
        values = {name: value for name, value in fields.items() if name != "schema"}
        values["image_size"], values["map_size"] = tuple(fields["image_size"]), tuple(fields["map_size"])
        if fields.get("quantization"):
            values["quantization"] = Quantization(**fields["quantization"])
        if isinstance(values.get("good_scores"), list):  # written before there were thresholds for classes
            values["good_scores"] = {"": values["good_scores"]}
        return cls(**values)

    def smaller(self) -> "List[Metadata]":
        """The metadata of each of the ``sizes``, which has those below it."""
        return [self.replace(options={**self.options, "entries": fields["entries"]}, sizes=self.sizes[:place],
                             **{name: fields[name] for name in OF_A_SIZE})
                for place, fields in enumerate(self.sizes)]

    def with_smaller(self, smaller: "Iterable[Metadata]") -> "Metadata":
        """The metadata with the ``sizes`` that these describe."""
        return self.replace(sizes=[
            {"entries": one.options["entries"], **{name: getattr(one, name) for name in OF_A_SIZE}} for one in smaller])

    def replace(self, **changes: Any) -> "Metadata":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _decode(text: str) -> Any:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS >> 20} MiB")
    return json.loads(text)


def _unreadable(source: str, error: Exception) -> UadtoolError:
    return UadtoolError(f"{source} has metadata that this version cannot read: {error}")
