"""Products come: classes are added to a detector as rows, in seconds, without the images of its other classes."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from uadtool import __version__
from uadtool.data.inspection import Inspection
from uadtool.data.roi import read_rois, roi_files, rois_digest
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.host import available_cores, build_time
from uadtool.lab.detectors.backbones import traced
from uadtool.lab.detectors.contract import EXAMPLES, nearest_prototype, pooled_descriptor
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import PatchMemory
from uadtool.lab.detectors.prototypes import fit_prototypes
from uadtool.lab.detectors.registry import build_detector, find_method
from uadtool.lab.detectors.statistics import HeldOut, Known, fit_statistics, fit_statistics_from_files
from uadtool.lab.few_images import left_out_maps, split_few
from uadtool.lab.models import assemble
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedMemory
from uadtool.lab.report import class_counts, inspect_samples, warn_of
from uadtool.lab.rows import Model, choose, join, refuse_unknown, row_statistics, tables
from uadtool.lab.sizes import at_size, fit_every_size
from uadtool.lab.training.data import TeacherFeatures, names_digest
from uadtool.lab.training.loop import Run
from uadtool.lab.turns import turned_samples
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import Thresholds, bounded_scores
from uadtool.terminal import first_of, log

SATURATION_IMAGES = 16
"""Images that show whether the ranges of an int8 base cover new classes."""
MOST_SATURATED = 0.1
"""Share of the activations of a point that they may cut off. With ranges of four classes of the shop-floor set it is at
most 0.0002 for the other three, and 0.009 for noise."""


@dataclass(frozen=True)
class GrowthOptions:
    """``replace`` and ``extend`` name classes of the base: to learn anew, or to add good images to.

    ``turns`` is whether classes of few images are learned turned, too: ``auto``, ``yes`` or ``no``.
    """

    replace: Sequence[str] = field(default_factory=list)
    extend: Sequence[str] = field(default_factory=list)
    held_out: float = 0.2
    seed: int = 0
    turns: str = "auto"


def grow(base: Model, digest: str, samples: Sequence[Sample], options: GrowthOptions) -> tuple[Model, dict[str, Any]]:
    """Add the classes of the samples to a float or quantized model: the grown model, and a report.

    Networks, units and ranges stay as they are, and so do the rows of all other classes: their images keep their scores
    unless they are nearer to a new class.

    Args:
        digest: of the base's file.
        samples: good images, each with a class.

    Raises:
        UadtoolError: the base cannot take classes, has one of them without a word in the options, or lacks one that
            they name.
    """
    began, started = time.monotonic(), build_time()
    _refuse(base, samples, options)
    more = [sample for sample in samples if sample.class_name in options.extend]
    new = [sample for sample in samples if sample.class_name not in options.extend]
    report: dict[str, Any] = {"classes": {}, "conspicuous": []}
    model = base
    if more:
        model = _extended(model, more, options, report)
    if new:
        model = _added(model, new, options, report)
    step = {"command": "train", "tool_version": __version__, "base": digest, "started": started,
            "classes": sorted(report["classes"]), "extended": sorted(options.extend),
            "images": list_digest(sample.path for sample in samples), "names": names_digest(samples),
            "held_out": options.held_out, "seed": options.seed, "turns": options.turns, "rois": rois_digest(samples)}
    metadata = model.metadata.replace(provenance=[*base.metadata.provenance, step], tool_version=__version__)
    report["seconds"] = round(time.monotonic() - began, 1)
    return model._replace(metadata=metadata), report


def _refuse(base: Model, samples: Sequence[Sample], options: GrowthOptions) -> None:
    metadata, classes = base.metadata, {str(sample.class_name) for sample in samples}
    method = find_method(metadata.method)
    if not (isinstance(method, type) and issubclass(method, Memory)):
        raise UadtoolError(f"{metadata.method} learns all classes together; train again with the images of all, or use "
                           "memory or duet, which take classes later")
    if not metadata.map_units:
        raise UadtoolError(f"{base.path} was made by an earlier version, which did not store the units of its maps; "
                           "train it again")
    if both := sorted({*options.replace}.intersection(options.extend)):
        raise UadtoolError(f"--replace and --extend both name {first_of(both, 'classes')}; take one of them")
    named = [*options.replace, *options.extend]
    refuse_unknown(base, named)
    if known := sorted(classes.intersection(metadata.classes).difference(named)):
        raise UadtoolError(f"{base.path} already has {first_of(known, 'classes')}; name them after --replace to learn "
                           "them anew, or after --extend to add good images to them")
    if missing := [name for name in named if name not in classes]:
        raise UadtoolError(f"there are no images of {first_of(missing, 'classes')}, which --replace or --extend names")


def _added(base: Model, samples: Sequence[Sample], options: GrowthOptions, report: dict[str, Any]) -> Model:
    """The base with rows of new classes."""
    classes = sorted({str(sample.class_name) for sample in samples})
    if options.replace:
        base = choose(base, [name for name in base.metadata.classes if name not in options.replace])
    inspection, metadata = _inspected(base.metadata, classes, samples)
    rois = read_rois(samples, inspection.sizes, metadata.map_size)
    training, held_out, few = split_few(samples, options.held_out, options.seed, inspection.originals)
    known = _known(base)
    part, run = _part(base, metadata, training, options.seed)
    part.set_rois(classes, rois)
    square = {name for name, sizes in inspection.sizes.items()
              if all(height == width for height, width in (*sizes, metadata.image_size))}
    samples_and_copies = turned_samples(part, run, known.scale, few, square, options.turns)
    run = replace(run, training=run.training.of(samples_and_copies))
    part.fit_memories(run)
    limit, distances = fit_prototypes(part, classes, run, known)
    metadata = metadata.replace(class_distance_limit=max(limit, metadata.class_distance_limit or 0),
                                good_distances=distances)
    joined = join([base, _model(base, part, metadata)])
    _warn_of_routing(joined, base.metadata.classes)
    founds: list[HeldOut] = []

    def fit(model: Model) -> Metadata:
        entries = model.metadata.options["entries"]
        known, rows, results = _known(at_size(base, entries)), row_statistics(model), []
        fitted = at_size(Model(part, metadata.replace(precision="fp32")), entries).module
        assert isinstance(fitted, Memory)
        for members, images, raw in left_out_maps(model, fitted, run, few) if few else ():
            results.append(fit_statistics(rows, partial(_stored, raw), model.metadata.classes, [(members, images)],
                                          known))
        if held_out:
            maps = deployed_maps(model.module, model.metadata, len(held_out))
            results.append(fit_statistics_from_files(rows, maps, model.metadata.classes, held_out, metadata.reading,
                                                     torch.device("cpu"), known))
        founds.append(_merged(results))
        return _with_scores(model.metadata, founds[-1], classes)

    joined = fit_every_size(joined, fit)
    warn_of(founds[-1])
    report["conspicuous"] += founds[-1].conspicuous
    report["classes"].update(class_counts(classes, samples, inspection.originals, run.training.samples,
                                          founds[-1], rois))
    return joined


def _stored(raw: tuple[Tensor, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """``RawMaps`` that are known already."""
    return raw


def _extended(base: Model, samples: Sequence[Sample], options: GrowthOptions, report: dict[str, Any]) -> Model:
    """The base with more good patches in the banks of some classes; all else of them stays, in the banks' new unit."""
    classes = sorted(options.extend)
    inspection, metadata = _inspected(base.metadata, classes, samples)
    originals = [sample for number, sample in enumerate(samples) if inspection.originals[number] == number]
    old = choose(base, classes)
    part, run = _part(base, old.metadata.replace(preprocessing=metadata.preprocessing), originals, options.seed)
    own, theirs = part.state_dict(), old.module.state_dict()
    for name, module in old.module.named_modules():
        if isinstance(module, QuantizedMemory):
            theirs.update({f"{name}.{table}": tensor for table, tensor in module.dequantized().state_dict().items()})
    for name in tables(part) & own.keys():
        own[name].copy_(theirs[name])
    for name, roi in read_rois(samples, inspection.sizes, part.map_size).items():
        if not np.array_equal(part.roi[classes.index(name)], roi):
            raise UadtoolError(f"--extend keeps the region of interest of {name}, and {roi_files(samples)[name]} marks "
                               "another; leave it out, or learn the class anew with --replace")
    factors = part.extend_memories(run)[:, :, None, None]
    for statistics in (part, *part.sizes.values()):
        for name in ("expected_maps", "map_spreads"):
            statistics.get_buffer(name)[:, :factors.shape[1]] *= factors
    given, used = (Counter(str(sample.class_name) for sample in images) for images in (samples, originals))
    report["classes"].update({name: {"training": used[name], "held_out": 0, "copies": given[name] - used[name]}
                              for name in classes})
    extended = _model(base, part, old.metadata)
    others = [name for name in base.metadata.classes if name not in classes]
    return join([choose(base, others), extended]) if others else extended


def _inspected(metadata: Metadata, classes: list[str], samples: Sequence[Sample]) -> tuple[Inspection, Metadata]:
    """What the images look like, and the metadata of a model of these classes alone."""
    inspection = inspect_samples(samples, None)
    none: dict[str, Any] = {"thresholds": {}, "good_scores": {}, "held_out": {}}
    metadata = metadata.with_smaller(one.replace(**none) for one in metadata.smaller())
    return inspection, metadata.replace(
        classes=classes, **none, preprocessing={**metadata.preprocessing, "grey_bits": inspection.grey_bits})


def _part(base: Model, metadata: Metadata, samples: list[Sample], seed: int) -> tuple[Memory, Run]:
    """A float detector of some classes, to be fitted, and its run with the base's teacher."""
    part, network = build_detector(metadata), _teacher(base)
    assert isinstance(part, Memory)
    images = TeacherFeatures(samples, metadata.reading, torch.inference_mode()(network), available_cores())
    share = saturation(network, images.images(range(0, len(samples), -(-len(samples) // SATURATION_IMAGES))))
    if share > MOST_SATURATED:
        raise UadtoolError(f"the int8 ranges of {base.path} cut off {share:.0%} of the activations of a layer for "
                           "these images; calibrate the float model on images of all classes, and quantize it again")
    return part, Run(images, images, 0, seed, torch.device("cpu"), torch.float32, Path(), {}, False)


def saturation(network: nn.Module, images: Tensor) -> float:
    """Largest share of the activations of a point that its range cuts off, in an int8 network, except of the image."""
    shares: list[float] = []
    hooks = [module.register_forward_pre_hook(lambda module, values: shares.append(module.cut_off(*values)))
             for module in network.modules() if isinstance(module, ActivationQuantizer)]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    return max(shares[1:], default=0.0)


def _teacher(base: Model) -> fx.GraphModule:
    """Images -> the feature maps that the base computes, in float or in int8."""
    network = traced(base.module)
    output = next(node for node in network.graph.nodes if node.op == "output")
    output.args = next(node for node in network.graph.nodes if node.target is pooled_descriptor).args
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _known(base: Model) -> Known:
    return Known(base.module.get_buffer("descriptor_scale"), torch.tensor(base.metadata.map_units)[:, None, None],
                 float(base.module.get_buffer("score_std").square().mean()))


def _model(base: Model, part: Memory, metadata: Metadata) -> Model:
    """The part's rows on the base, in the base's precision."""
    tensors, names = base.module.state_dict(), tables(base.module)
    state = part.state_dict()
    for name, module in base.module.named_modules():
        if isinstance(module, QuantizedMemory):
            memory = part.get_submodule(name)
            assert isinstance(memory, PatchMemory)
            quantized = QuantizedMemory(memory, module.signed)
            state.update({f"{name}.{own}": tensor for own, tensor in quantized.state_dict().items()})
    rows = {name: state[name] for name in names & tensors.keys()}
    return Model(assemble({**tensors, **rows}, metadata, base.path), metadata, base.path)


def _merged(results: Sequence[HeldOut]) -> HeldOut:
    """What the images of all classes showed."""
    scores: dict[str, list[float]] = {}
    named: dict[str, dict[str, float]] = {}
    for found in results:
        for name, values in found.scores.items():
            scores.setdefault(name, []).extend(values)
            named.setdefault(name, {}).update(found.named.get(name, {}))
    return HeldOut(scores, sum((found.taken_for for found in results), Counter()),
                   [path for found in results for path in found.conspicuous], results[0].units, named)


def _with_scores(metadata: Metadata, found: HeldOut, classes: Sequence[str]) -> Metadata:
    """The metadata with thresholds of new classes; the common one stays, and with it those of the others."""
    scores = {name: values for name, values in found.scores.items() if name in classes}
    thresholds = Thresholds.at(metadata.false_positive_rate, scores, metadata.threshold).by_class
    confused = [*metadata.good_scores.get("", []), *found.scores.get("", [])]
    if confused:
        scores[""] = confused
    named = {**metadata.held_out, **{name: found.named[name] for name in classes if name in found.named}}
    if "" in named or "" in found.named:
        named[""] = {**named.get("", {}), **found.named.get("", {})}
    return metadata.replace(thresholds={**metadata.thresholds, **thresholds}, held_out=named,
                            good_scores={**metadata.good_scores, **bounded_scores(scores)})


def _warn_of_routing(model: Model, known: Sequence[str]) -> None:
    """Warn when images of known classes are nearer to a new prototype; ``warn_of`` tells of the other way round."""
    examples = model.module.get_buffer(EXAMPLES)
    for row, name in enumerate(model.metadata.classes):
        if name not in known:
            continue
        own = torch.stack(list({tuple(one.tolist()): one for one in examples[row]}.values()))  # without copies
        nearest = nearest_prototype(own, model.module.get_buffer("prototypes"),
                                    model.module.get_buffer("descriptor_scale"))
        taken = Counter(model.metadata.classes[place] for place in nearest.tolist())
        for other in sorted(taken.keys() - {*known}):
            log.warning("%d of %d images of %s are now taken for %s: what is normal for one passes in the other; make "
                        "them one class if their images are alike", taken[other], len(own), name, other)
