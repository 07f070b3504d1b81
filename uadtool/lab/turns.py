"""Turned and mirrored copies of images of classes that have few, where these show that a part lies in any direction.

After AnomalyDINO (Damm et al., WACV 2025, arXiv 2405.14529), which turns the images of every class.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from uadtool.data.samples import Sample
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import reaching_into
from uadtool.lab.training.data import TeacherFeatures, turned
from uadtool.lab.training.loop import Run
from uadtool.terminal import log

ALIKE = 1.1
"""Times the usual distance to other images, at which turned ones still look like them. Of four images each, ball screws
have 1.6 to 2.3 after every turn; magnetic tiles, which lie in any direction, 0.8 to 1.3 and mostly 1.0."""
MOST_LOOKED_UP, MOST_OTHERS = 128, 8192
"""Patches of an image that are looked up to see this, and patches of the other images that they are compared with."""


@torch.inference_mode()
def turned_samples(part: Memory, run: Run, scale: Tensor, few: Collection[str], square: Collection[str], turns: str
                   ) -> list[Sample]:
    """The training samples of the run and, of the classes ``few``, turned copies.

    Args:
        part: memories to be fitted in the run, with regions of interest. A turn that moves the region is left out.
        scale: ``Known.scale`` of the channels. By a scale from these images alone turned ones would lie farther off.
        square: classes whose images, and the input, are square; others are not turned by a quarter.
        turns: ``yes`` for all turns, ``auto`` for those after which a class looks as before, ``no`` for none.
    """
    samples = run.training.samples
    copies: list[Sample] = []
    for row, name in enumerate(sorted({str(sample.class_name) for sample in samples})):
        members = [sample for sample in samples if sample.class_name == name]
        if turns == "no" or name not in few or (turns == "auto" and len(members) < 2):
            continue
        roi = part.roi[row].numpy()
        chosen = [turn for turn in (range(1, 8) if name in square else (2, 4, 6))
                  if np.array_equal(turned(roi, turn), roi)]
        if turns == "auto" and chosen:
            upright = _scaled_patches(part, row, run.training.of(members), scale)
            usual = _distance(upright, upright)
            chosen = [turn for turn in chosen if _distance(upright, _scaled_patches(
                part, row, run.training.of(_copies(members, turn)), scale)) <= ALIKE * usual]
        if chosen:
            log.info("images of %s are learned turned and mirrored, too: %d ways of 7%s", name, len(chosen),
                     ", after which they look alike" if turns == "auto" else "")
        copies += [copy for turn in chosen for copy in _copies(members, turn)]
    return sorted([*samples, *copies], key=lambda sample: str(sample.class_name))


def in_copies(mask: Tensor, upright: Sequence[Sample], samples: Sequence[Sample]) -> Tensor:
    """Masks [N, 1, h, w] of the samples, which are upright images and turned copies of these, whose masks are given."""
    places = {sample.path: place for place, sample in enumerate(upright)}
    return torch.stack([torch.from_numpy(turned(mask[places[sample.path], 0].numpy(), sample.turn))[None]
                        for sample in samples])


def all_patches(part: Memory, images: TeacherFeatures) -> list[Tensor]:
    """What the memories see of all images: [N, C, h, w] each."""
    parts = [part.patches(images.batch(indices)[1]) for indices in images.chunks()]
    return [torch.cat(one) for one in zip(*parts)]


def at_most(count: int, patches: Tensor) -> Tensor:
    """So many of the patches [n, C] or fewer, evenly spaced."""
    return patches[::-(-len(patches) // count)]


def _copies(samples: Sequence[Sample], turn: int) -> list[Sample]:
    return [replace(sample, turn=turn) for sample in samples]


def _scaled_patches(part: Memory, row: int, images: TeacherFeatures, scale: Tensor) -> list[Tensor]:
    """What each memory of a class sees of images in its region of interest: [N, L, C] each."""
    return [patches.flatten(2)[:, :, reaching_into(part.roi[row], patches).flatten()].transpose(1, 2) * own
            for patches, own in zip(all_patches(part, images), torch.split(scale, part.channels))]


def _distance(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean distance of patches of an image to the nearest patch of the others, over images and memories."""
    found = []
    for one, other in zip(images, others):
        for number in range(len(one)):
            rest = torch.cat([other[:number], other[number + 1:]]).flatten(0, 1)
            found.append(torch.cdist(at_most(MOST_LOOKED_UP, one[number]), at_most(MOST_OTHERS, rest)).amin(1).mean())
    return float(torch.stack(found).mean())
