"""Classes as rows: what a detector knows of a class is one row of each table, so classes come and go without training.

Everything else is the base: networks, units, scales. Models that grew from one base can be joined.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.complexity import count_macs, count_parameters
from uadtool.lab.detectors.contract import ROWS, Detector
from uadtool.lab.detectors.registry import build_detector
from uadtool.lab.models import assemble
from uadtool.metadata import Metadata
from uadtool.terminal import first_of


class Model(NamedTuple):
    """A detector or its quantized graph, as ``load_model`` returns it, and the file that messages name."""

    module: nn.Module
    metadata: Metadata
    path: str = "the model"


def tables(module: nn.Module) -> set[str]:
    """The names of the tensors with a row for each class."""
    parts = module.named_modules()
    return {*ROWS, *(f"{prefix}.{name}" for prefix, part in parts for name in getattr(part, "rows", ()))}


def choose(model: Model, classes: Sequence[str]) -> Model:
    """The model of these of its classes, in its order. Images whose nearest class is one of them keep their outputs.

    Raises:
        UadtoolError: the model does not have one of the classes, or none is left.
    """
    metadata = model.metadata
    refuse_unknown(model, classes)
    if not classes:
        raise UadtoolError(f"no class of {model.path} would be left")
    kept = [number for number, name in enumerate(metadata.classes) if name in classes]
    names, rows = tables(model.module), torch.tensor(kept)
    tensors = {name: tensor[rows] if name in names else tensor for name, tensor in model.module.state_dict().items()}
    return rebuilt(model, tensors, _of_classes(metadata, [metadata.classes[number] for number in kept]))


def join(models: Sequence[Model]) -> Model:
    """The model of all classes of these models, which grew from one base. Their order makes no difference.

    Raises:
        UadtoolError: their bases differ, or a class has two different rows.
    """
    return reduce(_join, models)


def without(model: Model, dropped: Sequence[str]) -> list[str]:
    """The classes of the model except these.

    Raises:
        UadtoolError: the model does not have one of them.
    """
    refuse_unknown(model, dropped)
    return [name for name in model.metadata.classes if name not in dropped]


def refuse_unknown(model: Model, classes: Sequence[str]) -> None:
    """Require that the model has all these classes.

    Raises:
        UadtoolError: one is missing.
    """
    if missing := [name for name in classes if name not in model.metadata.classes]:
        raise UadtoolError(f"{model.path} has no class {first_of(missing, 'classes')}; it has "
                           f"{first_of(model.metadata.classes, 'classes')}")


def base_digest(model: Model) -> str:
    """Digest of everything that is not a row of a class."""
    digest, names = hashlib.sha256(), tables(model.module)
    for name, tensor in sorted(model.module.state_dict().items()):
        if name not in names:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    metadata = model.metadata
    shared: dict[str, Any] = {
        **metadata.identity, "classes": None, "options": metadata.options, "target": metadata.target,
        "sizes": [(one.threshold, one.false_positive_rate, one.map_units) for one in (*metadata.smaller(), metadata)]}
    digest.update(json.dumps(shared, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def rebuilt(model: Model, tensors: Mapping[str, Tensor], metadata: Metadata) -> Model:
    """The model with other tensors and metadata, whose counts of parameters and multiply-accumulates are set."""
    module = assemble(dict(tensors), metadata, model.path)
    with torch.device("meta"):
        detector = build_detector(metadata)  # an int8 graph has parameters as codes
        metadata = metadata.replace(parameters=count_parameters(detector),
                                    macs=count_macs(detector, metadata.image_size))
    return Model(module, metadata, model.path)


def row_statistics(model: Model) -> Detector:
    """A detector that has only the rows of the model, which it shares."""
    with torch.device("meta"):
        detector = build_detector(model.metadata)
    for name in ROWS:
        setattr(detector, name, model.module.get_buffer(name))
    return detector


def _join(one: Model, other: Model) -> Model:
    digests = [base_digest(model) for model in (one, other)]
    if digests[0] != digests[1]:
        raise UadtoolError(f"{one.path} and {other.path} did not grow from one base: theirs are {digests[0][:19]} and "
                           f"{digests[1][:19]}; join models that --add-to made from the same file")
    found, theirs = _rows(one), _rows(other)
    for name in sorted(found.keys() & theirs.keys()):
        if one.metadata.thresholds.get(name) != other.metadata.thresholds.get(name) or not all(
                torch.equal(row, theirs[name][table]) for table, row in found[name].items()):
            raise UadtoolError(f"the class {name} of {one.path} is not that of {other.path}; leave one out with --drop")
    found.update(theirs)
    names, tensors = sorted(found), one.module.state_dict()
    for table in next(iter(found.values())):
        tensors[table] = torch.stack([found[name][table] for name in names])
    return rebuilt(one, tensors, _joined(one.metadata, other.metadata, names))


def _rows(model: Model) -> dict[str, dict[str, Tensor]]:
    """For each class its row of each table."""
    state = model.module.state_dict()
    names = tables(model.module) & state.keys()
    return {name: {table: state[table][place] for table in names}
            for place, name in enumerate(model.metadata.classes)}


def _of_classes(metadata: Metadata, classes: list[str]) -> Metadata:
    """The metadata of these classes. Scores of images that were taken for another class remain."""
    metadata = metadata.with_smaller(_of_classes(one.replace(sizes=[]), classes) for one in metadata.smaller())

    def part(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in classes or not name}

    return metadata.replace(
        classes=classes, thresholds=part(metadata.thresholds), good_scores=part(metadata.good_scores),
        held_out=part(metadata.held_out), good_distances=part(metadata.good_distances),
        preprocessing={**metadata.preprocessing, "grey_bits": part(metadata.preprocessing["grey_bits"])})


def _joined(one: Metadata, other: Metadata, classes: list[str]) -> Metadata:
    """The metadata of both. The steps after those that made their base are in an order of their own."""
    one = one.with_smaller(_joined(a.replace(sizes=[]), b.replace(sizes=[]), classes)
                           for a, b in zip(one.smaller(), other.smaller()))
    pairs = zip(one.provenance, other.provenance)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    later = {json.dumps(step, sort_keys=True): step for step in (*one.provenance[common:], *other.provenance[common:])}
    confused = Counter(one.good_scores.get("", [])) | Counter(other.good_scores.get("", []))
    good_scores = {**_both(one.good_scores, other.good_scores), "": sorted(confused.elements())}
    limits = [metadata.class_distance_limit for metadata in (one, other)]
    return one.replace(
        classes=classes, thresholds=_both(one.thresholds, other.thresholds),
        good_scores={name: scores for name, scores in good_scores.items() if scores},
        held_out={**_both(one.held_out, other.held_out), **_confused(one, other)},
        good_distances=_both(one.good_distances, other.good_distances),
        class_distance_limit=None if None in limits else max(limit for limit in limits if limit is not None),
        preprocessing={**one.preprocessing, "grey_bits": _both(one.preprocessing["grey_bits"],
                                                               other.preprocessing["grey_bits"])},
        provenance=[*one.provenance[:common], *(later[text] for text in sorted(later))])


def _confused(one: Metadata, other: Metadata) -> dict[str, dict[str, float]]:
    """The held-out images of both that were taken for another class."""
    named = {**one.held_out.get("", {}), **other.held_out.get("", {})}
    return {"": dict(sorted(named.items()))} if named else {}


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both by class, in the order of the names."""
    return dict(sorted({**one, **other}.items()))
