"""Duet: memories of good patches and a head that segments synthetic defects, on one frozen teacher.

They complement each other: a memory finds patches unseen in training, the head finds patches in the wrong place.
"""

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import fold_batch_norm, plain_graph
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import sample_all
from uadtool.lab.training import distributed
from uadtool.lab.training.loop import Outcome, Run
from uadtool.lab.training.precision import autocast
from uadtool.lab.training.synthetic import synthetic_anomaly
from uadtool.progress import Progress

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-3
FOCAL, DICE = 5.0, 0.3
ANOMALOUS, AUGMENTED = 0.6, 0.2
"""Shares of a batch with synthetic anomalies and with changed brightness and contrast; the rest is unchanged."""
CROP = 24
"""Side of the part of the feature grid that the head trains on; cropping keeps it from learning absolute positions."""
LEAST_COVERED = 0.15
"""Share of a patch that a defect must cover for the patch to count as anomalous."""
HELD_OUT_BATCHES = 32
"""Most held-out batches whose features stay in memory while the head trains. If there are more, a part is used."""


class Duet(Memory):
    """The memories of ``Memory`` at strides 4, 8 and 16, and a head.

    Args:
        teacher: name of a timm CNN.
        image_size, classes, entries, components: as for ``Memory``.
        width: channels of the head.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, or an option is out of range.
    """

    trained_network = "head"
    one_pass = False
    alters_images = True
    other_maps = 1

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, entries: int = 1250,
                 components: int = 112, width: int = 96) -> None:
        if width < 1:
            raise UadtoolError(f"the option width must be at least 1, not {width}")
        super().__init__(teacher, image_size, classes, entries, components)
        if len(self.channels) != 3:
            raise UadtoolError(f"{teacher!r} is not a CNN, as duet needs; memory takes it")
        self.head: nn.Module = Head(self.channels, width)

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        # Plus 1: the least spread of a map is a share of its mean, and the head's output is near 0 on good images.
        probability = 1 + self.head(features[0], features[1], features[2]).sigmoid()
        return torch.cat([super().raw_maps(pixels, features, nearest), probability], dim=1)

    def fit(self, run: Run) -> Optional[Outcome]:
        outcome = self.fit_head(run)
        super().fit(run)
        self.fold_batch_norm()
        return outcome

    def fit_head(self, run: Run) -> Outcome:
        """Train the head on synthetic anomalies."""
        assert isinstance(self.head, Head)
        patches = distributed.on_first(lambda: sample_all(
            (features for _, features in run.training.batches("feature statistics")), len(run.training), run.seed))
        for branch, sampled in zip(self.head.branches(), patches):
            branch.learn_standard(sampled)
        optimizer = torch.optim.AdamW(self.head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        teacher = run.training.teacher

        def loss_of(features: Sequence[Tensor], masks: Tensor) -> Tensor:
            with autocast(run.device, run.dtype):
                logits = self.head(*features)
            return segmentation_loss(logits.squeeze(1).float(), masks.to(run.device))

        def training_loss(step: int) -> Tensor:
            generator = np.random.default_rng((run.seed, step, distributed.rank()))
            varied, masks = vary(run.training_images(step), self.map_size, generator)
            return loss_of(*_crop(teacher(varied), masks, generator))

        held_out: list[tuple[Sequence[Tensor], Tensor]] = []
        interval = math.ceil(len(run.held_out.chunks()) / HELD_OUT_BATCHES)
        chosen = {number: indices for number, indices in run.held_out_chunks() if number % interval == 0}
        with Progress("held-out anomalies", sum(map(len, chosen.values()))) as progress:
            for number, indices in chosen.items():
                generator = np.random.default_rng((run.seed, number))
                varied, masks = vary(run.held_out.images(indices), self.map_size, generator)
                held_out.append((teacher(varied), masks))
                progress.update(len(indices))

        return run.optimize(self.head, optimizer, training_loss, lambda: (
            (loss_of(features, masks), len(masks)) for features, masks in held_out))

    def fold_batch_norm(self) -> "Duet":
        if isinstance(self.head, Head):
            self.head = self.head.folded()
        return super().fold_batch_norm()


class Head(nn.Module):
    """Segments defects: feature maps at strides 4, 8 and 16 -> logits [N, 1, h, w] at stride 8."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.stride_4, self.stride_8, self.stride_16 = (Branch(count, width) for count in channels)
        self.fine = Separable(width, width)
        self.down = Separable(width, width, stride=2)
        self.context = nn.Sequential(*[Separable(width, width) for _ in range(3)])
        self.last = Separable(width, width)
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.out.bias, -4.0)  # type: ignore[arg-type]  # defects are rare

    def forward(self, stride_4: Tensor, stride_8: Tensor, stride_16: Tensor) -> Tensor:
        joined = (self.stride_4(F.avg_pool2d(stride_4, 2)) + self.stride_8(stride_8)
                  + _double(self.stride_16(stride_16)))
        fine = self.fine(F.relu(joined))
        wide = _double(self.context(self.down(fine)))
        logits: Tensor = self.out(self.last(fine + wide))
        return logits

    def branches(self) -> "tuple[Branch, Branch, Branch]":
        """The branches for the strides 4, 8 and 16."""
        return self.stride_4, self.stride_8, self.stride_16

    def folded(self) -> fx.GraphModule:
        """The deployed form: convolutions and ReLUs."""
        for branch in self.branches():
            branch.fold()
        return fold_batch_norm(plain_graph(self.eval(), "Head"))


class Branch(nn.Module):
    """Standardises the channels of a feature map, with fixed statistics, and mixes them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.standardize: nn.Module = nn.BatchNorm2d(inputs, affine=False)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(self.standardize(values)))
        return result

    def train(self, mode: bool = True) -> "Branch":
        super().train(mode)
        self.standardize.eval()
        return self

    @torch.inference_mode()
    def learn_standard(self, patches: Tensor) -> None:
        """Standardise each channel to mean 0 and deviation 1 on these patches [n, C]."""
        assert isinstance(self.standardize, nn.BatchNorm2d)
        self.standardize.load_state_dict({"running_mean": patches.mean(0), "running_var": patches.var(0)}, strict=False)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the standardisation into the convolution."""
        norm = self.standardize
        conv = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 1, device=self.conv.weight.device)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert conv.bias is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        conv.weight.copy_(self.conv.weight * scale[:, None, None])
        conv.bias.copy_(-(self.conv.weight[:, :, 0, 0] @ (norm.running_mean * scale)))
        self.standardize, self.conv = nn.Identity(), conv


class Separable(nn.Sequential):
    """Depthwise 5 x 5 and pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 5, stride, 2, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def vary(images: Tensor, map_size: tuple[int, int], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Vary good images, uint8 [N, H, W, 3], some by synthetic anomalies; returns images and masks, float [N, h, w]."""
    good = [image[:, ::-1] if generator.random() < 0.5 else image for image in images.numpy()]
    varied, masks = [], []
    for image in good:
        draw = generator.random()
        mask = np.zeros(image.shape[:2], bool)
        if draw < ANOMALOUS:
            image, mask = synthetic_anomaly(image, good, generator)
        elif draw < ANOMALOUS + AUGMENTED:
            contrast, brightness = generator.uniform(0.85, 1.15), generator.uniform(-20, 20)
            image = ((image - 128.0) * contrast + 128 + brightness).clip(0, 255).astype(np.uint8)
        varied.append(np.ascontiguousarray(image))
        masks.append(mask)
    covered = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(masks)).float(), map_size)
    return torch.from_numpy(np.stack(varied)), (covered >= LEAST_COVERED).float()


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017, gamma 2) and soft Dice loss (Milletari et al., 3DV 2016) of [N, h, w]."""
    probability = logits.sigmoid()
    error = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    missed = masks * (1 - probability) + (1 - masks) * probability
    focal = (missed.square() * error).mean()
    overlap = (probability * masks).sum()
    dice = 1 - (2 * overlap + 1) / (probability.sum() + masks.sum() + 1)
    return FOCAL * focal + DICE * dice


def _crop(features: Sequence[Tensor], masks: Tensor, generator: np.random.Generator) -> tuple[list[Tensor], Tensor]:
    """The same random part of every feature map and mask, at most 24 x 24 cells of stride 8."""
    height, width = masks.shape[1:]
    side = min(CROP, height, width) // 2 * 2
    top, left = (2 * int(generator.integers((length - side) // 2 + 1)) for length in (height, width))
    crops = [values[:, :, int(top * scale):int((top + side) * scale), int(left * scale):int((left + side) * scale)]
             for values, scale in zip(features, (2, 1, 0.5))]
    return crops, masks[:, top:top + side, left:left + side]


def _double(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2.0, mode="bilinear", align_corners=False)
