"""Duet: a memory of good patches and a head that has learned what defects look like, on one frozen teacher.

The two see different things: the memory what never occurred, the head what is out of place though it occurs. Each
map counts in units of what it shows on held-out good images; their sum is the raw map.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uadtool.detectors.backbones import (
    build_backbone,
    feature_shapes,
    fold_batch_norm,
    normalization,
    remove_identities,
)
from uadtool.detectors.base import Detector, describe
from uadtool.detectors.memory import PatchMemory, coreset, principal_components, usual_distances
from uadtool.errors import UadtoolError

if TYPE_CHECKING:
    from uadtool.training.loop import Outcome, Run

PATCHES = 60_000
"""Of all training images, the same number of each, from which the memory chooses."""
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-3
FOCAL, DICE = 5.0, 0.3
ANOMALOUS, AUGMENTED = 0.6, 0.2
"""Shares of a batch with synthetic anomalies and with changed brightness and contrast; the rest is as it is."""
CROP = 24
"""Side of the part of the feature grid that the head trains on: so it cannot learn where things are."""
LEAST_COVERED = 0.15
"""Of a patch, for the head to call it anomalous."""


class Duet(Detector):
    """Memory and head; they read the teacher's feature maps at strides 4, 8 and 16.

    Args:
        teacher: name of a timm CNN.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        entries: size of the memory.
        memory_stride: 8, or 16 for a memory of larger patches that costs a quarter.
        components: principal components of the features that the memory stores.
        width: channels of the head.

    Raises:
        UadtoolError: there is no such teacher or stride.
    """

    trained = "head"
    float_teacher = True
    usual: Tensor
    spread: Tensor

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, entries: int = 6000,
                 memory_stride: int = 8, components: int = 64, width: int = 96) -> None:
        if memory_stride not in (8, 16):
            raise UadtoolError(f"duet has no memory at stride {memory_stride}; take 8 or 16")
        network = build_backbone(teacher, image_size)
        shapes = feature_shapes(network, image_size)
        channels = [shape[0] for shape in shapes]
        super().__init__(classes, sum(channels), shapes[1][1:], *normalization(teacher))
        self.teacher = network
        self.memory_stride = memory_stride
        self.project_fine = nn.Conv2d(channels[1], components, 1)
        self.project_coarse = nn.Conv2d(channels[2], components, 1, bias=False)
        self.memory = PatchMemory(entries, components)
        self.head: nn.Module = Head(channels, width)
        self.register_buffer("usual", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    def raw_map_and_descriptor(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.teacher(pixels)
        maps = torch.stack([self.memory_map(features), self.head_map(features)], dim=3)
        return ((maps - self.usual) / self.spread).sum(3), describe(features)

    def memory_map(self, features: Sequence[Tensor]) -> Tensor:
        """[N, h, w]: distance to the memory in units of the usual one."""
        distances = self.memory(self.patches(features))
        return distances if self.memory_stride == 8 else _double(distances[:, None]).squeeze(1)

    def head_map(self, features: Sequence[Tensor]) -> Tensor:
        """[N, h, w]: how likely a defect is, 0 to 1."""
        likely: Tensor = self.head(features[0], features[1], features[2]).sigmoid()
        return likely.squeeze(1)

    def patches(self, features: Sequence[Tensor]) -> Tensor:
        """What the memory stores: principal components of the features of 3 x 3 positions, [N, components, h, w]."""
        fine, coarse = self.project_fine(features[1]), self.project_coarse(features[2])
        if self.memory_stride == 8:
            return _average(fine + _double(coarse))
        return _average(F.avg_pool2d(fine, 2) + coarse)

    def fit(self, run: "Run") -> "Outcome":
        self.fit_memory(run)
        outcome = self.fit_head(run)
        self.fold_batch_norm()
        self.fit_fusion(run)
        return outcome

    @torch.inference_mode()
    def fit_memory(self, run: "Run") -> None:
        """Choose principal components and entries from the training images."""
        each = max(1, PATCHES // len(run.training))
        generator = torch.Generator().manual_seed(run.seed)
        height, width = self.map_size
        cells = height * width if self.memory_stride == 8 else height * width // 4
        raw = []
        for _, features in run.training.batches():
            fine, coarse = features[1].float(), features[2].float()
            joined = [fine, _double(coarse)] if self.memory_stride == 8 else [F.avg_pool2d(fine, 2), coarse]
            grid = _average(torch.cat(joined, dim=1)).flatten(2)
            raw.append(torch.cat([one[:, torch.randperm(cells, generator=generator)[:each]].T for one in grid]))
        patches = torch.cat(raw)
        projections = self.project_fine, self.project_coarse
        sizes = [conv.in_channels for conv in projections]
        # standardised channels, and the same weight for each feature map
        scale = 1 / patches.std(0).clamp(min=1e-6) / torch.cat([torch.full((n,), n**0.5) for n in sizes])
        mean, vectors = principal_components(patches * scale, self.project_fine.out_channels)
        weight = vectors * scale
        for conv, part in zip(projections, torch.split(weight, sizes, dim=1)):
            conv.weight.copy_(part[:, :, None, None])
        assert self.project_fine.bias is not None
        self.project_fine.bias.copy_(-(vectors @ mean))
        stored = patches @ weight.T - vectors @ mean
        chosen = coreset(stored, self.memory.entries)
        entries, usual = stored[chosen], usual_distances(stored, chosen)
        missing = self.memory.entries - len(entries)
        if missing:  # too few images: the first entry stands for those that are not there
            entries = torch.cat([entries, entries[:1].expand(missing, -1)])
            usual = torch.cat([usual, usual[:1].expand(missing)])
        self.memory.fill(entries, usual)

    def fit_head(self, run: "Run") -> "Outcome":
        """Train the head on synthetic anomalies."""
        from uadtool.training.loop import batch_indices
        from uadtool.training.precision import autocast

        assert isinstance(self.head, Head)
        for index, branch in enumerate(self.head.branches()):
            branch.learn_standard([features[index] for _, features in run.training.batches()])
        optimizer = torch.optim.AdamW(self.head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        teacher = run.training.teacher

        def loss_of(features: Sequence[Tensor], masks: Tensor) -> Tensor:
            with autocast(run.device, run.dtype):
                logits = self.head(*features)
            return segmentation_loss(logits.squeeze(1).float(), masks.to(run.device))

        def training_loss(step: int) -> Tensor:
            generator = np.random.default_rng((run.seed, step))
            images, _ = run.training.batch(batch_indices(len(run.training), step, run.seed))
            changed, masks = vary(images, self.map_size, generator)
            return loss_of(*_crop(teacher(changed), masks, generator))

        held_out: list[tuple[Sequence[Tensor], Tensor]] = []
        for number, (images, _) in enumerate(run.held_out.batches()):
            changed, masks = vary(images, self.map_size, np.random.default_rng((run.seed, number)))
            held_out.append((teacher(changed), masks))

        return run.optimize(self.head, optimizer, training_loss, lambda: (
            (loss_of(features, masks), len(masks)) for features, masks in held_out))

    @torch.inference_mode()
    def fit_fusion(self, run: "Run") -> None:
        """Unit of each map: from its median on held-out good images to what one image in ten reaches."""
        features = [[f.to(run.device).float() for f in part] for _, part in run.held_out.batches()]
        for index, raw_map in enumerate((self.memory_map, self.head_map)):
            maps = torch.cat([raw_map(part) for part in features])
            median, high = maps.median(), maps.flatten(1).amax(1).quantile(0.9)
            self.usual[index] = median
            self.spread[index] = (high - median).clamp(min=1e-6)

    def fold_batch_norm(self) -> "Duet":
        self.eval()
        if isinstance(self.head, Head):
            fold_batch_norm(self.teacher)
            self.head = self.head.folded()
        return self


class Head(nn.Module):
    """Finds defects in the feature maps at strides 4, 8 and 16: -> logits [N, 1, h, w] at stride 8."""

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
        """Those for the strides 4, 8 and 16."""
        return self.stride_4, self.stride_8, self.stride_16

    def folded(self) -> fx.GraphModule:
        """The deployed form: convolutions and ReLUs."""
        for branch in self.branches():
            branch.fold()
        graph = fx.symbolic_trace(self.eval())
        remove_identities(graph)
        return fold_batch_norm(graph)


class Branch(nn.Module):
    """Standardises the channels of a feature map, as it was told once, and mixes them."""

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
    def learn_standard(self, features: Sequence[Tensor]) -> None:
        """Let each channel of these feature maps [N, C, h, w] have mean 0 and deviation 1."""
        values = torch.cat([part.float()[:, :, ::3, ::3] for part in features]).transpose(0, 1).flatten(1)
        assert isinstance(self.standardize, nn.BatchNorm2d)
        self.standardize.load_state_dict({"running_mean": values.mean(1), "running_var": values.var(1)}, strict=False)

    @torch.no_grad()
    def fold(self) -> None:
        """Let the convolution standardise, too."""
        norm, conv = self.standardize, nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 1)
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
    """A training batch: images [N, H, W, 3], uint8, some with synthetic anomalies, and the masks, float [N, h, w]."""
    from uadtool.training.synthetic import synthetic_anomaly

    good = [one[:, ::-1] if generator.random() < 0.5 else one for one in images.numpy()]
    changed, masks = [], []
    for image in good:
        draw = generator.random()
        mask = np.zeros(image.shape[:2], bool)
        if draw < ANOMALOUS:
            image, mask = synthetic_anomaly(image, good, generator)
        elif draw < ANOMALOUS + AUGMENTED:
            contrast, brightness = generator.uniform(0.85, 1.15), generator.uniform(-20, 20)
            image = ((image - 128.0) * contrast + 128 + brightness).clip(0, 255).astype(np.uint8)
        changed.append(np.ascontiguousarray(image))
        masks.append(mask)
    covered = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(masks)).float(), map_size)
    return torch.from_numpy(np.stack(changed)), (covered >= LEAST_COVERED).float()


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017, gamma 2) and soft Dice loss (Milletari et al., 3DV 2016) of [N, h, w]."""
    likely = logits.sigmoid()
    error = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    missed = masks * (1 - likely) + (1 - masks) * likely
    focal = (missed.square() * error).mean()
    overlap = (likely * masks).sum()
    dice = 1 - (2 * overlap + 1) / (likely.sum() + masks.sum() + 1)
    return FOCAL * focal + DICE * dice


def _crop(features: Sequence[Tensor], masks: Tensor, generator: np.random.Generator) -> tuple[list[Tensor], Tensor]:
    """The same random part of every feature map and mask, at most 24 x 24 cells of stride 8."""
    height, width = masks.shape[1:]
    side = min(CROP, height, width) // 2 * 2
    top, left = (2 * int(generator.integers((length - side) // 2 + 1)) for length in (height, width))
    parts = [f[:, :, int(top * r):int((top + side) * r), int(left * r):int((left + side) * r)]
             for f, r in zip(features, (2, 1, 0.5))]
    return parts, masks[:, top:top + side, left:left + side]


def _double(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2.0, mode="bilinear", align_corners=False)


def _average(values: Tensor) -> Tensor:
    """Mean over 3 x 3 positions; fewer at the border."""
    return F.avg_pool2d(values, 3, 1, 1, count_include_pad=False)
