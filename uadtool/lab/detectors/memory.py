"""Memory: a bank of good patches for each class, at several strides of one frozen teacher. Nothing is trained.

The nearest class chooses the bank. So a class costs a row of tables and no time, and a patch that is normal for one
class is an anomaly in another.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Optional, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import feature_shapes, normalization
from uadtool.lab.detectors.contract import Detector, pooled_descriptor
from uadtool.lab.detectors.encoders import build_encoder
from uadtool.lab.detectors.patch_memory import PatchMemory, sample_all
from uadtool.lab.training import distributed
from uadtool.lab.training.data import chunks
from uadtool.lab.training.loop import Outcome, Run
from uadtool.progress import Progress

STRIDES = ("4", "8", "16", "32")
"""Strides that a CNN may have."""
MAP_STRIDE = 8
"""Stride of the anomaly map. Finer feature maps are averaged to it; the distances of coarser ones are enlarged."""


class Memory(Detector):
    """Memories of the teacher's feature maps.

    Args:
        teacher: name of a timm CNN or plain vision transformer.
        image_size: (height, width) of the input in pixels.
        classes: number of classes.
        entries: size of a bank; a class has one for each stride.
        components: most principal components of a patch that a bank stores.
        strides: of the feature maps of a CNN, separated by commas. The two maps of a vision transformer, means of its
            lower and of its upper layers, have the stride of its patches.

    Raises:
        UadtoolError: the teacher is unknown or unsuitable, or an option is out of range.
    """

    float_teacher = True
    one_pass = True
    other_maps: ClassVar[int] = 0
    """Raw maps besides those of the memories."""

    def __init__(self, teacher: str, image_size: tuple[int, int], classes: int, entries: int = 1250,
                 components: int = 112, strides: str = "4,8,16") -> None:
        for name, value in (("entries", entries), ("components", components)):
            if value < 1:
                raise UadtoolError(f"the option {name} must be at least 1, not {value}")
        encoder = build_encoder(teacher, image_size, _strides(strides))
        shapes = feature_shapes(encoder, image_size)
        coarse = [shape[1:] for shape in shapes if shape[1] <= image_size[0] // MAP_STRIDE]
        map_size = coarse[0] if coarse else (image_size[0] // MAP_STRIDE, image_size[1] // MAP_STRIDE)
        super().__init__(classes, sum(shape[0] for shape in shapes), map_size, *normalization(teacher),
                         maps=len(shapes) + self.other_maps)
        self.teacher = encoder
        self.channels = [shape[0] for shape in shapes]
        self.factors = [shape[1] / map_size[0] for shape in shapes]
        """Height of each feature map relative to the anomaly map."""
        self.memories = nn.ModuleList(
            PatchMemory(classes, channels, components, entries) for channels, _, _ in shapes)
        self._descriptors = torch.empty(0)

    def raw_maps(self, pixels: Tensor, features: Sequence[Tensor], nearest: Tensor) -> Tensor:
        maps = [memory(one, nearest) for memory, one in zip(self.memories, self.patches(features))]
        return torch.cat([one if factor >= 1 else F.interpolate(one, size=self.map_size, mode="bilinear")
                          for one, factor in zip(maps, self.factors)], dim=1)

    def patches(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What the memories see: finer feature maps averaged to the anomaly map, coarser ones over 3 x 3 positions."""
        return [F.avg_pool2d(one, int(factor)) if factor > 1 else
                F.avg_pool2d(one, 3, 1, 1, count_include_pad=False) if factor < 1 else one
                for one, factor in zip(features, self.factors)]

    def fit(self, run: Run) -> Optional[Outcome]:
        if distributed.rank() == 0:  # the others are not needed for a minute's work
            self.fit_memories(run)
        return None

    def fit_memories(self, run: Run) -> None:
        """Fill the tables."""
        for row, patches, images in self.classes(run):
            for memory, one in zip(cast(Sequence[PatchMemory], self.memories), patches):
                memory.fit(row, one, images.repeat_interleave(len(one) // len(images)))

    def extend_memories(self, run: Run) -> Tensor:
        """Add the patches of more good images to the banks: the factors of the distances, [classes, memories]."""
        memories = cast(Sequence[PatchMemory], self.memories)
        return torch.tensor([[memory.extend(row, one) for memory, one in zip(memories, patches)]
                             for row, patches, _ in self.classes(run)])

    def classes(self, run: Run) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """The patches of each class in turn, so that only those of one are in memory.

        Yields:
            The row of the class, patches [n, C] for each memory, and the number of the image of each sample, all of
            which have equally many patches. Samples that are one image, turned, have the same.
        """
        self._descriptors = torch.empty(len(run.training), self.prototypes.shape[1])
        samples = run.training.samples
        with Progress("memories", len(samples)) as progress:
            def maps(members: list[int]) -> Iterator[list[Tensor]]:
                for chunk in chunks(len(members), run.training.reading.size):
                    chosen = members[chunk.start:chunk.stop]
                    _, features = run.training.batch(chosen)
                    self._descriptors[chosen] = pooled_descriptor(features)
                    yield self.patches(features)
                    progress.update(len(chosen) - int(chunk.stop == len(members)))

            for row, name in enumerate(sorted({str(sample.class_name) for sample in samples})):
                members = [number for number, sample in enumerate(samples) if sample.class_name == name]
                patches = sample_all(maps(members), len(members), run.seed, self.roi[row].cpu())
                if not all(one.isfinite().all() for one in patches):
                    raise UadtoolError("the teacher's features are not all finite numbers; check its weights")
                paths = {path: number for number, path in enumerate(dict.fromkeys(
                    samples[member].path for member in members))}
                yield row, patches, torch.tensor([paths[samples[member].path] for member in members])
                progress.update()  # the last image of a class counts when its banks are full

    def descriptors(self, run: Run) -> Tensor:
        return self._descriptors


def _strides(text: str) -> tuple[int, ...]:
    """``4,8,16`` as numbers."""
    parts = text.split(",")
    if not set(parts) <= set(STRIDES) or sorted(parts, key=int) != parts or len(set(parts)) < len(parts):
        raise UadtoolError(f"the option strides must be some of {','.join(STRIDES)}, ascending, not {text!r}")
    return tuple(map(int, parts))
