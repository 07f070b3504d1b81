"""The detection methods by name, and building a detector from its metadata."""

import inspect
import math
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import Detector, Statistics
from uadtool.lab.detectors.dinomaly import Dinomaly
from uadtool.lab.detectors.duet import Duet
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.reverse_distillation import ReverseDistillation
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.detectors.uninformed_students import UninformedStudents
from uadtool.metadata import Metadata

Method = Callable[..., Detector]
"""A subclass of ``Detector``, called with (teacher, image_size, classes, **options). Every option has a default."""

BUILT_IN: dict[str, Method] = {"stfpm": STFPM, "rd": ReverseDistillation, "us": UninformedStudents,
                               "dinomaly": Dinomaly, "memory": Memory, "duet": Duet}

PLUG_INS = "uadtool.detectors"
"""Entry point group in which other packages add methods: name -> subclass of ``Detector``."""


def find_method(name: str) -> Method:
    """The detector class of a method, built in or from an installed package.

    Raises:
        UadtoolError: no method has this name, or its package cannot be imported.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    plug_ins = {point.name: point for point in entry_points(group=PLUG_INS)}
    if name not in plug_ins:
        raise UadtoolError(f"unknown method {name!r}; take one of {', '.join([*BUILT_IN, *plug_ins])}")
    try:
        method: Method = plug_ins[name].load()
    except Exception as error:  # code of another package may raise anything
        raise UadtoolError(f"method {name!r} cannot be loaded from {plug_ins[name].value}: {error}") from error
    return method


def method_options(method: str, given: Mapping[str, str]) -> dict[str, Any]:
    """All options of a method: the given values, converted to the types of the defaults, and the other defaults.

    Raises:
        UadtoolError: the method has no such option, or a value does not have its type.
    """
    _, _, _, *parameters = inspect.signature(find_method(method)).parameters.values()
    options = {parameter.name: parameter.default for parameter in parameters}
    for name, value in given.items():
        if name not in options:
            raise UadtoolError(f"{method} has no option {name!r}; it has {', '.join(options) or 'none'}")
        kind = type(options[name])
        try:
            options[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError) as error:
            raise UadtoolError(f"option {name} of {method} must be of type {kind.__name__}, not {value!r}") from error
        if kind is float and not math.isfinite(options[name]):
            raise UadtoolError(f"option {name} of {method} must be finite, not {value}")
    return options


def build_detector(metadata: Metadata) -> Detector:
    """The detector that the metadata describes, in its deployed form (batch norm folded), with random weights.

    Raises:
        UadtoolError: this version does not have the method or the teacher, or cannot build it with these options.
    """
    method = find_method(metadata.method)
    try:
        detector = method(metadata.teacher, metadata.image_size, len(metadata.classes), **metadata.options)
        detector.sizes.update({str(size["entries"]): Statistics(detector) for size in metadata.sizes})
        return detector.fold_batch_norm()
    except UadtoolError:
        raise
    except Exception as error:  # torch raises many types for impossible sizes
        raise UadtoolError(f"the model has options {metadata.options!s:.200} that this version does not support; "
                           "use the version of uadtool that made it") from error
