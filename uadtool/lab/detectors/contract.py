"""The contract of every detector: uint8 images in, normalised scores and anomaly maps out, all inside the graph."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typing_extensions import Self

from uadtool.lab.detectors.backbones import fold_batch_norm, traced
from uadtool.lab.training.loop import Outcome, Run
from uadtool.scoring.anomaly_maps import OUTSIDE

SCORE_SHARE = 0.01
"""The image score is the mean of this share of the anomaly map, its highest values (Dinomaly, CVPR 2025)."""
PATCH = 2
"""Side, in map pixels, of the patches that map statistics are kept for."""
SMOOTHING = 4.0
"""Standard deviation of the Gaussian that smooths maps, in pixels of the input (as in the authors' code of RD)."""
STATISTICS = ("expected_maps", "map_spreads", "score_mean", "score_std")
"""The buffers that normalise maps and scores."""
EXAMPLES = "examples"
"""The buffer of descriptors that tell whether a later class would take images of an earlier one; in no other file."""
EXAMPLE_COUNT = 16
"""Descriptors of each class; those of few images are repeated."""
ROI = "roi"
"""The buffer of the regions of interest."""
ROWS = (*STATISTICS, "prototypes", "distance_mean", "distance_std", ROI, EXAMPLES)
"""The buffers with a row for each class; ``rows`` names those of other modules."""


class OutputTensors(NamedTuple):
    """The outputs for a batch; an exported graph has the same names in the same order."""

    score: Tensor
    """float32 [N]: standard deviations above the mean of good images of the nearest class."""
    raw_score: Tensor
    """float32 [N]: the score before any normalisation, in the method's own units."""
    anomaly_map: Tensor
    """float32 [N, h, w] in the units of the score, which is the mean of its highest hundredth; ``OUTSIDE`` where the
    region of interest of the nearest class ends."""
    nearest_class: Tensor
    """int32 [N]: index of the class whose prototype is nearest."""
    class_distance: Tensor
    """float32 [N]: standard deviations above the mean distance of that class's good images to the prototype."""


class Detector(nn.Module, ABC):
    """A method's networks plus what all methods share: pixel normalisation, class statistics, the image score.

    A subclass computes one or more raw maps, and trains its networks.
    No class label is used at run time: the nearest class prototype (mean descriptor of the class's good training
    images) selects what the detector knows of the class, such as its statistics. ``expected_maps`` and ``map_spreads``,
    the mean and spread of each raw map at each position (a student is always wrong about the rim of a part),
    standardise the maps. This makes positions, and maps of different kinds, comparable; then the maps are summed.
    ``score_mean`` and ``score_std`` of the sum make the classes comparable. ``distance_mean`` and ``distance_std`` do
    so for the distance to the prototype, which is large for images of unknown classes. ``roi`` is true at the
    positions that count.

    Args:
        classes: number of prototypes.
        descriptor_size: channels of all feature maps.
        map_size: (height, width) of the anomaly map.
        mean, std: of pixel values in 0..1, per RGB channel, as the teacher expects them.
        maps: number of raw maps.
    """

    trained_network: ClassVar[str] = "student"
    """Name of the submodule that int8 of scope ``student`` and quantization-aware training change."""
    float_teacher: ClassVar[bool] = False
    """Training requires the teacher's features in fp32, even where bfloat16 would be faster."""
    one_pass: ClassVar[bool] = False
    """Training takes no steps, but sees each image once."""
    alters_images: ClassVar[bool] = False
    """Steps alter the images and compute the features of the result, so those of the images need not stay in memory."""
    teacher: fx.GraphModule
    """The network whose features the maps are computed from."""
    pixel_mean: Tensor
    pixel_scale: Tensor
    prototypes: Tensor
    descriptor_scale: Tensor
    expected_maps: Tensor
    map_spreads: Tensor
    score_mean: Tensor
    score_std: Tensor
    distance_mean: Tensor
    distance_std: Tensor
    roi: Tensor

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
        self.register_buffer(EXAMPLES, torch.zeros(classes, EXAMPLE_COUNT, descriptor_size))
        self.register_buffer("distance_mean", torch.zeros(classes))
        self.register_buffer("distance_std", torch.ones(classes))
        self.register_buffer(ROI, torch.ones(classes, *map_size, dtype=torch.bool))
        self.sizes = nn.ModuleDict()
        """The ``Statistics`` of banks with fewer entries, by their number (``Metadata.sizes``)."""

    def set_rois(self, classes: Sequence[str], rois: Mapping[str, NDArray[np.bool_]]) -> None:
        """Set the regions of interest, bool [h, w] by class, of classes in the order of the prototypes."""
        for name, roi in rois.items():
            self.roi[classes.index(name)] = torch.from_numpy(roi)

    @abstractmethod
    def fit(self, run: Run) -> Optional[Outcome]:
        """Train everything except ``pretrained()``, in place; None if no steps were taken."""

    def fold_batch_norm(self: Self) -> Self:
        """Turn the trained networks into their deployed form, in place: in graphs, batch norms are folded."""
        self.eval()
        for network in self.children():
            if isinstance(network, fx.GraphModule):
                fold_batch_norm(network)
        return self

    def pretrained(self) -> fx.GraphModule:
        """The network that gets ImageNet weights; training uses its features."""
        return self.teacher

    def features(self, pixels: Tensor) -> Sequence[Tensor]:
        """Normalised pixels [N, 3, H, W] -> the teacher's feature maps, each [N, C, h, w]."""
        features: Sequence[Tensor] = self.teacher(pixels)
        return features

    @abstractmethod
    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        """Raw anomaly maps [N, M, h, w], >= 0.

        Args:
            pixels: normalised, [N, 3, H, W].
            features: ``features(pixels)``.
            nearest: indices [N] of the nearest classes.
        """

    def descriptors(self, run: Run) -> Tensor:
        """Of the training images, in order: [N, D]. They make the prototypes of the deployed detector."""
        device = self.prototypes.device
        return torch.cat([pooled_descriptor(self.features(self.normalize(images.to(device))))
                          for images, _ in run.training.batches("prototypes")])

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] as the teacher expects it."""
        # Cast first: TensorRT cannot transpose uint8.
        return (image.float().permute(0, 3, 1, 2) - self.pixel_mean) * self.pixel_scale

    def prepare(self, image: Tensor) -> Tensor:
        """``normalize``, in the memory layout that trains fastest."""
        return self.normalize(image).contiguous(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> OutputTensors:
        """uint8 [N, H, W, 3], RGB -> scores and maps."""
        raw, nearest, descriptor = self._raw(image)
        anomaly_map = self.normalize_maps(raw, nearest)
        raw_map = within(self.roi, nearest, raw.sum(1), 0.0)
        return OutputTensors(self.image_score(anomaly_map), self.image_score(raw_map), anomaly_map, nearest.int(),
                             self.class_distance(descriptor, nearest))

    def raw_maps_and_class(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, H, W, 3] -> raw anomaly maps [N, M, h, w] and indices of the nearest classes, int64 [N]."""
        raw, nearest, _ = self._raw(image)
        return raw, nearest

    def _raw(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``raw_maps_and_class``, and the descriptors [N, D]."""
        pixels = self.normalize(image)
        features = self.features(pixels)
        descriptor = pooled_descriptor(features)
        nearest = self.nearest_class(descriptor)
        return self.raw_maps(pixels, features, nearest), nearest, descriptor

    def nearest_class(self, descriptor: Tensor) -> Tensor:
        """Index [N] of the prototype at the smallest scaled Euclidean distance from the descriptor [N, D]."""
        return nearest_prototype(descriptor, self.prototypes, self.descriptor_scale)

    def class_distance(self, descriptor: Tensor, nearest: Tensor) -> Tensor:
        """Distance [N] of the descriptor [N, D] to the prototype of the class ``nearest`` [N], in deviations of it."""
        prototypes, mean, std = (table.index_select(0, nearest) for table in (
            self.prototypes, self.distance_mean, self.distance_std))
        return (squared_distance(descriptor, prototypes, self.descriptor_scale).sqrt() - mean) / std

    def standardize_maps(self, raw: Tensor, nearest: Tensor) -> Tensor:
        """Standardise raw maps [N, M, h, w] with the map statistics of the classes ``nearest`` [N]."""
        return standardize(raw, self.expected_maps.index_select(0, nearest), self.map_spreads.index_select(0, nearest))

    def normalize_maps(self, raw: Tensor, nearest: Tensor) -> Tensor:
        """Raw maps [N, M, h, w] -> [N, h, w] in standard deviations of the good scores of the classes ``nearest``."""
        mean, std = (table.index_select(0, nearest)[:, None, None] for table in (self.score_mean, self.score_std))
        whole = (self.standardize_maps(raw, nearest).sum(1) - mean) / std
        return within(self.roi, nearest, whole, OUTSIDE)

    def image_score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the highest hundredth of each map: [N, h, w] -> [N]."""
        count = max(1, round(SCORE_SHARE * self.map_size[0] * self.map_size[1]))
        return anomaly_map.flatten(1).topk(count, dim=1).values.mean(1)


class Statistics(nn.Module):
    """What normalises maps and scores of a smaller size of a detector, whose own has the same shapes."""

    rows = STATISTICS

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        for name in STATISTICS:
            self.register_buffer(name, torch.zeros_like(detector.get_buffer(name)))


class Smoothing(nn.Module):
    """A Gaussian filter for maps [N, M, h, w], cut off at three standard deviations.

    Args:
        maps: M.
        scale: length of the map relative to the input.
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


@fx.wrap  # a single node in every traced graph, whose first input is the raw maps
def standardize(raw: Tensor, expected: Tensor, spread: Tensor) -> Tensor:
    """Deviation of [N, M, h, w] from the expected values, in units of the spread; both are given on a coarser grid."""
    expected, spread = (F.interpolate(grid, size=raw.shape[2:], mode="bilinear", align_corners=False)
                        for grid in (expected, spread))
    return (raw - expected) / spread


@fx.wrap  # a single node, which export leaves out if no class has a region
def within(rois: Tensor, nearest: Tensor, values: Tensor, outside: float) -> Tensor:
    """Maps [N, h, w] in the regions of interest [C, h, w] of the classes ``nearest`` [N], and ``outside`` elsewhere."""
    # Cast first: TensorRT 8.5 does not gather bool.
    return torch.where(rois.float().index_select(0, nearest) > 0, values, outside)


def without_rois(model: nn.Module) -> nn.Module:
    """A detector or its graph without the operations of regions of interest, if no class has one."""
    if not model.get_buffer(ROI).all():
        return model
    graph = traced(model)
    for node in list(graph.graph.nodes):
        if node.target is within:
            node.replace_all_uses_with(node.args[2])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


@fx.wrap  # so that the names of other nodes do not depend on it
def nearest_prototype(descriptor: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
    """Index [N] of the prototype [C, D] at the smallest Euclidean distance, each channel scaled by ``scale`` [D]."""
    return squared_distance(descriptor[:, None], prototypes, scale).argmin(1)


def squared_distance(descriptor: Tensor, prototype: Tensor, scale: Tensor) -> Tensor:
    """Squared Euclidean distance [...] of descriptors and prototypes [..., D], each channel scaled by ``scale`` [D]."""
    return ((descriptor - prototype) * scale).square().sum(-1)


@fx.wrap
def pooled_descriptor(features: Sequence[Tensor]) -> Tensor:
    """Spatial mean of each channel of each feature map, concatenated: [N, D]."""
    return torch.cat([feature_map.mean((2, 3)) for feature_map in features], dim=1)


def _per_channel(values: list[float]) -> Tensor:
    """[1, 3, 1, 1], or [] if all channels agree: three values are ten times slower in ONNX Runtime."""
    return torch.tensor(values).view(1, 3, 1, 1) if len(set(values)) > 1 else torch.tensor(values[0])
