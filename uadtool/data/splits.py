"""Choosing samples: those to hold out, and a number of them balanced over the classes."""

import itertools
import math
import random
from collections import defaultdict
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple, TypeVar

from uadtool.data.samples import Sample

T = TypeVar("T")

LEAST_RATE = 1e-9
"""A false-positive rate below it counts as 0, which nothing can promise."""
LEAST_HELD_OUT = 3
"""Images of a class: one or two do not show how far its good images differ."""


def split_held_out(samples: Sequence[Sample], share: float, seed: int, originals: Optional[Sequence[int]] = None
                   ) -> Tuple[List[Sample], List[Sample]]:
    """Hold out ``share`` (0 to 1) of the different images of each class at random: (to train on, held out).

    At least ``LEAST_HELD_OUT`` images of a class are held out, or half of a class that has fewer than twice as many.
    Copies of a held-out image are in neither list. The only image of a class is in both, with its copies in the first.
    Both lists are in the given order.

    Args:
        originals: for each sample the number of the first of its copies, as ``inspection.originals`` returns them;
            None if all images differ.
    """
    originals = range(len(samples)) if originals is None else originals
    different = [number for number, original in enumerate(originals) if number == original]
    held_out: Set[int] = set()
    only: Set[int] = set()
    for name, members in by_class(different, lambda number: samples[number]).items():
        least = min(LEAST_HELD_OUT, len(members) // 2)
        count = min(max(round(share * len(members)), least), len(members) - 1)
        # Each class has its own randomness, so the choice does not depend on the other classes. As text, the seed would
        # be encoded the same way, but names that are not UTF-8 would be refused.
        own = random.Random(f"{seed} {name}".encode("utf-8", "surrogateescape"))
        held_out.update(own.sample(members, count))
        only.update(members if len(members) == 1 else ())
    return ([sample for sample, original in zip(samples, originals) if original not in held_out],
            [samples[number] for number in sorted(held_out | only)])


def images_needed(false_positive_rate: float) -> int:
    """Good images that can promise a rate of ``LEAST_RATE`` or more: n are exceeded at 1 / (n + 1) or more."""
    return math.ceil(1 / false_positive_rate - 1 - 1e-9)


def balanced(samples: Sequence[Sample], count: int, seed: int) -> List[Sample]:
    """Choose ``count`` samples at random, or all if there are fewer; the classes take turns, in random order."""
    rng = random.Random(seed)
    groups = list(by_class(samples, lambda sample: sample).values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    turns = itertools.zip_longest(*groups)
    return [sample for turn in turns for sample in turn if sample][:count]


def by_class(items: Iterable[T], sample_of: Callable[[T], Sample]) -> Dict[Optional[str], List[T]]:
    """The items by the class of their samples, in the given order."""
    groups: Dict[Optional[str], List[T]] = defaultdict(list)
    for item in items:
        groups[sample_of(item).class_name].append(item)
    return groups
