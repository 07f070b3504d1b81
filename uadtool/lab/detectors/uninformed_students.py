"""Uninformed Students (Bergmann et al., CVPR 2020, arXiv 1911.02357).

The teacher, a small network that sees patches of 32 x 32 pixels, learns to describe them as a pretrained backbone does.
Three students of the same architecture learn the teacher's descriptors. Where they are wrong on average, or disagree,
there is an anomaly.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import build_backbone, feature_shapes, normalization
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.detectors.patch_memory import sample_all, standardized_components
from uadtool.lab.training.loop import Outcome, Run
from uadtool.lab.training.precision import autocast

STUDENTS = 3
STRIDE = 4
"""Stride of the descriptors, in pixels."""
CROP = 128
"""Side, in pixels, of the part of each image that a step trains on. It allows four times the steps in the same time."""
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-5
"""The learning rate is ten times the paper's, whose batches have one image."""


class UninformedStudents(Detector):
    """Teacher and students, all patch networks. The backbone is used in training only.

    Args:
        teacher: name of the backbone, a timm CNN.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        width: channels of the patch networks, relative to the paper.

    Raises:
        UadtoolError: the backbone is unknown or unsuitable, or descriptors of this width would be empty or longer than
            the backbone's features.
    """

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, width: float = 0.125) -> None:
        backbone, descriptor_size = build_backbone(teacher, image_size), round(128 * width)
        limit = sum(shape[0] for shape in feature_shapes(backbone, image_size)[1:])
        if not 1 <= descriptor_size <= limit:
            raise UadtoolError(f"us has no descriptors at width {width}; with {teacher} take 0.01 to {limit / 128:.2f}")
        map_size = image_size[0] // STRIDE, image_size[1] // STRIDE
        super().__init__(classes, descriptor_size, map_size, *normalization(teacher), maps=2)
        self.backbone: Optional[fx.GraphModule] = backbone
        self.teacher = fx.symbolic_trace(PatchNetwork(width))
        self.student = nn.ModuleList(PatchNetwork(width) for _ in range(STUDENTS))

    def pretrained(self) -> fx.GraphModule:
        assert self.backbone is not None, "a deployed detector has no backbone"
        return self.backbone

    def features(self, pixels: Tensor) -> Sequence[Tensor]:
        """The teacher's descriptors of all patches, as one map."""
        return [self.teacher(pixels)]

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        """Squared error of the students' mean, and their variance (eq. 8-10), as means over channels."""
        differences = torch.stack([student(pixels) for student in self.student]) - features[0]
        differences = differences.permute(0, 1, 3, 4, 2)  # every runtime sums fastest over the last axis
        error = differences.mean(0).square().mean(3)
        return torch.stack([error, differences.square().mean((0, 4)) - error], dim=1)

    def fit(self, run: Run) -> Outcome:
        """Train the teacher and, towards its current descriptors, the students."""
        networks = nn.ModuleDict({"teacher": self.teacher, "student": self.student})
        optimizer = torch.optim.Adam(networks.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        batches = ([joined(features)] for _, features in run.training.batches("principal components"))
        points, = sample_all(batches, len(run.training), run.seed)
        components = whitened_components(points, self.prototypes.shape[1])

        def loss_of(images: Tensor, features: Sequence[Tensor]) -> Tensor:
            with autocast(run.device, run.dtype):
                pixels = self.prepare(images.to(run.device))
                descriptors = self.teacher(pixels).float()
                predictions = torch.stack([student(pixels) for student in self.student]).float()
            targets = components([feature_map.to(run.device) for feature_map in features])
            targets = F.interpolate(targets, size=descriptors.shape[2:], mode="bilinear")
            expected = descriptors.detach().expand_as(predictions)
            return F.mse_loss(descriptors, targets) + F.mse_loss(predictions, expected)

        def training_loss(step: int) -> Tensor:
            return loss_of(*_crop(*run.training_batch(step), np.random.default_rng((run.seed, step))))

        def held_out_losses() -> Iterator[tuple[Tensor, int]]:
            for number, batch in run.held_out_batches():
                yield loss_of(*_crop(*batch, np.random.default_rng((run.seed, number)))), len(batch[0])

        return run.optimize(networks, optimizer, training_loss, held_out_losses)

    def fold_batch_norm(self) -> "UninformedStudents":
        self.backbone = None
        return super().fold_batch_norm()


class PatchNetwork(nn.Sequential):
    """Descriptors [N, 128 width, H/4, W/4] of the patches of 32 x 32 pixels around the cells of a grid of stride 4.

    The layers are the paper's, with ReLU instead of LeakyReLU(0.005), because every runtime fuses ReLU into integer
    convolutions. (The paper's pools drop the last of 33 rows and columns.) Strided pools give all descriptors at once;
    padding keeps their patches centred.

    Args:
        width: channels, relative to the paper.
    """

    def __init__(self, width: float) -> None:
        narrow, wide = round(128 * width), round(256 * width)
        super().__init__(OrderedDict(
            conv1=_convolution(3, narrow, 5, 2), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=_convolution(narrow, wide, 5, 2), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            conv3=_convolution(wide, wide, 2, 0), relu3=nn.ReLU(), conv4=_convolution(wide, narrow, 4, 2),
            relu4=nn.ReLU(), conv5=nn.Conv2d(narrow, narrow, 1)))


def _convolution(inputs: int, outputs: int, size: int, padding: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, padding=padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def joined(features: Sequence[Tensor]) -> Tensor:
    """Of feature maps at strides 4, 8 and 16 the last two, as one map at stride 8."""
    fine, coarse = features[1].float(), features[2].float()
    return torch.cat([fine, F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")], dim=1)


def whitened_components(points: Tensor, count: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function from feature maps at strides 4, 8 and 16 to principal components of the ``joined`` map.

    The components, [N, count, h, w] at stride 8, have mean 0 and deviation 1 on the ``points``, [n, C] of that map.
    """
    weight, bias = standardized_components(points, count)
    spread = (points @ weight.T + bias).std(0).clamp(min=1e-6)
    weight, bias = (weight / spread[:, None])[:, :, None, None], bias / spread

    def components(features: Sequence[Tensor]) -> Tensor:
        values = joined(features)
        return F.conv2d(values, weight.to(values.device), bias.to(values.device))

    return components


def _crop(images: Tensor, features: Sequence[Tensor], generator: np.random.Generator) -> tuple[Tensor, list[Tensor]]:
    """The same random part of images [N, H, W, 3] and of their feature maps at strides 4, 8 and 16."""
    height, width = features[-1].shape[2:]
    rows, columns = min(CROP // 16, height), min(CROP // 16, width)
    top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))

    def crop(values: Tensor, scale: int) -> Tensor:
        return values[:, :, top * scale:(top + rows) * scale, left * scale:(left + columns) * scale]

    return crop(images.permute(0, 3, 1, 2), 16).permute(0, 2, 3, 1), [
        crop(values, scale) for values, scale in zip(features, (4, 2, 1))]
