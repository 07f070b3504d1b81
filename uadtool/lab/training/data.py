"""Images and the teacher's features for training, computed once when they fit into memory."""
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
from uadtool.host import usable_memory
from uadtool.lab.training import distributed
from uadtool.metadata import Metadata
from uadtool.progress import Progress
from uadtool.terminal import log

Teacher = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [N, H, W, 3] -> feature maps [N, C, h, w]."""

MEMORY_SHARE = 0.5
"""Share of the main memory that images and features may fill."""
CHUNK = 32
"""Images that are read and passed through a network at once."""


def read_images(samples: Sequence[Sample], image_size: tuple[int, int], threads: int) -> Tensor:
    """Decode the images of the samples: uint8 [N, H, W, 3].

    Raises:
        ImageError: an image cannot be read.
    """
    images = []
    for _, image in read_ahead(lambda sample: read_image(sample.path, image_size), samples, threads, 2 * threads):
        if isinstance(image, Exception):
            raise image
        images.append(torch.from_numpy(image))
    return torch.stack(images)


def split_training(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """``split_held_out``, except that the only image of a class is used on both sides: (training, held out)."""
    training, held_out = split_held_out(samples, share, seed)
    classes = {sample.class_name for sample in held_out}
    return training, held_out + [sample for sample in training if sample.class_name not in classes]


def names_digest(samples: Sequence[Sample]) -> str:
    """Digest of the class and the file name of each image, in order. It survives moving the data set."""
    return list_digest(f"{sample.class_name}/{Path(sample.path).name}" for sample in samples)


def split_again(metadata: Metadata, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """``split_training`` as in the run that trained this model.

    Raises:
        UadtoolError: the metadata do not record the split, or the samples are not those of the run.
    """
    origin = metadata.provenance[0] if metadata.provenance else {}
    share, seed = origin.get("held_out"), origin.get("seed")
    if not isinstance(share, float) or not 0 < share < 1 or not isinstance(seed, int):
        raise UadtoolError("the model does not record which images were held out when it was trained; train it again")
    names = names_digest(samples)
    if origin.get("names", names) != names:
        raise UadtoolError("these are not the good images that the model was trained on: some were added, removed or "
                           "renamed; give the original images, or train again")
    return split_training(samples, share, seed)


def image_batches(samples: Sequence[Sample], image_size: tuple[int, int],
                  threads: int) -> Iterator[tuple[Sequence[Sample], Tensor]]:
    """The samples in batches of at most 32, with their images: uint8 [N, H, W, 3].

    Raises:
        ImageError: as ``read_images``.
    """
    for indices in chunks(len(samples)):
        batch = samples[indices.start:indices.stop]
        yield batch, read_images(batch, image_size, threads)


def chunks(total: int) -> list[range]:
    """The indices of ``total`` images, in ranges of at most 32."""
    return [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]


class TeacherFeatures:
    """Images and the teacher's feature maps, by index.

    If they fit into half of the main memory, they are computed once, at the start; otherwise batch by batch. Processes
    that train together compute a share each and exchange the results.

    Args:
        all_images: number of images of all instances that share the memory.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int], teacher: Teacher, threads: int,
                 all_images: int) -> None:
        self.samples, self.image_size, self.teacher, self.threads = samples, image_size, teacher, threads
        self._cache: tuple[Tensor, list[Tensor]] | None = None
        images, features = self._compute([0])
        bytes_per_image = sum(tensor.nbytes for tensor in (images, *features))
        available = MEMORY_SHARE * usable_memory() / distributed.local_processes()
        if distributed.any_process(bytes_per_image * all_images >= available):
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
        images = read_images([self.samples[i] for i in indices], self.image_size, self.threads)
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
