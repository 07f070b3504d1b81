"""A detection method in 30 lines: how unusual is each channel of the teacher's features at stride 8?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from uadtool.lab.detectors.backbones import build_backbone, feature_shapes, normalization
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.training.loop import Run


class Gaussian(Detector):
    """Mean squared deviation of each channel from the training images, in units of its variance (floor: ``least``)."""

    one_pass = True
    mean: Tensor
    weight: Tensor

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, least: float = 1e-3) -> None:
        backbone = build_backbone(teacher, image_size)
        shapes = feature_shapes(backbone, image_size)
        channels, height, width = shapes[1]
        super().__init__(classes, sum(shape[0] for shape in shapes), (height, width), *normalization(teacher))
        self.teacher, self.least = backbone, least
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("weight", torch.ones(1, channels, 1, 1))

    def fit(self, run: Run) -> None:
        values = torch.cat([features[1].float() for _, features in run.training.batches()])
        self.mean.copy_(values.mean((0, 2, 3), keepdim=True))
        self.weight.copy_(1 / values.var((0, 2, 3), keepdim=True).clamp(min=self.least))

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        return ((features[1] - self.mean).square() * self.weight).mean(1, keepdim=True)
