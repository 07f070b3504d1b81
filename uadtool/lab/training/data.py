"""Images and the teacher's features for training, held in memory when they fit."""
import base64
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uadtool.data.images import read_image
from uadtool.data.inspection import refuse_unreadable
from uadtool.data.read_ahead import read_ahead
from uadtool.data.samples import Sample
from uadtool.data.splits import split_held_out
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.host import usable_memory
from uadtool.lab.training import distributed
from uadtool.metadata import Metadata, Reading
from uadtool.progress import Progress

Teacher = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [N, H, W, 3] -> feature maps [N, C, h, w]."""

MEMORY_SHARE = 0.25
"""Share of the main memory that images and features may fill. Half would fill a machine of 8 GB together with the steps
of stfpm, which take 4 GB."""
CHUNK = 32
"""Images of 256 x 256 pixels that are read and passed through a network at once."""


def read_images(samples: Sequence[Sample], reading: Reading, threads: int) -> Tensor:
    """Decode the images of the samples, turned as these say: uint8 [N, H, W, 3].

    Raises:
        UadtoolError: images cannot be read.
    """
    found = [image for _, image in read_ahead(lambda sample: turned(read_image(sample.path, *reading), sample.turn),
                                              samples, threads, 2 * threads)]
    refuse_unreadable([image for image in found if isinstance(image, UadtoolError)], len(samples))
    return torch.stack([torch.from_numpy(image) for image in found])


def turned(image: NDArray[Any], turn: int) -> NDArray[Any]:
    """An image [H, W, ...] after ``turn`` % 4 quarter turns, and from 4 on mirrored: the eight symmetries of a square.

    Even turns keep its shape.
    """
    image = np.rot90(image, turn % 4)
    return np.ascontiguousarray(image[:, ::-1] if turn >= 4 else image)


def names_digest(samples: Sequence[Sample]) -> str:
    """Digest of the class and the file name of each image, in order. It survives moving the data set."""
    return list_digest(f"{sample.class_name}/{Path(sample.path).name}" for sample in samples)


def split_again(metadata: Metadata, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The split of the run that trained this model: (trained on, held out).

    Raises:
        UadtoolError: the metadata do not record the split, the samples are not those of the run, or classes were added
            to the model.
    """
    origin = metadata.provenance[0] if metadata.provenance else {}
    share, seed = origin.get("held_out"), origin.get("seed")
    if not isinstance(share, float) or not 0 < share < 1 or not isinstance(seed, int):
        raise UadtoolError("the model does not record which images were held out when it was trained; train it again")
    if any("base" in step for step in metadata.provenance):
        raise UadtoolError("classes were added to this model later; quantize the model that they were added to, with "
                           "its images, and add them to the result")
    if "names" in origin and not trained_on(metadata, samples):
        raise UadtoolError("these are not the good images that the model was trained on: some were added, removed or "
                           "renamed; give the original images, or train again")
    return split_held_out(samples, share, seed, _originals(metadata, len(samples)))


def calibration_images(metadata: Metadata, samples: Sequence[Sample]) -> list[Sample]:
    """The images of the samples to calibrate this model on: none that was held out, and none twice.

    Of another data set than the one that the model was trained on, these are all.
    """
    if not trained_on(metadata, samples):
        return list(samples)
    training = set(split_again(metadata, samples)[0])
    return [sample for number, (sample, original) in enumerate(zip(samples, _originals(metadata, len(samples))))
            if number == original and sample in training]


def trained_on(metadata: Metadata, samples: Sequence[Sample]) -> bool:
    """Whether the model was trained on these images, by their names."""
    return bool(metadata.provenance) and metadata.provenance[0].get("names") == names_digest(samples)


def pack_originals(originals: Sequence[int]) -> str | None:
    """The ``originals`` of ``split_held_out`` as text for the provenance; None if all images differ."""
    offsets = [number - original for number, original in enumerate(originals)]
    if not any(offsets):
        return None
    return base64.b64encode(zlib.compress(json.dumps(offsets, separators=(",", ":")).encode(), 9)).decode()


def _originals(metadata: Metadata, count: int) -> Sequence[int]:
    """The ``originals`` that the training of this model recorded, for ``count`` images."""
    text = metadata.provenance[0].get("originals")
    if text is None:
        return range(count)
    try:
        offsets = json.loads(zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 12 * count))
        originals = [number - offset for number, offset in enumerate(offsets)]
        if len(originals) != count or not all(0 <= first <= number and originals[first] == first
                                              for number, first in enumerate(originals)):
            raise ValueError("it does not fit the images")
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UadtoolError(f"the model's record of copied images cannot be read: {error}; train it again") from error
    return originals


def image_batches(samples: Sequence[Sample], reading: Reading,
                  threads: int) -> Iterator[tuple[Sequence[Sample], Tensor]]:
    """The samples in batches, the ``chunks``, with their images: uint8 [N, H, W, 3].

    Raises:
        ImageError: as ``read_images``.
    """
    for indices in chunks(len(samples), reading.size):
        batch = samples[indices.start:indices.stop]
        yield batch, read_images(batch, reading, threads)


def chunks(total: int, image_size: tuple[int, int]) -> list[range]:
    """The indices of ``total`` images, in ranges of at most 32, and fewer of larger images; see ``at_once``."""
    size = at_once(CHUNK, image_size)
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def at_once(most: int, image_size: tuple[int, int]) -> int:
    """How many images of this size have as many pixels as ``most`` images of 256 x 256; at least 1, at most ``most``.

    So the memory that a network takes for its activations does not grow with the image.
    """
    return max(1, min(most, most * 256 * 256 // (image_size[0] * image_size[1])))


def fits(size: int) -> bool:
    """Whether so many bytes of images and features may stay in the memory of each process."""
    available = MEMORY_SHARE * usable_memory() / distributed.local_processes()
    return not distributed.any_process(size >= available)


class TeacherFeatures:
    """Images and the teacher's feature maps, by index.

    They are computed when they are asked for, except what ``hold`` has computed before.
    """

    def __init__(self, samples: Sequence[Sample], reading: Reading, teacher: Teacher, threads: int) -> None:
        self.samples, self.reading, self.teacher, self.threads = samples, reading, teacher, threads
        self.held: list[Tensor] = []
        """Nothing, the images, or the images and the feature maps."""

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, samples: Sequence[Sample]) -> "TeacherFeatures":
        """Those of other images."""
        return TeacherFeatures(samples, self.reading, self.teacher, self.threads)

    def images(self, indices: Sequence[int]) -> Tensor:
        """uint8 [N, H, W, 3]."""
        if self.held:
            return self.held[0][torch.as_tensor(indices)]
        return read_images([self.samples[i] for i in indices], self.reading, self.threads)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Images [N, H, W, 3] and the teacher's feature maps."""
        images = self.images(indices)
        if len(self.held) > 1:
            return images, [feature_map[torch.as_tensor(indices)] for feature_map in self.held[1:]]
        return images, [feature_map.cpu() for feature_map in self.teacher(images)]

    def chunks(self) -> list[range]:
        return chunks(len(self), self.reading.size)

    def batches(self, task: str = "features") -> Iterator[tuple[Tensor, list[Tensor]]]:
        """All images in order, in batches, with the progress of a ``task``."""
        with Progress(task, len(self)) as progress:
            for indices in self.chunks():
                yield self.batch(indices)
                progress.update(len(indices))

    def bytes_per_image(self, features: bool) -> int:
        """What ``hold`` takes for each image."""
        return sum(tensor.nbytes for tensor in self._computed([0], features))

    def hold(self, features: bool) -> None:
        """Compute all images, and the ``features`` or not, and keep them.

        Processes that train together compute a share each and exchange the results.
        """
        total, batches = len(self), self.chunks()
        held = [torch.empty((total, *one.shape[1:]), dtype=one.dtype,
                            memory_format=torch.channels_last if number else torch.contiguous_format)
                for number, one in enumerate(self._computed([0], features))]
        own_batches = distributed.share(batches)
        with Progress("teacher features" if features else "images", sum(map(len, own_batches))) as progress:
            for indices in own_batches:
                for whole, part in zip(held, self._computed(indices, features)):
                    whole[indices.start:indices.stop] = part
                progress.update(len(indices))
        if distributed.world_size() > 1:
            for number, indices in enumerate(batches):
                for whole in (held[0], *(feature_map.permute(0, 2, 3, 1) for feature_map in held[1:])):
                    distributed.broadcast(whole[indices.start:indices.stop], number % distributed.world_size())
        self.held = held

    def _computed(self, indices: Sequence[int], features: bool) -> list[Tensor]:
        if not features:
            return [self.images(indices)]
        images, maps = self.batch(indices)
        return [images, *maps]
