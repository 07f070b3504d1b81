"""The contract of every detector: uint8 images in, normalised scores and anomaly maps out, all of it in the graph."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

SCORE_SHARE = 0.05
"""The image score is the mean of this share of the anomaly map, its highest values. With 0.01 (Dinomaly's share) our
seven classes had a mean image AUROC of 0.70, with 0.05 of 0.72; the maximum, as in STFPM, gave 0.62."""


class Output(NamedTuple):
    """What a detector says about a batch; the names and the order of the outputs of an exported graph."""

    score: Tensor
    """float32 [N]: standard deviations above the mean of good images of the nearest class."""
    anomaly_map: Tensor
    """float32 [N, h, w] in the same units; the score is the mean of its highest twentieth."""
    nearest_class: Tensor
    """int32 [N]: index of the class whose prototype is nearest."""


class Detector(nn.Module, ABC):
    """A method's networks plus what all methods share: pixel normalisation, class statistics, the image score.

    No class label is used at run time: the nearest class prototype (mean descriptor of the class's good training
    images) chooses the mean and the standard deviation of the raw score that make scores of all classes comparable.
    A subclass computes raw maps and descriptors, and the loss that trains it.

    Args:
        classes: how many prototypes there are.
        descriptor_size: length of the descriptor.
        map_size: (height, width) of the anomaly map.
        mean, std: of pixel values in 0..1, per RGB channel, as the teacher expects them.
    """

    pixel_mean: Tensor
    pixel_scale: Tensor
    prototypes: Tensor
    descriptor_scale: Tensor
    score_mean: Tensor
    score_std: Tensor

    def __init__(self, classes: int, descriptor_size: int, map_size: tuple[int, int], mean: list[float],
                 std: list[float]) -> None:
        super().__init__()
        self.map_size = map_size
        self.register_buffer("pixel_mean", 255 * _per_channel(mean))
        self.register_buffer("pixel_scale", 1 / (255 * _per_channel(std)))
        self.register_buffer("prototypes", torch.zeros(classes, descriptor_size))
        self.register_buffer("descriptor_scale", torch.ones(descriptor_size))
        self.register_buffer("score_mean", torch.zeros(classes))
        self.register_buffer("score_std", torch.ones(classes))

    @abstractmethod
    def raw_map_and_descriptor(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """From normalised pixels [N, 3, H, W]: the raw anomaly map [N, h, w], >= 0, and the descriptor [N, D]."""

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] as the teacher expects it."""
        return (image.permute(0, 3, 1, 2).float() - self.pixel_mean) * self.pixel_scale

    def forward(self, image: Tensor) -> Output:
        """uint8 [N, H, W, 3], RGB -> scores and maps."""
        raw, descriptor = self.raw_map_and_descriptor(self.normalize(image))
        nearest = self.nearest_class(descriptor)
        mean, std = self.score_mean[nearest], self.score_std[nearest]
        anomaly_map = (raw - mean[:, None, None]) / std[:, None, None]
        return Output(self.image_score(anomaly_map), anomaly_map, nearest.int())

    def nearest_class(self, descriptor: Tensor) -> Tensor:
        """Index [N] of the prototype at the smallest scaled Euclidean distance from the descriptor [N, D]."""
        prototypes = self.prototypes * self.descriptor_scale
        # |d - p|^2 = |d|^2 - 2 d.p + |p|^2, and |d|^2 is the same for every prototype
        closeness = 2 * (descriptor * self.descriptor_scale) @ prototypes.T - prototypes.square().sum(1)
        return closeness.argmax(1)

    def image_score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the highest twentieth of each map: [N, h, w] -> [N]."""
        count = max(1, round(SCORE_SHARE * self.map_size[0] * self.map_size[1]))
        return anomaly_map.flatten(1).topk(count, dim=1).values.mean(1)


def _per_channel(values: list[float]) -> Tensor:
    """[1, 3, 1, 1], or [] when all channels agree: ONNX Runtime is ten times slower with three values than with one."""
    return torch.tensor(values).view(1, 3, 1, 1) if len(set(values)) > 1 else torch.tensor(values[0])
