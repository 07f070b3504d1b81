"""Training one model for all classes from good images."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from uadtool import __version__
from uadtool.data.dataset import Sample
from uadtool.data.splits import LEAST_HELD_OUT, balanced
from uadtool.errors import UadtoolError
from uadtool.files import file_digest, list_digest
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER
from uadtool.lab.detectors.complexity import count_macs, count_parameters
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.detectors.registry import find_method, method_options
from uadtool.lab.detectors.statistics import fit_prototypes, fit_statistics_from_files
from uadtool.lab.detectors.weights import load_teacher_weights
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES
from uadtool.lab.quantization.ranges import Ranges, ranges_digest
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantization.teacher import quantized_teacher
from uadtool.lab.training import distributed
from uadtool.lab.training.data import Teacher, TeacherFeatures, names_digest, read_images, split_training
from uadtool.lab.training.loop import BATCH_SIZE, Outcome, Run, steps_per_epoch
from uadtool.lab.training.precision import autocast, autocast_dtype, choose_device
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import bounded_scores, threshold_at

log = logging.getLogger("uadtool")


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result of a training run, besides the images.

    ``steps``, batches of 16, replace ``epochs`` when given. ``held_out`` is the share of good images of each class that
    is held out: it chooses the checkpoint and sets the score statistics and the threshold, which held-out images exceed
    at ``false_positive_rate``. ``image_size`` is (height, width). With ``teacher_ranges`` the student learns the
    features of the teacher in int8, as ``target`` rounds it.
    """

    method: str = "stfpm"
    teacher: str = DEFAULT_TEACHER
    teacher_weights: Optional[str] = None
    image_size: tuple[int, int] = (256, 256)
    method_options: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 40
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
    began = time.monotonic()
    torch.manual_seed(options.seed)
    job = _prepare(samples, options, checkpoint, resume)
    outcome = job.detector.fit(job.run)
    if distributed.rank() > 0:
        return None
    held_out_scores = _finish(job)
    return TrainingResult(job.detector, _metadata(job, samples, options, held_out_scores),
                          _report(job, outcome, time.monotonic() - began))


def _prepare(samples: Sequence[Sample], options: TrainingOptions, checkpoint: Path, resume: bool) -> _Job:
    """Build the detector, check that the run is possible, and compute the teacher's features."""
    device = choose_device(options.device)
    dtype = autocast_dtype(device)
    if distributed.any_process(dtype == torch.float32):
        dtype = torch.float32
    classes = sorted({str(sample.class_name) for sample in samples})
    training_samples, held_out_samples = split_training(samples, options.held_out, options.seed)
    _warn_of_small_classes(classes, held_out_samples)
    chosen_options = method_options(options.method, options.method_options)
    config = {**asdict(replace(options, method_options={})),
              **{f"option {name}": value for name, value in chosen_options.items()},
              "teacher_weights": file_digest(options.teacher_weights) if options.teacher_weights else None,
              "teacher_ranges": ranges_digest(options.teacher_ranges) if options.teacher_ranges else None,
              "image_size": list(options.image_size),
              "device": device.type, "dtype": str(dtype),
              "images": list_digest(sample.path for sample in samples)}
    distributed.require_same(config)
    processes, batch_size = distributed.world_size(), min(BATCH_SIZE, len(training_samples))
    if processes > batch_size:
        raise UadtoolError(f"there are more processes ({processes}) than images in a batch ({batch_size}); start at "
                           f"most {batch_size}")

    detector = find_method(options.method)(options.teacher, options.image_size, len(classes), **chosen_options)
    pretrained = detector.pretrained()
    weights_source = load_teacher_weights(pretrained, options.teacher, options.teacher_weights)
    log.info("teacher %s with weights of %s", options.teacher, weights_source)
    distributed.copy_first(detector)
    detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pretrained.to(device).eval().requires_grad_(False)

    teacher = (_int8_teacher(detector, options, training_samples, device) if options.teacher_ranges
               else _float_teacher(detector, device, dtype))
    training, held_out = (
        TeacherFeatures(part, options.image_size, teacher, distributed.own_cores(), len(samples))
        for part in (training_samples, held_out_samples))
    steps = options.steps or options.epochs * steps_per_epoch(len(training))
    run = Run(training, held_out, steps, options.seed, device, dtype, checkpoint, config, resume)
    return _Job(detector, classes, chosen_options, weights_source, run)


def _warn_of_small_classes(classes: Sequence[str], held_out: Sequence[Sample]) -> None:
    counts = Counter(sample.class_name for sample in held_out)
    small = [name for name in classes if counts[name] < LEAST_HELD_OUT]
    if small:
        log.warning("too few good images to learn what is normal: %s; such a class may score as anomalous throughout, "
                    "or not at all; give it at least %d", ", ".join(small), 2 * LEAST_HELD_OUT)


def _float_teacher(detector: Detector, device: torch.device, dtype: torch.dtype) -> Teacher:
    network = detector.pretrained()

    def teacher(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), autocast(device, torch.float32 if detector.float_teacher else dtype):
            features: Sequence[Tensor] = network(detector.prepare(images.to(device)))
            return features

    return teacher


def _int8_teacher(detector: Detector, options: TrainingOptions, samples: Sequence[Sample],
                  device: torch.device) -> Teacher:
    """The ``quantized_teacher``, its biases corrected with images of the samples."""
    assert options.teacher_ranges is not None
    correction_samples = balanced(list(samples), CORRECTION_IMAGES, options.seed)
    images = read_images(correction_samples, options.image_size, distributed.own_cores())
    network = quantized_teacher(detector, options.teacher_ranges, TARGETS[options.target], images.to(device))

    def teacher(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            features: Sequence[Tensor] = network(images.to(device))
            return features

    return teacher


def _finish(job: _Job) -> list[float]:
    """Bring the trained detector into its deployed form, in place; returns the scores of the held-out images."""
    detector, run = job.detector, job.run
    detector.fold_batch_norm()
    fit_prototypes(detector, job.classes, run.training)
    scores = fit_statistics_from_files(detector, detector.raw_maps_and_class, job.classes, run.held_out.samples,
                                       run.held_out.image_size, run.device)
    detector.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return scores


def _report(job: _Job, outcome: Outcome, seconds: float) -> dict[str, Any]:
    run = job.run
    training, held_out = (Counter(sample.class_name for sample in images.samples)
                          for images in (run.training, run.held_out))
    return {
        "classes": {name: {"training": training[name], "held_out": held_out[name]} for name in job.classes},
        "steps": run.steps, "epochs": round(run.steps / steps_per_epoch(len(run.training)), 2),
        "best_step": outcome.best_step, "held_out_loss": outcome.held_out_loss, "seconds": round(seconds, 1),
        "device": run.device.type, "dtype": _dtype_name(run), "processes": distributed.world_size(),
        "teacher_weights": job.weights_source,
    }


def _metadata(job: _Job, samples: Sequence[Sample], options: TrainingOptions, held_out_scores: list[float]) -> Metadata:
    detector, run = job.detector, job.run
    step = {"command": "train", "tool_version": __version__, "images": run.config["images"],
            "names": names_digest(samples),
            "teacher_weights": job.weights_source, "teacher_weights_digest": run.config["teacher_weights"],
            "steps": run.steps, "seed": options.seed,
            "held_out": options.held_out, "dtype": _dtype_name(run), "processes": distributed.world_size(),
            "teacher_int8": options.target if options.teacher_ranges else None}
    return Metadata(
        method=options.method, teacher=options.teacher, classes=job.classes, image_size=options.image_size,
        map_size=detector.map_size, threshold=threshold_at(held_out_scores, options.false_positive_rate),
        false_positive_rate=options.false_positive_rate, good_scores=bounded_scores(held_out_scores),
        parameters=count_parameters(detector), macs=count_macs(detector, options.image_size),
        options=job.method_options, tool_version=__version__, provenance=[step])


def _dtype_name(run: Run) -> str:
    return str(run.dtype).removeprefix("torch.")
