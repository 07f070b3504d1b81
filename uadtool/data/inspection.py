"""A look at the content of images before any work: files that cannot be read, copies, and images that hold nothing.

Each image is decoded once, JPEG at a reduced scale, which takes about as long as reading it for training.
"""

import hashlib
import math
from collections import Counter
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from uadtool.data.images import read_overview
from uadtool.data.read_ahead import read_ahead
from uadtool.data.samples import Sample
from uadtool.data.splits import by_class
from uadtool.errors import UadtoolError
from uadtool.progress import Progress
from uadtool.terminal import first_of, log

OVERVIEW = (64, 64)
"""Size at which images are looked at."""
THUMBNAIL = 16
"""Height and width at which images are compared."""
NEAR = 0.05
"""Difference of near copies, in units of the median difference of two images of their class. Of 800 good images of four
products, taken one by one, one in a hundred has another one so near. A burst of one part is nearer: noise, JPEG at
quality 75 and a shift of 1 in 256 pixels make 0.002 to 0.04, except where parts lie in a fixture and hardly differ."""
PAIRED = 200
"""Images of a class from whose pairs the median difference is estimated."""
BLANK, LOW = 2, 16
"""Grey levels of 256 between the darkest and the lightest pixel of an overview: of one that is a single colour, and of
one that uses little of its range."""


class Look(NamedTuple):
    """What was seen of an image.

    Attributes:
        size: (height, width) in pixels.
        bits: per channel, see ``images.read_overview``.
        content: digest of size and overview: the same for files with the same pixels.
        thumbnail: uint8 [16 * 16 * 3].
        levels: between the darkest and the lightest pixel of each channel, 0 to 255.
    """

    sample: Sample
    size: Tuple[int, int]
    bits: int
    content: bytes
    thumbnail: np.ndarray
    levels: Tuple[int, int, int]

    @property
    def is_blank(self) -> bool:
        return max(self.levels) <= BLANK

    @property
    def is_faint(self) -> bool:
        return not self.is_blank and max(self.levels) < LOW


def look_at(samples: Sequence[Sample], threads: int) -> Iterator[Tuple[Sample, Union[Look, UadtoolError]]]:
    """Look at each image, in order; an image that cannot be read comes with its error."""
    with Progress("look at images", len(samples)) as progress:
        for sample, look in read_ahead(_look, samples, threads, 2 * threads):
            yield sample, look
            progress.update()


def _look(sample: Sample) -> Look:
    size, bits, pixels = read_overview(sample.path, OVERVIEW)
    block = OVERVIEW[0] // THUMBNAIL
    blocks = pixels.reshape(THUMBNAIL, block, THUMBNAIL, block, 3)
    digest = hashlib.sha256(repr(size).encode() + pixels.tobytes()).digest()[:16]
    return Look(sample, size, bits, digest, blocks.mean((1, 3)).round().astype(np.uint8).reshape(-1),
                levels(pixels))


def levels(pixels: np.ndarray) -> Tuple[int, int, int]:
    """Grey levels between the darkest and the lightest pixel of each channel of an image, uint8 [H, W, 3]."""
    red, green, blue = (int(np.ptp(pixels[..., channel])) for channel in range(3))
    return red, green, blue


def is_faint(pixels: np.ndarray) -> bool:
    """Whether an image, uint8 [H, W, 3], shows nearly nothing. Large images are sampled."""
    step = math.ceil(min(pixels.shape[:2]) / OVERVIEW[0])
    return max(levels(pixels[::step, ::step])) < LOW


def warn_of_faint(faint: int, count: int) -> None:
    """Warn if images of ``count`` were faint."""
    if faint:
        log.warning("%d of %d images are blank or faint: they use less than %d of 256 levels", faint, count, LOW)


class Inspection(NamedTuple):
    """What training must know of its images, in the order of the samples.

    Attributes:
        originals: for each image the number of the first of its copies, near ones included; its own if it has none.
        grey_bits: bits of the values in 16-bit grey files, by class.
        findings: what is odd, a line for each kind.
        sizes: (height, width) of the images in pixels, by class.
    """

    originals: List[int]
    grey_bits: Dict[str, int]
    findings: List[str]
    sizes: Dict[str, List[Tuple[int, int]]]

    @property
    def shapes(self) -> Dict[str, Tuple[int, int]]:
        """The median of the sizes, by class."""
        return {name: (int(height), int(width)) for name, own in self.sizes.items()
                for height, width in [np.median(own, 0)]}


def inspect(samples: Sequence[Sample], threads: int) -> Inspection:
    """Look at all images of a training.

    Raises:
        UadtoolError: images cannot be read; each is named in the log.
    """
    found = [look for _, look in look_at(samples, threads)]
    looks = [look for look in found if isinstance(look, Look)]
    refuse_unreadable([look for look in found if isinstance(look, UadtoolError)], len(samples))
    firsts = originals(looks)
    return Inspection(firsts, grey_bits(looks), findings(looks, firsts), sizes(looks))


def sizes(looks: Sequence[Look]) -> Dict[str, List[Tuple[int, int]]]:
    """The (height, width) of the images in pixels, by class."""
    return {str(name): [look.size for look in own] for name, own in by_class(looks, lambda look: look.sample).items()}


def refuse_unreadable(errors: Sequence[UadtoolError], count: int) -> None:
    """Raise the errors of some of ``count`` images: one as it is; several one by one in the log, then their number."""
    if len(errors) == 1:
        raise errors[0]
    for error in errors:
        log.error("error: %s", error)
    if errors:
        raise UadtoolError(f"{len(errors)} of {count} images cannot be read; mend or remove them")


def originals(looks: Sequence[Look]) -> List[int]:
    """For each image the number of the first that it is a copy of, directly or through others, within its class."""
    firsts = list(range(len(looks)))

    def first(number: int) -> int:
        while firsts[number] != number:
            firsts[number] = number = firsts[firsts[number]]
        return number

    for members in by_class(range(len(looks)), lambda number: looks[number].sample).values():
        seen: Dict[bytes, int] = {}
        for number in members:
            firsts[number] = seen.setdefault(looks[number].content, number)
        different = list(seen.values())
        for one, other in near_pairs(np.stack([looks[number].thumbnail for number in different])):
            low, high = sorted((first(different[one]), first(different[other])))
            firsts[high] = low
    return [first(number) for number in range(len(looks))]


def near_pairs(thumbnails: np.ndarray) -> Iterator[Tuple[int, int]]:
    """The pairs of thumbnails, uint8 [N, D], whose mean difference is less than ``NEAR`` of the usual one."""
    from scipy.spatial import cKDTree  # lazy: it takes 0.1 s

    count = len(thumbnails)
    chosen = thumbnails[:: math.ceil(count / PAIRED)].astype(np.float32)
    differences = [np.abs(chosen[:place] - chosen[place]).mean(1) for place in range(1, len(chosen))]
    if not differences:
        return
    radius = NEAR * float(np.median(np.concatenate(differences)))
    # Means of blocks differ at most as much as the pixels, and few dimensions are searched quickly.
    side = THUMBNAIL // 2
    blocks = thumbnails.reshape(count, 2, side, 2, side, 3).mean((2, 4)).reshape(count, -1)
    candidates = cKDTree(blocks).query_pairs(radius * blocks.shape[1], p=1, output_type="ndarray")
    for start in range(0, len(candidates), 4096):
        pairs = candidates[start:start + 4096]
        one, other = (thumbnails[numbers].astype(np.int16) for numbers in pairs.T)
        yield from pairs[np.abs(one - other).mean(1) < radius].tolist()


def grey_bits(looks: Sequence[Look]) -> Dict[str, int]:
    """For each class with 16-bit grey files, the fewest bits into which all of their values fit."""
    bits: Dict[str, int] = {}
    for look in looks:
        if look.bits > 8:
            name = str(look.sample.class_name)
            bits[name] = max(look.bits, bits.get(name, 0))
    return bits


def findings(looks: Sequence[Look], firsts: Sequence[int]) -> List[str]:
    """What is odd about good images, a line for each kind."""
    images = Counter(str(look.sample.class_name) for look in looks)
    kinds = {
        "copies of other images, or nearly; they stay on one side of each split, and of those held out one counts":
            [look for number, look in enumerate(looks) if firsts[number] != number],
        "blank images, all pixels of one colour; those that are wholly transparent become white":
            [look for look in looks if look.is_blank],
        f"faint images, which use less than {LOW} of 256 levels; 16-bit grey may need --grey-bits":
            [look for look in looks if look.is_faint],
        "images with a constant colour channel":
            [look for look in looks if min(look.levels) <= BLANK < LOW <= max(look.levels)],
    }
    lines = []
    for kind, found in kinds.items():
        if found:
            counts = Counter(str(look.sample.class_name) for look in found)
            named = [f"{count} of {images[name]} in {name}" for name, count in counts.most_common()]
            lines.append(f"{kind}: {first_of(named, 'classes')}")
    return lines
