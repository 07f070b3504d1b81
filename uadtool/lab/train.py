"""Training one model for all classes from good images."""
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uadtool import __version__
from uadtool.data.inspection import Inspection
from uadtool.data.roi import read_rois, rois_digest
from uadtool.data.samples import Sample
from uadtool.data.splits import LEAST_HELD_OUT, balanced, split_held_out
from uadtool.errors import UadtoolError
from uadtool.files import file_digest, list_digest
from uadtool.host import build_time
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER
from uadtool.lab.detectors.complexity import count_macs, count_parameters
from uadtool.lab.detectors.contract import Detector, Statistics
from uadtool.lab.detectors.prototypes import fit_prototypes
from uadtool.lab.detectors.registry import find_method, method_options
from uadtool.lab.detectors.statistics import HeldOut, fit_statistics_from_files, with_found
from uadtool.lab.detectors.weights import load_teacher_weights
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES
from uadtool.lab.quantization.ranges import Ranges, ranges_digest
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantization.teacher import quantized_teacher
from uadtool.lab.report import class_counts, inspect_samples, map_cells, warn_of
from uadtool.lab.rows import Model
from uadtool.lab.sizes import fit_every_size
from uadtool.lab.training import distributed
from uadtool.lab.training.data import Teacher, TeacherFeatures, fits, names_digest, pack_originals, read_images
from uadtool.lab.training.loop import BATCH_SIZE, Outcome, Run, steps_per_epoch
from uadtool.lab.training.precision import autocast, autocast_dtype, choose_device
from uadtool.metadata import PREPROCESSING, Metadata, Reading
from uadtool.scoring.thresholds import warn_of_few
from uadtool.terminal import log

EPOCHS = 40
"""Epochs of a training unless it says otherwise."""


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result of a training run, besides the images.

    ``steps``, batches of 16, replace ``epochs``, which are 40 by default; a method that takes no steps has neither.
    ``held_out`` is the share of good images of each class that
    is held out: it chooses the checkpoint and sets the score statistics and the threshold, which held-out images exceed
    at ``false_positive_rate``. ``sizes`` are numbers of entries: the model has banks of the largest, which begin with
    the others. ``image_size`` is (height, width). ``grey_bits`` are those of the values in 16-bit grey
    files; None takes for each class the fewest that fit. With ``teacher_ranges`` the student learns the
    features of the teacher in int8, as ``target`` rounds it.
    """

    method: str = "memory"
    teacher: str = DEFAULT_TEACHER
    teacher_weights: Optional[str] = None
    image_size: tuple[int, int] = (256, 256)
    grey_bits: Optional[int] = None
    method_options: Mapping[str, str] = field(default_factory=dict)
    sizes: Sequence[int] = ()
    epochs: Optional[int] = None
    steps: Optional[int] = None
    held_out: float = 0.2
    false_positive_rate: float = 0.01
    device: str = "auto"
    seed: int = 0
    teacher_ranges: Optional[Ranges] = None
    target: str = "onnxruntime"


@dataclass(frozen=True)
class TrainingResult:
    """The deployed detector (batch norm folded, on the CPU), its metadata, and a report of the run."""

    detector: Detector
    metadata: Metadata
    report: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """A detector that is ready to be trained, and its run."""

    detector: Detector
    classes: list[str]
    method_options: dict[str, Any]
    weights_source: str
    inspection: Inspection
    rois: dict[str, NDArray[np.bool_]]
    reading: Reading
    run: Run


def train(samples: Sequence[Sample], options: TrainingOptions, checkpoint: Path,
          resume: bool = False) -> Optional[TrainingResult]:
    """Train a detector for all classes of the samples. Only the score statistics use the class labels.

    When processes train together (``distributed.process_group``), the first one finishes the detector and the others
    return None.

    Args:
        samples: good images, each with a class, as ``dataset.training_samples`` returns them.
        checkpoint: file for the state of the run; the caller removes it after saving the result.
        resume: continue from the checkpoint, if it exists, to the result of an uninterrupted run.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, its weights are not available, an image cannot be read, the
            checkpoint belongs to another run, or processes that train together disagree or are too many.
        KeyboardInterrupt: a signal arrived; the checkpoint is written.
    """
    began, started = time.monotonic(), build_time()
    torch.manual_seed(options.seed)
    job = _prepare(samples, options, checkpoint, resume)
    outcome = job.detector.fit(job.run)
    return _finish(job, outcome, samples, options, began, started) if distributed.rank() == 0 else None


def _prepare(samples: Sequence[Sample], options: TrainingOptions, checkpoint: Path, resume: bool) -> _Job:
    """Build the detector, check that the run is possible, and compute the teacher's features."""
    device = choose_device(options.device)
    dtype = autocast_dtype(device)
    if distributed.any_process(dtype == torch.float32):
        dtype = torch.float32
    classes = sorted({str(sample.class_name) for sample in samples})
    _warn_of_similar(classes)
    all_options = method_options(options.method, options.method_options)
    if options.sizes:
        if "entries" not in all_options:
            raise UadtoolError(f"{options.method} has no banks, and so one size; memory and duet have several")
        all_options["entries"] = max(options.sizes)
    Metadata(options.method, options.teacher, classes, options.image_size, map_size=options.image_size, threshold=0.0,
             false_positive_rate=options.false_positive_rate, parameters=0, macs=0,
             options=all_options).to_json()  # raises if no command could read the model
    inspection = distributed.on_first(lambda: inspect_samples(samples, options.grey_bits))
    reading = Reading.at(options.image_size, inspection.grey_bits)
    training_samples, held_out_samples = split_held_out(samples, options.held_out, options.seed, inspection.originals)
    counts = Counter(sample.class_name for sample in held_out_samples)
    if small_classes := [name for name in classes if counts[name] < LEAST_HELD_OUT]:
        log.warning("too few good images to learn what is normal: %s; such a class may score as anomalous throughout, "
                    "or not at all; give it at least %d", ", ".join(small_classes), 2 * LEAST_HELD_OUT)
    config = {**asdict(replace(options, method_options={})),
              **{f"option {name}": value for name, value in all_options.items()},
              "teacher_weights": file_digest(options.teacher_weights) if options.teacher_weights else None,
              "teacher_ranges": ranges_digest(options.teacher_ranges) if options.teacher_ranges else None,
              "image_size": list(options.image_size),
              "device": device.type, "dtype": str(dtype),
              "image count": len(samples), "images": list_digest(sample.path for sample in samples),
              "rois": rois_digest(samples)}
    distributed.require_same(config)
    processes, batch_size = distributed.world_size(), min(BATCH_SIZE, len(training_samples))
    if processes > batch_size:
        raise UadtoolError(f"there are more processes ({processes}) than images in a batch ({batch_size}); start at "
                           f"most {batch_size}")

    detector = find_method(options.method)(options.teacher, options.image_size, len(classes), **all_options)
    if detector.one_pass and (options.steps or options.epochs):
        raise UadtoolError(f"{options.method} learns in one pass over the images; leave out --steps and --epochs")
    rois = read_rois(samples, inspection.sizes, detector.map_size)
    detector.set_rois(classes, rois)
    pretrained = detector.pretrained()
    weights_source = load_teacher_weights(pretrained, options.teacher, options.teacher_weights)
    log.info("teacher %s with weights of %s", options.teacher, weights_source)
    distributed.copy_first(detector)
    detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pretrained.to(device).eval().requires_grad_(False)

    teacher = _teacher(detector, options, training_samples, reading, device, dtype)
    training, held_out = (TeacherFeatures(images, reading, teacher, distributed.own_cores())
                          for images in (training_samples, held_out_samples))
    steps = 0 if detector.one_pass else options.steps or (options.epochs or EPOCHS) * steps_per_epoch(len(training))
    _hold(detector, training, held_out, steps)
    run = Run(training, held_out, steps, options.seed, device, dtype, checkpoint, config, resume)
    return _Job(detector, classes, all_options, weights_source, inspection, rois, reading, run)


def _hold(detector: Detector, training: TeacherFeatures, held_out: TeacherFeatures, steps: int) -> None:
    """Say how much there is to do and to hold in memory, and compute what the steps read again and again."""
    counts = f"{len(training)} images to train on, {len(held_out)} held out"
    if detector.one_pass:
        log.info("%s; one pass, and no image stays in memory", counts)
        return
    features = not detector.alters_images
    size = training.bytes_per_image(features) * (len(training) + len(held_out))
    fit = fits(size)
    log.info("%s, %d steps; %s %s", counts, steps, "pixels and features" if features else "pixels",
             f"take {size / 1e6:.1f} MB of memory" if fit else
             f"would take {size / 1e6:.1f} MB, too much of the memory, and are computed anew for each step")
    if fit:
        for part in (training, held_out):
            part.hold(features)


def _warn_of_similar(classes: Sequence[str]) -> None:
    """Warn of classes that differ only in case: a file system without case would take their folders for one."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(name.casefold(), []).append(name)
    similar = [" and ".join(names) for names in groups.values() if len(names) > 1]
    if similar:
        log.warning("classes whose names differ only in case are trained as separate classes: %s", ", ".join(similar))


def _teacher(detector: Detector, options: TrainingOptions, samples: Sequence[Sample], reading: Reading,
             device: torch.device, dtype: torch.dtype) -> Teacher:
    """The float teacher, or the quantized teacher with biases corrected on images of the samples."""
    network, prepare = detector.pretrained(), detector.prepare
    if detector.float_teacher or options.teacher_ranges:
        dtype = torch.float32
    if options.teacher_ranges:
        images = read_images(balanced(list(samples), CORRECTION_IMAGES, options.seed), reading, distributed.own_cores())
        network = quantized_teacher(detector, options.teacher_ranges, TARGETS[options.target], images.to(device))
        prepare = torch.nn.Identity()  # the quantized teacher takes uint8 images

    def teacher(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), autocast(device, dtype):
            features: Sequence[Tensor] = network(prepare(images.to(device)))
            return features

    return teacher


def _finish(job: _Job, outcome: Optional[Outcome], samples: Sequence[Sample], options: TrainingOptions,
            began: float, started: str) -> TrainingResult:
    """Bring the trained detector into its deployed form, set its statistics, and describe it."""
    detector, run = job.detector, job.run
    detector.fold_batch_norm()
    metadata, found = _fit_statistics(job, options)
    warn_of(found)
    warn_of_few(sum(map(len, found.scores.values())), options.false_positive_rate)
    detector.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    report = {
        "classes": class_counts(job.classes, samples, job.inspection.originals, run.training.samples, found, job.rois),
        "image_size": list(options.image_size), "map_cells": map_cells(job.inspection.shapes, detector.map_size),
        "conspicuous": found.conspicuous,
        "steps": run.steps,
        "epochs": round(run.steps / steps_per_epoch(len(run.training)), 2) if run.steps else 1,
        **(asdict(outcome) if outcome else {}),
        "seconds": round(time.monotonic() - began, 1), "device": run.device.type,
        "dtype": str(run.dtype).removeprefix("torch."), "processes": distributed.world_size(),
        "teacher_weights": job.weights_source,
    }
    step = {
        "command": "train", "tool_version": __version__, "images": run.config["images"], "names": names_digest(samples),
        "teacher_weights": job.weights_source, "teacher_weights_digest": run.config["teacher_weights"],
        "started": started, "steps": run.steps, "seed": options.seed, "held_out": options.held_out,
        "dtype": report["dtype"], "processes": report["processes"], "rois": run.config["rois"],
        "teacher_int8": options.target if options.teacher_ranges else None,
    }
    if (packed := pack_originals(job.inspection.originals)) is not None:
        step["originals"] = packed
    metadata = metadata.replace(parameters=count_parameters(detector), macs=count_macs(detector, options.image_size),
                                provenance=[step])
    return TrainingResult(detector, metadata, report)


def _fit_statistics(job: _Job, options: TrainingOptions) -> tuple[Metadata, HeldOut]:
    """Set the statistics of the deployed detector at every size: its metadata, and what held-out images showed."""
    detector, run = job.detector, job.run
    limit, distances = fit_prototypes(detector, job.classes, run)
    metadata = Metadata(
        options.method, options.teacher, job.classes, options.image_size, detector.map_size, threshold=0.0,
        false_positive_rate=options.false_positive_rate, parameters=0, macs=0, options=job.method_options,
        tool_version=__version__, class_distance_limit=limit, good_distances=distances,
        preprocessing={**PREPROCESSING, "grey_bits": job.inspection.grey_bits})
    sizes = sorted(set(options.sizes))[:-1]
    detector.sizes.update({str(entries): Statistics(detector) for entries in sizes})
    found: list[HeldOut] = []

    def fit(model: Model) -> Metadata:
        assert isinstance(model.module, Detector)
        found.append(fit_statistics_from_files(model.module, model.module.raw_maps_and_class, job.classes,
                                               run.held_out.samples, job.reading, run.device))
        return with_found(model.metadata, found[-1])

    model = Model(detector, metadata.with_smaller(
        metadata.replace(options={**job.method_options, "entries": entries}) for entries in sizes))
    return fit_every_size(model, fit).metadata, found[-1]
