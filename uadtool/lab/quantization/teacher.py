"""Quantize first, distil second: a student that learns the rounded features of the teacher takes them for normal."""

import copy

from torch import Tensor, fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import fold_batch_norm
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target


class _Teacher(nn.Module):
    """Images -> the teacher's feature maps. Its points have the names that they have in the detector's graph."""

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
        ranges: of a detector with the same teacher; those of its student are not used.
        images: good ones, uint8 [N, H, W, 3], to correct the biases with.

    Raises:
        UadtoolError: the ranges are of another teacher.
    """
    network = _Teacher(detector)
    names = QuantizableGraph(network).points.values()
    others = [name for name in ranges if name.startswith("teacher_") and name not in names]
    if others:
        raise UadtoolError(f"the ranges are of another teacher, which has {others[0]!r}; run calibrate again")
    return quantize(network, {name: ranges[name] for name in names if name in ranges}, target, images=images)
