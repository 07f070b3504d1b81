"""Quantize first, distil second: a student that learns the rounded features of the teacher treats them as normal."""

import copy

from torch import Tensor, fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import fold_batch_norm
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target


class _Teacher(nn.Module):
    """Images -> the teacher's feature maps. Its points have the same names as in the detector's graph."""

    pixel_mean: Tensor
    pixel_scale: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.teacher = fold_batch_norm(copy.deepcopy(detector.pretrained()).eval())
        self.register_buffer("pixel_mean", detector.pixel_mean)
        self.register_buffer("pixel_scale", detector.pixel_scale)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.teacher(Detector.normalize(self, image)))  # type: ignore[arg-type]


def quantized_teacher(detector: Detector, ranges: Ranges, target: Target, images: Tensor) -> fx.GraphModule:
    """The detector's teacher as ``quantize`` rounds it: uint8 [N, H, W, 3] -> its feature maps [N, C, h, w].

    Args:
        ranges: of a detector with the same teacher; the ranges of its student are ignored.
        images: good images, uint8 [N, H, W, 3], to correct the biases with.

    Raises:
        UadtoolError: the ranges belong to another teacher.
    """
    plan = QuantizationPlan(_Teacher(detector))
    points = plan.points.values()
    unknown = [name for name in ranges if name.startswith("teacher_") and name not in points]
    if unknown:
        raise UadtoolError(f"the ranges belong to another teacher, which has {unknown[0]!r}; run calibrate again")
    teacher_ranges = {name: ranges[name] for name in points if name in ranges}
    return quantize(plan, teacher_ranges, target, correction=BiasCorrection(plan, images))
