"""Images and the teacher's features for training, computed once when they fit into memory."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from uadtool.dataset import Sample, split_held_out
from uadtool.images import read_ahead, read_image
from uadtool.progress import Progress
from uadtool.training.precision import physical_memory

Teacher = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [N, H, W, 3] -> feature maps [N, C, h, w]."""

MEMORY_SHARE = 0.5
CHUNK = 32

log = logging.getLogger(__name__)


def read_images(samples: Sequence[Sample], image_size: tuple[int, int], threads: int) -> Tensor:
    """Decode the images of the samples: uint8 [N, H, W, 3].

    Raises:
        ImageError: one of them cannot be read; training does not go on without an image it was given.
    """
    images = []
    for _, image in read_ahead(lambda sample: read_image(sample.path, image_size), samples, threads, 2 * threads):
        if isinstance(image, Exception):
            raise image
        images.append(torch.from_numpy(image))
    return torch.stack(images)


def split_training(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """``split_held_out``, but a class of one image, which cannot spare it, has it on both sides."""
    rest, held_out = split_held_out(samples, share, seed)
    classes = {sample.class_name for sample in held_out}
    return rest, held_out + [sample for sample in rest if sample.class_name not in classes]


def image_batches(samples: Sequence[Sample], image_size: tuple[int, int],
                  threads: int) -> Iterator[tuple[Sequence[Sample], Tensor]]:
    """The samples in batches of at most 32, with their images: uint8 [N, H, W, 3].

    Raises:
        ImageError: as ``read_images``.
    """
    for start in range(0, len(samples), CHUNK):
        part = samples[start:start + CHUNK]
        yield part, read_images(part, image_size, threads)


class TeacherFeatures:
    """Images with the teacher's feature maps of them, by index.

    When both fit into half of the main memory they are computed once, at the start; else batch by batch.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int], teacher: Teacher, threads: int) -> None:
        self.samples, self.image_size, self.teacher, self.threads = samples, image_size, teacher, threads
        self._cache: tuple[Tensor, list[Tensor]] | None = None
        first = self._compute([0])
        one = sum(t.nbytes for t in (first[0], *first[1]))
        if one * len(samples) < MEMORY_SHARE * physical_memory():
            self._cache = self._fill(first)
        else:
            log.info("the images do not fit into memory; they are read again in every epoch")

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Images [N, H, W, 3] and the teacher's feature maps of them."""
        if self._cache is None:
            return self._compute(indices)
        images, features = self._cache
        chosen = torch.as_tensor(indices)
        return images[chosen], [f[chosen] for f in features]

    def batches(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """All images in order, in batches of at most 32."""
        for start in range(0, len(self), CHUNK):
            yield self.batch(range(start, min(start + CHUNK, len(self))))

    def _compute(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        images = read_images([self.samples[i] for i in indices], self.image_size, self.threads)
        return images, [f.cpu() for f in self.teacher(images)]

    def _fill(self, first: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        total = len(self.samples)
        images, *features = (t.new_empty(total, *t.shape[1:]) for t in (first[0], *first[1]))
        features = [f.contiguous(memory_format=torch.channels_last) for f in features]
        with Progress("teacher features", total) as progress:
            for start in range(0, total, CHUNK):
                indices = range(start, min(start + CHUNK, total))
                part, part_features = self._compute(indices)
                images[start:start + len(indices)] = part
                for whole, piece in zip(features, part_features):
                    whole[start:start + len(indices)] = piece
                progress.update(len(indices))
        return images, features
