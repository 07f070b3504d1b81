"""Images and the teacher's features for training, computed once when they fit into memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from uadtool.data.dataset import Sample
from uadtool.data.images import read_image
from uadtool.data.read_ahead import read_ahead
from uadtool.data.splits import split_held_out
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.lab.training import distributed
from uadtool.lab.training.precision import usable_memory
from uadtool.metadata import Metadata
from uadtool.progress import Progress

Teacher = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [N, H, W, 3] -> feature maps [N, C, h, w]."""

MEMORY_SHARE = 0.5
CHUNK = 32

log = logging.getLogger("uadtool")


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


def names_digest(samples: Sequence[Sample]) -> str:
    """Of the class and the name of each image, in order: what a data set keeps wherever it lies."""
    return list_digest(f"{sample.class_name}/{Path(sample.path).name}" for sample in samples)


def split_again(metadata: Metadata, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """``split_training`` as the run did it that trained this model.

    Raises:
        UadtoolError: the metadata do not tell, or these are other samples, of which others would be held out.
    """
    origin = metadata.provenance[0] if metadata.provenance else {}
    share, seed = origin.get("held_out"), origin.get("seed")
    if not isinstance(share, float) or not 0 < share < 1 or not isinstance(seed, int):
        raise UadtoolError("the model does not tell which images were held out when it was trained; train it again")
    names = names_digest(samples)
    if origin.get("names", names) != names:
        raise UadtoolError("these are not the good images that the model was trained on: some were added, removed or "
                           "renamed, so nobody can tell which were held out; give them as they were, or train again")
    return split_training(samples, share, seed)


def image_batches(samples: Sequence[Sample], image_size: tuple[int, int],
                  threads: int) -> Iterator[tuple[Sequence[Sample], Tensor]]:
    """The samples in batches of at most 32, with their images: uint8 [N, H, W, 3].

    Raises:
        ImageError: as ``read_images``.
    """
    for places in chunks(len(samples)):
        part = samples[places.start:places.stop]
        yield part, read_images(part, image_size, threads)


def chunks(total: int) -> list[range]:
    """The indices of so many images, in ranges of at most 32."""
    return [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]


class TeacherFeatures:
    """Images with the teacher's feature maps of them, by index.

    When both fit into half of the main memory they are computed once, at the start; else batch by batch. Processes
    that train together compute a share each, and then all of them have all.

    Args:
        most_images: how many images there are with those of other instances, which share the memory.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int], teacher: Teacher, threads: int,
                 most_images: int) -> None:
        self.samples, self.image_size, self.teacher, self.threads = samples, image_size, teacher, threads
        self._cache: tuple[Tensor, list[Tensor]] | None = None
        first = self._compute([0])
        one = sum(t.nbytes for t in (first[0], *first[1]))
        most = MEMORY_SHARE * usable_memory() / distributed.processes_here()
        if distributed.any_of_them(one * most_images >= most):
            log.info("the images do not fit into memory; they are read again in every epoch")
        else:
            self._cache = self._fill(first)

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
        for part in chunks(len(self)):
            yield self.batch(part)

    def _compute(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        images = read_images([self.samples[i] for i in indices], self.image_size, self.threads)
        return images, [f.cpu() for f in self.teacher(images)]

    def _fill(self, first: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        total = len(self.samples)
        images, *features = (t.new_empty(total, *t.shape[1:]) for t in (first[0], *first[1]))
        features = [f.contiguous(memory_format=torch.channels_last) for f in features]
        parts = chunks(total)
        own = distributed.share(parts)
        with Progress("teacher features", sum(map(len, own))) as progress:
            for indices in own:
                part, part_features = self._compute(indices)
                for whole, piece in zip((images, *features), (part, *part_features)):
                    whole[indices.start:indices.stop] = piece
                progress.update(len(indices))
        if distributed.world_size() > 1:
            for number, indices in enumerate(parts):
                for whole in (images, *(f.permute(0, 2, 3, 1) for f in features)):
                    distributed.broadcast(whole[indices.start:indices.stop], number % distributed.world_size())
        return images, features
