"""Dinomaly (Guo et al., CVPR 2025, arXiv 2405.14325): a transformer loosely reconstructs an encoder's features.

A noisy bottleneck and attention that cannot focus keep the decoder from copying its input. It learns groups of layers
instead of single layers, and learns little from places that it already reconstructs well. Thus it generalises to good
images of many classes, but not to defects.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import LayerNorm, feature_shapes, normalization
from uadtool.lab.detectors.contract import Detector, Smoothing
from uadtool.lab.detectors.encoders import build_encoder
from uadtool.lab.detectors.stfpm import cosine_distance, distance_maps, distillation_loss
from uadtool.lab.training.loop import Outcome, Run
from uadtool.lab.training.precision import autocast

LEARNING_RATE, WEIGHT_DECAY, GRADIENT_NORM = 2e-3, 1e-4, 0.1
"""As in the authors' code, which uses StableAdamW."""
EASY, EASY_GRADIENT, RAMP = 0.9, 0.1, 0.1
"""Share of the places, the best reconstructed, whose gradients are scaled down; the factor; and the part of the run in
which the share grows to its value (sections 3.5 and 4.1)."""
STRIDES = (8, 16)
"""Strides of the feature maps of a CNN."""
HEAD = 32
"""Channels of an attention head."""


class Dinomaly(Detector):
    """Encoder, bottleneck and decoder.

    Args:
        teacher: name of the encoder, a timm CNN or plain vision transformer.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        width: channels of the decoder, a multiple of 32.
        depth: blocks of the decoder, an even number up to 100.
        bottleneck: channels that all features of a token pass through.
        dropout: in the bottleneck; 0.2 in the paper, 0.4 for its largest data set.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, or the image size or an option is out of range.
    """

    trained_network = "decoder"

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, width: int = 128, depth: int = 4,
                 bottleneck: int = 24, dropout: float = 0.2) -> None:
        if width % HEAD or depth % 2 or min(width, depth, bottleneck) < 1 or depth > 100 or not 0 <= dropout < 1:
            raise UadtoolError(f"dinomaly cannot have width {width}, depth {depth}, bottleneck {bottleneck}, dropout "
                               f"{dropout}; take a width that is a multiple of {HEAD}, an even depth up to 100, a "
                               "bottleneck of at least 1, a dropout of at least 0 and below 1")
        encoder = build_encoder(teacher, image_size, STRIDES)
        shapes = feature_shapes(encoder, image_size)
        map_size = shapes[0][1:]
        super().__init__(classes, sum(shape[0] for shape in shapes), map_size, *normalization(teacher),
                         maps=len(shapes))
        self.teacher = encoder
        self.decoder = Decoder(shapes, width, depth, bottleneck, dropout)
        self.smooth = Smoothing(len(shapes), map_size[0] / image_size[0])

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        smooth: Tensor = self.smooth(distance_maps(features, self.decoder(features), self.map_size))
        return smooth

    def fit(self, run: Run) -> Outcome:
        parameters = list(self.decoder.parameters())
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, amsgrad=True)

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)

        optimizer.register_step_pre_hook(clip)

        def reconstruct(features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            targets = [target.to(run.device).float() for target in features]
            with autocast(run.device, run.dtype):
                reconstructed = self.decoder(targets)
            return targets, [values.float() for values in reconstructed]

        def training_loss(step: int) -> Tensor:
            _, features = run.training_batch(step)
            return loose_loss(*reconstruct(features), EASY * min(1.0, step / (RAMP * run.steps)))

        return run.optimize(self.decoder, optimizer, training_loss, lambda: (
            (distillation_loss(*reconstruct(features)), len(images))
            for _, (images, features) in run.held_out_batches()))


class Decoder(nn.Module):
    """Feature maps, finest first -> their reconstructions.

    A token holds the values of all maps in one cell of the coarsest map. It passes through the bottleneck (three
    layers, as in Dinomaly2) and the blocks; the last blocks give the finest map.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], width: int, depth: int, bottleneck: int,
                 dropout: float) -> None:
        super().__init__()
        self.grid = shapes[-1][1:]
        self.factors = [shape[1] // self.grid[0] for shape in shapes]
        sizes = [shape[0] * factor**2 for shape, factor in zip(shapes, self.factors)]
        self.bottleneck = nn.Sequential(
            nn.Linear(sum(sizes), bottleneck), nn.Dropout(dropout), nn.Linear(bottleneck, 4 * width), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout))
        self.position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], width) / 50)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.give = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat([F.pixel_unshuffle(values, factor) for values, factor in zip(maps, self.factors)], dim=1)
        # Not flattened first: OpenVINO 2026.4 cannot compile a transpose between that and a quantizer (constant_fold).
        tokens = self.bottleneck(joined.permute(0, 2, 3, 1).flatten(1, 2)) + self.position
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        size = len(outputs) // len(maps)
        groups = [torch.stack(outputs[start:start + size]).mean(0) for start in range(0, len(outputs), size)]
        return [F.pixel_shuffle(give(group).transpose(1, 2).unflatten(2, self.grid), factor)
                for give, group, factor in zip(self.give, reversed(groups), self.factors)]


class Block(nn.Module):
    """A transformer block with linear attention, for tokens [N, L, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = LayerNorm(width), LayerNorm(width)
        self.attention = LinearAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_1(tokens))
        result: Tensor = tokens + self.mlp(self.norm_2(tokens))
        return result


class LinearAttention(nn.Module):
    """Attention without softmax, for tokens [N, L, D] (Katharopoulos et al., ICML 2020, eq. 5-7)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        weight = query @ key.sum(2).unsqueeze(3)
        attended = query @ (key.transpose(2, 3) @ value) / weight
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


def loose_loss(targets: Sequence[Tensor], reconstructed: Sequence[Tensor], easy: float) -> Tensor:
    """Cosine distance of whole feature maps [N, C, h, w], summed over the maps (eq. 3-4).

    Args:
        easy: share of the places in the batch, the best reconstructed, whose gradients are scaled down.
    """
    total = torch.zeros(())
    for target, values in zip(targets, reconstructed):
        distances = cosine_distance(target, values.detach())
        hard = distances >= distances.flatten().quantile(easy)
        values = torch.where(hard, values, EASY_GRADIENT * values + (1 - EASY_GRADIENT) * values.detach())
        total = total + (1 - F.cosine_similarity(target.flatten(1), values.flatten(1))).mean()
    return total
