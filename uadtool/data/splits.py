"""Choosing samples: those to hold out, and a number of them balanced over the classes."""

import itertools
import random
from collections import defaultdict
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

from uadtool.data.dataset import Sample

LEAST_HELD_OUT = 3
"""Images of a class: one or two do not show how far its good images differ."""


def split_held_out(samples: Sequence[Sample], share: float, seed: int) -> Tuple[List[Sample], List[Sample]]:
    """Hold out ``share`` (0 to 1) of each class at random; returns (the rest, held out), both in the given order.

    At least ``LEAST_HELD_OUT`` images of a class are held out, or half of a class that has fewer than twice as many.
    The only image of a class is not held out.
    """
    held_out: Set[Sample] = set()
    for name, members in _by_class(samples).items():
        least = min(LEAST_HELD_OUT, len(members) // 2)
        count = min(max(round(share * len(members)), least), len(members) - 1)
        # Each class has its own randomness, so the choice does not depend on the other classes. As text, the seed would
        # be encoded the same way, but names that are not UTF-8 would be refused.
        own = random.Random(f"{seed} {name}".encode("utf-8", "surrogateescape"))
        held_out.update(own.sample(members, count))
    return ([sample for sample in samples if sample not in held_out],
            [sample for sample in samples if sample in held_out])


def balanced(samples: Sequence[Sample], count: int, seed: int) -> List[Sample]:
    """Choose ``count`` samples at random, or all if there are fewer; the classes take turns, in random order."""
    rng = random.Random(seed)
    groups = list(_by_class(samples).values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    turns = itertools.zip_longest(*groups)
    return [sample for turn in turns for sample in turn if sample][:count]


def _by_class(samples: Iterable[Sample]) -> Dict[Optional[str], List[Sample]]:
    groups: Dict[Optional[str], List[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.class_name].append(sample)
    return groups
