"""STFPM: Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021, arXiv 2103.04257).

The student, an untrained copy of the teacher, learns to give the teacher's feature maps on good images; where it
fails, there is an anomaly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.detectors.backbones import build_backbone, fold_batch_norm, normalization
from uadtool.detectors.base import Detector

FUSIONS = ("sum", "product")


class STFPM(Detector):
    """Teacher and student, three feature maps each.

    Args:
        teacher: name of a timm CNN; the student has the same architecture.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        fusion: how the three maps become one, ``product`` as in the paper or ``sum``.
    """

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, fusion: str = "sum") -> None:
        networks = build_backbone(teacher, image_size), build_backbone(teacher, image_size)
        with torch.no_grad():
            features = networks[0].eval()(torch.zeros(1, 3, *image_size))
        map_size = (features[0].shape[2], features[0].shape[3])
        super().__init__(classes, sum(f.shape[1] for f in features), map_size, *normalization(teacher))
        self.teacher, self.student = networks
        self.fusion = fusion

    def fold_batch_norm(self) -> "STFPM":
        """Turn trained networks into their deployed form, in place."""
        self.eval()
        fold_batch_norm(self.teacher)
        fold_batch_norm(self.student)
        return self

    def raw_map_and_descriptor(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = self.teacher(pixels), self.student(pixels)
        maps = [cosine_distance(t, s) for t, s in zip(teacher, student)]
        fused = maps[0]
        for one in maps[1:]:
            one = F.interpolate(one, size=self.map_size, mode="bilinear", align_corners=False)
            fused = fused + one if self.fusion == "sum" else fused * one
        return fused.squeeze(1), describe(teacher)


def describe(features: Sequence[Tensor]) -> Tensor:
    """Spatial mean of each channel of each feature map, concatenated: [N, D]."""
    return torch.cat([f.mean((2, 3)) for f in features], dim=1)


def cosine_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the squared distance of channel-wise L2-normalised feature maps (eq. 1): [N, C, h, w] -> [N, 1, h, w].

    |t/|t| - s/|s||^2 / 2 = 1 - t.s / (|t| |s|), in 0..2.
    """
    # Channels last: every runtime sums fastest over the last axis, and quantized feature maps already lie so.
    t, s = teacher.permute(0, 2, 3, 1), student.permute(0, 2, 3, 1)
    norms = (t * t).sum(-1) * (s * s).sum(-1)
    return (1 - (t * s).sum(-1) * norms.clamp(min=1e-24).rsqrt()).unsqueeze(1)


def distillation_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over positions of the cosine distance, summed over the feature maps (eq. 2-3)."""
    return sum((cosine_distance(t.float(), s.float()).mean() for t, s in zip(teacher, student)), torch.zeros(()))
