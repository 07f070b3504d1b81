"""DCAM: a student that is trained with channel attention (Jena et al., ICPR 2024, arXiv 2405.06467).

The attention masks channels that do not matter for an image. It is used in training only, so the deployed student
costs nothing more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCTION = 8
"""Reduction of the channels in the hidden layer of the attention; as in the authors' code."""


class Attended(nn.Module):
    """The student with attention on each of its feature maps, which have ``channels`` channels."""

    def __init__(self, student: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.student = student
        self.attention = nn.ModuleList(ChannelAttention(count) for count in channels)

    def forward(self, values: Tensor) -> list[Tensor]:
        return [attend(features) for attend, features in zip(self.attention, self.student(values))]


class ChannelAttention(nn.Module):
    """Multiplies each channel of [N, C, h, w] by 0 to 1, from its mean and maximum (Woo et al., ECCV 2018, eq. 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.shared = nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(),
                                    nn.Linear(hidden, channels, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        weights = (self.shared(features.mean((2, 3))) + self.shared(features.amax((2, 3)))).sigmoid()
        weighted: Tensor = features * weights[:, :, None, None]
        return weighted


def spatial_divergence(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """KL divergence of the student's softmax over positions from the teacher's, for feature maps [N, C, h, w].

    Mean over images and channels, summed over the feature maps. The temperature of the softmax is the standard
    deviation of the teacher's feature map, because features differ by a factor of 30 between CNNs. (The authors' code
    sums over channels; their temperature is not known.)
    """
    total = torch.zeros(())
    for teacher_map, student_map in zip(teacher, student):
        positions = [features.float().flatten(2) for features in (teacher_map, student_map)]
        expected, actual = ((values / positions[0].std()).log_softmax(2) for values in positions)
        total = total + F.kl_div(actual, expected, reduction="none", log_target=True).sum(2).mean()
    return total
