"""Training one model for all classes from good images."""

import logging
import time
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
from uadtool.lab.detectors.statistics import fit_from_files, fit_prototypes
from uadtool.lab.detectors.weights import load_teacher_weights
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES
from uadtool.lab.quantization.ranges import Ranges, ranges_digest
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.quantization.teacher import quantized_teacher
from uadtool.lab.training import distributed
from uadtool.lab.training.data import Teacher, TeacherFeatures, names_digest, read_images, split_training
from uadtool.lab.training.loop import BATCH_SIZE, Run, steps_per_epoch
from uadtool.lab.training.precision import autocast, autocast_dtype, choose_device
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import bounded_scores, threshold_at

log = logging.getLogger("uadtool")


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the result of a training run, besides the images.

    ``steps``, batches of 16, count instead of ``epochs`` where they are given. ``held_out`` is the share of good images
    of each class that is not trained on but chooses the checkpoint and sets the score statistics and the threshold,
    which held-out images exceed at ``false_positive_rate``. ``image_size`` is (height, width). With ``teacher_ranges``
    the student learns the features of the teacher in int8, as ``target`` rounds it.
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
    """The deployed detector (batch norm folded, on the CPU), its metadata, and how training went."""

    detector: Detector
    metadata: Metadata
    report: dict[str, Any]


def train(samples: Sequence[Sample], options: TrainingOptions, checkpoint: Path,
          resume: bool = False) -> Optional[TrainingResult]:
    """Train a detector for all classes of the samples; their labels are used for the score statistics alone.

    Of processes that train together (``distributed.process_group``) the first one finishes the detector, the others
    return None.

    Args:
        samples: good images, each with a class, as ``dataset.training_samples`` gives them.
        checkpoint: file that holds the state of the run while it lasts; the caller removes it once it
            has saved the result.
        resume: go on from the checkpoint, if there is one, to the result that an uninterrupted run gives.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, its weights cannot be had, an image cannot be read, or the
            checkpoint is of another run; or processes that train together do not agree in what on, or are too many.
        KeyboardInterrupt: a signal came; the checkpoint is written.
    """
    began = time.monotonic()
    device = choose_device(options.device)
    dtype = autocast_dtype(device)
    if distributed.any_of_them(dtype == torch.float32):
        dtype = torch.float32
    torch.manual_seed(options.seed)
    classes = sorted({str(sample.class_name) for sample in samples})
    chosen = method_options(options.method, options.method_options)
    rest, held_out_samples = split_training(samples, options.held_out, options.seed)
    few = [name for name in classes if sum(s.class_name == name for s in held_out_samples) < LEAST_HELD_OUT]
    if few:
        log.warning("too few good images to tell what is usual: %s; all images of such a class may be anomalous to the "
                    "model, or none; give it %d or more", ", ".join(few), 2 * LEAST_HELD_OUT)
    images_digest = list_digest(sample.path for sample in samples)
    config = {**asdict(replace(options, method_options={})), **{f"option {k}": v for k, v in chosen.items()},
              "teacher_weights": file_digest(options.teacher_weights) if options.teacher_weights else None,
              "teacher_ranges": ranges_digest(options.teacher_ranges) if options.teacher_ranges else None,
              "image_size": list(options.image_size),
              "device": device.type, "dtype": str(dtype),
              "images": images_digest}
    distributed.require_same(config)
    processes, batch_size = distributed.world_size(), min(BATCH_SIZE, len(rest))
    if processes > batch_size:
        raise UadtoolError(f"there are more processes ({processes}) than images in a batch ({batch_size}); start at "
                           f"most {batch_size}")
    detector = find_method(options.method)(options.teacher, options.image_size, len(classes), **chosen)
    pretrained = detector.pretrained()
    weights = load_teacher_weights(pretrained, options.teacher, options.teacher_weights)
    log.info("teacher %s with weights of %s", options.teacher, weights)
    distributed.copy_first(detector)
    detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pretrained.to(device).eval().requires_grad_(False)

    def float_teacher(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), autocast(device, torch.float32 if detector.float_teacher else dtype):
            features: Sequence[Tensor] = pretrained(detector.prepare(images.to(device)))
            return features

    teacher = _int8_teacher(detector, options, rest, device) if options.teacher_ranges else float_teacher
    training, held_out = (TeacherFeatures(part, options.image_size, teacher, distributed.own_cores(), len(samples))
                          for part in (rest, held_out_samples))
    steps = options.steps or options.epochs * steps_per_epoch(len(training))
    outcome = detector.fit(Run(training, held_out, steps, options.seed, device, dtype, checkpoint, config, resume))
    if distributed.rank() > 0:
        return None
    detector.fold_batch_norm()
    fit_prototypes(detector, classes, training)
    scores = fit_from_files(detector, detector.raw_maps_and_class, classes, held_out_samples, options.image_size,
                             device)
    detector.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    report = {
        "classes": {name: {"training": sum(s.class_name == name for s in rest),
                           "held_out": sum(s.class_name == name for s in held_out_samples)} for name in classes},
        "steps": steps, "epochs": round(steps / steps_per_epoch(len(training)), 2), "best_step": outcome.best_step,
        "held_out_loss": outcome.held_out_loss, "seconds": round(time.monotonic() - began, 1),
        "device": device.type, "dtype": str(dtype).removeprefix("torch."), "processes": processes,
        "teacher_weights": weights,
    }
    metadata = Metadata(
        method=options.method, teacher=options.teacher, classes=classes, image_size=options.image_size,
        map_size=detector.map_size, threshold=threshold_at(scores, options.false_positive_rate),
        false_positive_rate=options.false_positive_rate, good_scores=bounded_scores(scores),
        parameters=count_parameters(detector), macs=count_macs(detector, options.image_size),
        options=chosen, tool_version=__version__,
        provenance=[{"command": "train", "tool_version": __version__, "images": images_digest,
                     "names": names_digest(samples),
                     "teacher_weights": weights, "teacher_weights_digest": config["teacher_weights"],
                     "steps": steps, "seed": options.seed,
                     "held_out": options.held_out, "dtype": report["dtype"], "processes": processes,
                     "teacher_int8": options.target if options.teacher_ranges else None}],
    )
    return TrainingResult(detector, metadata, report)


def _int8_teacher(detector: Detector, options: TrainingOptions, samples: Sequence[Sample],
                  device: torch.device) -> Teacher:
    """``quantized_teacher``, its biases corrected with images of the samples."""
    assert options.teacher_ranges is not None
    chosen = balanced(list(samples), CORRECTION_IMAGES, options.seed)
    images = read_images(chosen, options.image_size, distributed.own_cores())
    model = quantized_teacher(detector, options.teacher_ranges, TARGETS[options.target], images.to(device))

    def teacher(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            features: Sequence[Tensor] = model(images.to(device))
            return features

    return teacher
