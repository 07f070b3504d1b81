"""The contract of every detector: uint8 images in, normalised scores and anomaly maps out, all of it in the graph."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typing_extensions import Self

from uadtool.lab.training.loop import Outcome, Run

SCORE_SHARE = 0.01
"""The image score is the mean of this share of the anomaly map, its highest values (as in Dinomaly, CVPR 2025)."""
PATCH = 2
"""What good images of a class show at a position is known for patches of this many map pixels, squared."""
SMOOTHING = 4.0
"""Standard deviation of the Gaussian that smooths maps, in pixels of the input (as in the authors' code of RD)."""
STATISTICS = ("expected_maps", "map_spreads", "score_mean", "score_std")
"""The buffers that normalise maps and scores."""


class OutputTensors(NamedTuple):
    """What a detector says about a batch; the names and the order of the outputs of an exported graph."""

    score: Tensor
    """float32 [N]: standard deviations above the mean of good images of the nearest class."""
    raw_score: Tensor
    """float32 [N]: the score before any normalisation, in the method's own units."""
    anomaly_map: Tensor
    """float32 [N, h, w] in the units of the score, which is the mean of its highest hundredth."""
    nearest_class: Tensor
    """int32 [N]: index of the class whose prototype is nearest."""


class Detector(nn.Module, ABC):
    """A method's networks plus what all methods share: pixel normalisation, class statistics, the image score.

    A subclass computes raw maps, one or more, and descriptors, and trains itself.
    No class label is used at run time. The nearest class prototype (mean descriptor of the class's good training
    images) chooses what good images of that class show: ``expected_maps`` and ``map_spreads``, mean and spread of each
    raw map at each position (a student is always wrong about the rim of a part). What is left of the maps is summed:
    that makes positions, and maps of different kinds, comparable. ``score_mean`` and ``score_std`` of what remains
    make the classes comparable.

    Args:
        classes: how many prototypes there are.
        descriptor_size: length of the descriptor.
        map_size: (height, width) of the anomaly map.
        mean, std: of pixel values in 0..1, per RGB channel, as the teacher expects them.
        maps: how many raw maps there are.
    """

    trained: ClassVar[str] = "student"
    """Name of the network that is trained: what int8 of scope ``student`` and quantization-aware training change."""
    float_teacher: ClassVar[bool] = False
    """Training needs the teacher's features in fp32, also where bfloat16 would be faster."""
    teacher: fx.GraphModule
    """The network whose features decide what is anomalous."""
    pixel_mean: Tensor
    pixel_scale: Tensor
    prototypes: Tensor
    descriptor_scale: Tensor
    expected_maps: Tensor
    map_spreads: Tensor
    score_mean: Tensor
    score_std: Tensor

    def __init__(self, classes: int, descriptor_size: int, map_size: tuple[int, int], mean: list[float],
                 std: list[float], maps: int = 1) -> None:
        super().__init__()
        self.map_size = map_size
        self.register_buffer("pixel_mean", 255 * _per_channel(mean))
        self.register_buffer("pixel_scale", 1 / (255 * _per_channel(std)))
        self.register_buffer("prototypes", torch.zeros(classes, descriptor_size))
        self.register_buffer("descriptor_scale", torch.ones(descriptor_size))
        grid = classes, maps, *(math.ceil(side / PATCH) for side in map_size)
        self.register_buffer("expected_maps", torch.zeros(grid))
        self.register_buffer("map_spreads", torch.ones(grid))
        self.register_buffer("score_mean", torch.zeros(classes))
        self.register_buffer("score_std", torch.ones(classes))

    @abstractmethod
    def fit(self, run: Run) -> Outcome:
        """Train all that is not ``pretrained()``, in place."""

    def fold_batch_norm(self: Self) -> Self:
        """Turn the trained networks into their deployed form, in place."""
        return self.eval()

    def pretrained(self) -> fx.GraphModule:
        """The network whose features training uses; it is given ImageNet weights."""
        return self.teacher

    @abstractmethod
    def raw_maps_and_descriptor(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """From normalised pixels [N, 3, H, W]: the raw anomaly maps [N, M, h, w], >= 0, and the descriptor [N, D]."""

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] as the teacher expects it."""
        # Not permute first: TensorRT transposes no uint8.
        return (image.float().permute(0, 3, 1, 2) - self.pixel_mean) * self.pixel_scale

    def prepare(self, image: Tensor) -> Tensor:
        """``normalize`` in the memory layout in which training is fastest."""
        return self.normalize(image).contiguous(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> OutputTensors:
        """uint8 [N, H, W, 3], RGB -> scores and maps."""
        raw, nearest = self.raw_maps_and_class(image)
        anomaly_map = self.normalize_maps(raw, nearest)
        return OutputTensors(self.image_score(anomaly_map), self.image_score(raw.sum(1)), anomaly_map, nearest.int())

    def raw_maps_and_class(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """From uint8 [N, H, W, 3]: the raw anomaly maps [N, M, h, w] and the index of the nearest class, int64 [N]."""
        raw, descriptor = self.raw_maps_and_descriptor(self.normalize(image))
        return raw, self.nearest_class(descriptor)

    def nearest_class(self, descriptor: Tensor) -> Tensor:
        """Index [N] of the prototype at the smallest scaled Euclidean distance from the descriptor [N, D]."""
        differences = (descriptor[:, None] - self.prototypes) * self.descriptor_scale
        return differences.square().sum(2).argmin(1)

    def standardize_maps(self, raw: Tensor, nearest: Tensor) -> Tensor:
        """Raw maps [N, M, h, w] of images of the classes ``nearest`` [N] -> in units of what good images show there."""
        return standardize(raw, self.expected_maps[nearest], self.map_spreads[nearest])

    def normalize_maps(self, raw: Tensor, nearest: Tensor) -> Tensor:
        """Raw maps [N, M, h, w] of images of the classes ``nearest`` [N] -> [N, h, w], in units of good scores."""
        mean, std = self.score_mean[nearest][:, None, None], self.score_std[nearest][:, None, None]
        return (self.standardize_maps(raw, nearest).sum(1) - mean) / std

    def image_score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the highest hundredth of each map: [N, h, w] -> [N]."""
        count = max(1, round(SCORE_SHARE * self.map_size[0] * self.map_size[1]))
        return anomaly_map.flatten(1).topk(count, dim=1).values.mean(1)


class Smoothing(nn.Module):
    """A Gaussian over maps [N, M, h, w], up to three standard deviations from the centre.

    Args:
        maps: M.
        scale: length of the map in that of the input.
    """

    kernel: Tensor

    def __init__(self, maps: int, scale: float) -> None:
        super().__init__()
        deviation = SMOOTHING * scale
        self.maps, self.margin = maps, max(1, round(3 * deviation))
        line = torch.exp(-torch.arange(-self.margin, self.margin + 1).square() / (2 * deviation**2))
        kernel = line[:, None] * line
        self.register_buffer("kernel", (kernel / kernel.sum()).repeat(maps, 1, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        margins = (self.margin, self.margin, self.margin, self.margin)
        return F.conv2d(F.pad(maps, margins, mode="replicate"), self.kernel, groups=self.maps)


@fx.wrap  # one node in every traced graph, whose input are the raw maps
def standardize(raw: Tensor, expected: Tensor, spread: Tensor) -> Tensor:
    """Deviation of [N, M, h, w] from what is expected, in units of the spread; both are known on a coarser grid."""
    expected, spread = (F.interpolate(grid, size=raw.shape[2:], mode="bilinear", align_corners=False)
                        for grid in (expected, spread))
    return (raw - expected) / spread


def pooled_descriptor(features: Sequence[Tensor]) -> Tensor:
    """Spatial mean of each channel of each feature map, concatenated: [N, D]."""
    return torch.cat([f.mean((2, 3)) for f in features], dim=1)


def _per_channel(values: list[float]) -> Tensor:
    """[1, 3, 1, 1], or [] when all channels agree: ONNX Runtime is ten times slower with three values than with one."""
    return torch.tensor(values).view(1, 3, 1, 1) if len(set(values)) > 1 else torch.tensor(values[0])
