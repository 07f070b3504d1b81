"""Classes of few images: none is held out; each image is looked up in banks that lack its own patches."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.data.samples import Sample
from uadtool.data.splits import split_held_out
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import CANDIDATES, PatchMemory, reaching_into
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.modules import QuantizedMemory
from uadtool.lab.rows import Model
from uadtool.lab.training.loop import Run
from uadtool.lab.turns import all_patches, at_most, in_copies

FEW = 10
"""Different images of a class from which some are held out."""


def split_few(samples: Sequence[Sample], share: float, seed: int, originals: Sequence[int]
              ) -> tuple[list[Sample], list[Sample], set[str]]:
    """``split_held_out``, but for classes of so few images that none is held out.

    Returns:
        The samples to train on, those held out, and the names of these classes.
    """
    different = [sample for number, sample in enumerate(samples) if originals[number] == number]
    few = {str(name) for name, count in Counter(sample.class_name for sample in different).items() if count < FEW}
    training, held_out = split_held_out(samples, share, seed, originals)
    return ([sample for sample in different if sample.class_name in few]
            + [sample for sample in training if sample.class_name not in few],
            [sample for sample in held_out if sample.class_name not in few], few)


@torch.inference_mode()
def left_out_maps(model: Model, part: Memory, run: Run, few: Collection[str]
                  ) -> Iterator[tuple[Sequence[Sample], Tensor, tuple[Tensor, Tensor]]]:
    """The raw maps of images of the classes ``few``, each without its own patches in the bank.

    Of a single image each quarter is looked up in the others.

    Args:
        model: with rows for these classes, which it has again afterwards.
        part: the float memories that the rows were made from; their banks change.
        run: of the part.

    Yields:
        For each class its samples, images, uint8 [N, H, W, 3], and maps [N, M, h, w] with indices of nearest classes.
    """
    compute = deployed_maps(model.module, model.metadata, 1)
    tables = {name: module for name, module in model.module.named_modules()
              if isinstance(module, (PatchMemory, QuantizedMemory))}
    samples = run.training.samples
    for own, name in enumerate(sorted({str(sample.class_name) for sample in samples})):
        if name not in few:
            continue
        row = model.metadata.classes.index(name)
        members = [sample for sample in samples if sample.class_name == name]
        upright = [sample for sample in members if sample.turn == 0]
        images, patches = run.training.of(upright).images(range(len(upright))), all_patches(
            part, run.training.of(members))
        maps, nearest = compute(images)
        before = {table: module.bank[row].clone() for table, module in tables.items()}
        for mask in _left_out(len(upright), part.roi[own]):
            masks = in_copies(mask, upright, members)
            for (table, module), one in zip(tables.items(), patches):
                memory = part.get_submodule(table)
                assert isinstance(memory, PatchMemory)
                kept = (F.interpolate(masks, size=one.shape[2:])[:, 0] == 0) & reaching_into(part.roi[own], one)
                memory.fill(own, at_most(CANDIDATES, one.permute(0, 2, 3, 1)[kept]))
                coded = QuantizedMemory(memory, module.signed) if isinstance(module, QuantizedMemory) else memory
                module.bank[row] = coded.bank[own]
            maps = torch.where(mask > 0, compute(images)[0], maps)
        for table, bank in before.items():
            tables[table].bank[row] = bank
        yield upright, images, (maps, nearest)


def _left_out(count: int, roi: Tensor) -> Iterator[Tensor]:
    """Masks [count, 1, h, w], 1 where patches are left out: one image after the other, or the quarters of a single.

    Args:
        roi: region of interest, bool [h, w]; the quarters are those of the box around it.
    """
    places = [roi.any(dim).nonzero().flatten() for dim in (1, 0)]
    (top, down), (left, across) = ((int(found[0]), int(found[-1]) + 1) for found in places)
    middle, centre = (top + down + 1) // 2, (left + across + 1) // 2
    quarters = [(slice(*rows), slice(*columns)) for rows in ((top, middle), (middle, down))
                for columns in ((left, centre), (centre, across))]
    for number in range(count):
        for rows, columns in quarters if count == 1 else [(slice(None), slice(None))]:
            mask = torch.zeros(count, 1, *roi.shape)
            mask[number, 0, rows, columns] = 1
            yield mask
