"""Images and the teacher's features for training, computed once when they fit into memory."""
import base64
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
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
from uadtool.terminal import log

Teacher = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [N, H, W, 3] -> feature maps [N, C, h, w]."""

MEMORY_SHARE = 0.5
"""Share of the main memory that images and features may fill."""
CHUNK = 32
"""Images that are read and passed through a network at once."""


def read_images(samples: Sequence[Sample], reading: Reading, threads: int) -> Tensor:
    """Decode the images of the samples: uint8 [N, H, W, 3].

    Raises:
        UadtoolError: images cannot be read.
    """
    found = [image for _, image in
             read_ahead(lambda sample: read_image(sample.path, *reading), samples, threads, 2 * threads)]
    refuse_unreadable([image for image in found if isinstance(image, UadtoolError)], len(samples))
    return torch.stack([torch.from_numpy(image) for image in found])


def names_digest(samples: Sequence[Sample]) -> str:
    """Digest of the class and the file name of each image, in order. It survives moving the data set."""
    return list_digest(f"{sample.class_name}/{Path(sample.path).name}" for sample in samples)


def split_again(metadata: Metadata, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The split of the run that trained this model: (trained on, held out).

    Raises:
        UadtoolError: the metadata do not record the split, or the samples are not those of the run.
    """
    origin = metadata.provenance[0] if metadata.provenance else {}
    share, seed = origin.get("held_out"), origin.get("seed")
    if not isinstance(share, float) or not 0 < share < 1 or not isinstance(seed, int):
        raise UadtoolError("the model does not record which images were held out when it was trained; train it again")
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
    """The samples in batches of at most 32, with their images: uint8 [N, H, W, 3].

    Raises:
        ImageError: as ``read_images``.
    """
    for indices in chunks(len(samples)):
        batch = samples[indices.start:indices.stop]
        yield batch, read_images(batch, reading, threads)


def chunks(total: int) -> list[range]:
    """The indices of ``total`` images, in ranges of at most 32."""
    return [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]


class TeacherFeatures:
    """Images and the teacher's feature maps, by index.

    They are computed when they are asked for, unless they are kept. Then, if they fit into half of the main memory,
    they are computed once, at the start; processes that train together compute a share each and exchange the results.

    Args:
        keep: number of images of all instances that share the memory; 0 keeps nothing.
    """

    def __init__(self, samples: Sequence[Sample], reading: Reading, teacher: Teacher, threads: int,
                 keep: int) -> None:
        self.samples, self.reading, self.teacher, self.threads = samples, reading, teacher, threads
        self._cache: tuple[Tensor, list[Tensor]] | None = None
        if not keep:
            return
        images, features = self._compute([0])
        bytes_per_image = sum(tensor.nbytes for tensor in (images, *features))
        available = MEMORY_SHARE * usable_memory() / distributed.local_processes()
        if distributed.any_process(bytes_per_image * keep >= available):
            log.info("the images do not fit into memory; they are read again in every epoch")
        else:
            self._cache = self._compute_all(images, features)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Images [N, H, W, 3] and the teacher's feature maps."""
        if self._cache is None:
            return self._compute(indices)
        images, features = self._cache
        rows = torch.as_tensor(indices)
        return images[rows], [feature_map[rows] for feature_map in features]

    def batches(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """All images in order, in batches of at most 32."""
        for indices in chunks(len(self)):
            yield self.batch(indices)

    def _compute(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        images = read_images([self.samples[i] for i in indices], self.reading, self.threads)
        return images, [feature_map.cpu() for feature_map in self.teacher(images)]

    def _compute_all(self, image: Tensor, image_features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The images and features of all processes, in tensors like those of one image."""
        total = len(self.samples)
        images, *features = (example.new_empty(total, *example.shape[1:]) for example in (image, *image_features))
        features = [feature_map.contiguous(memory_format=torch.channels_last) for feature_map in features]
        batches = chunks(total)
        own_batches = distributed.share(batches)
        with Progress("teacher features", sum(map(len, own_batches))) as progress:
            for indices in own_batches:
                batch_images, batch_features = self._compute(indices)
                for whole, batch in zip((images, *features), (batch_images, *batch_features)):
                    whole[indices.start:indices.stop] = batch
                progress.update(len(indices))
        if distributed.world_size() > 1:
            for number, indices in enumerate(batches):
                for whole in (images, *(feature_map.permute(0, 2, 3, 1) for feature_map in features)):
                    distributed.broadcast(whole[indices.start:indices.stop], number % distributed.world_size())
        return images, features
