"""Reverse Distillation (Deng and Li, CVPR 2022, arXiv 2201.10703).

The student reconstructs the teacher's feature maps through a bottleneck that blocks patterns unseen in training. Where
teacher and student differ, there is an anomaly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import build_backbone, check_size, feature_shapes, normalization
from uadtool.lab.detectors.contract import Detector, Smoothing
from uadtool.lab.detectors.stfpm import distance_maps, distillation_loss
from uadtool.lab.training.loop import Outcome, Run

LEAST_WIDTH = 0.125
LEARNING_RATE, BETAS, WEIGHT_DECAY = 5e-3, (0.5, 0.999), 1e-5
"""As in arXiv 2407.02968 (table 1) and the authors' code."""


class ReverseDistillation(Detector):
    """Teacher, bottleneck and decoder.

    Args:
        teacher: name of a timm CNN.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        width: channels of the decoder's stages, relative to the feature maps that they give.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, the width is too small, or a side is not a multiple of 32.
    """

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, width: float = 2.0) -> None:
        check_size("rd", image_size, 32)
        if width < LEAST_WIDTH:
            raise UadtoolError(f"the option width of rd must be at least {LEAST_WIDTH}, not {width:g}")
        backbone = build_backbone(teacher, image_size)
        shapes = feature_shapes(backbone, image_size)
        channels, map_size = [shape[0] for shape in shapes], shapes[0][1:]
        super().__init__(classes, sum(channels), map_size, *normalization(teacher), maps=3)
        self.teacher = backbone
        self.student: nn.Module = Student(channels, width)
        self.smooth = Smoothing(3, map_size[0] / image_size[0])

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        maps = distance_maps(features, self.student(features[0], features[1], features[2]), self.map_size)
        smooth: Tensor = self.smooth(maps)
        return smooth

    def fit(self, run: Run) -> Outcome:
        optimizer = torch.optim.Adam(self.student.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)

        def loss(images: Tensor, features: Sequence[Tensor]) -> Tensor:
            return distillation_loss(features, self.student(*features))

        return run.distill(self.student, optimizer, loss)

    def fold_batch_norm(self) -> "ReverseDistillation":
        if isinstance(self.student, Student):
            self.student = fx.symbolic_trace(self.student)
        return super().fold_batch_norm()


class Student(nn.Module):
    """Bottleneck and decoder: feature maps at strides 4, 8 and 16 -> one map at stride 32 -> the same feature maps.

    The decoder enlarges by nearest neighbours and convolves, instead of the paper's transposed convolutions: every
    runtime has this in integers, and it avoids checkerboard patterns.
    """

    def __init__(self, channels: Sequence[int], width: float) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.shrink_fine = nn.Sequential(_convolution(fine, middle, stride=2), _convolution(middle, coarse, stride=2))
        self.shrink_middle = _convolution(middle, coarse, stride=2)
        self.fuse = _convolution(3 * coarse, coarse, size=1)
        self.squeeze = nn.Sequential(_convolution(coarse, 2 * coarse, stride=2), _convolution(2 * coarse, 2 * coarse))
        sizes = [round(width * count) for count in channels]
        self.coarse = nn.Sequential(_convolution(2 * coarse, sizes[2]), _convolution(sizes[2], sizes[2]))
        self.middle = nn.Sequential(_convolution(sizes[2], sizes[1]), _convolution(sizes[1], sizes[1]))
        self.fine = nn.Sequential(_convolution(sizes[1], sizes[0]), _convolution(sizes[0], sizes[0]))
        self.give_coarse = nn.Conv2d(sizes[2], coarse, 1)
        self.give_middle = nn.Conv2d(sizes[1], middle, 1)
        self.give_fine = nn.Conv2d(sizes[0], fine, 1)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = torch.cat([self.shrink_fine(fine), self.shrink_middle(middle), coarse], dim=1)
        stage_16 = self.coarse(_enlarge(self.squeeze(self.fuse(joined))))
        stage_8 = self.middle(_enlarge(stage_16))
        stage_4 = self.fine(_enlarge(stage_8))
        return self.give_fine(stage_4), self.give_middle(stage_8), self.give_coarse(stage_16)


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs),
                         nn.ReLU())


def _enlarge(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2.0, mode="nearest")
