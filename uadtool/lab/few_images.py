"""Classes of few images: none is held out; each image is looked up in banks that lack its own patches."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.data.samples import Sample
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.patch_memory import PatchMemory
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.modules import QuantizedMemory
from uadtool.lab.rows import Model
from uadtool.lab.training.loop import Run

FEW = 10
"""Different images of a class from which some are held out."""


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
        members = [number for number, sample in enumerate(samples) if sample.class_name == name]
        images, features = run.training.batch(members)
        patches = part.patches(features)
        maps, nearest = compute(images)
        before = {table: module.bank[row].clone() for table, module in tables.items()}
        for mask in _left_out(len(members), part.map_size):
            for (table, module), one in zip(tables.items(), patches):
                memory = part.get_submodule(table)
                assert isinstance(memory, PatchMemory)
                kept = F.interpolate(mask, size=one.shape[2:])[:, 0] == 0
                memory.fill(own, one.permute(0, 2, 3, 1)[kept])
                coded = QuantizedMemory(memory, module.signed) if isinstance(module, QuantizedMemory) else memory
                module.bank[row] = coded.bank[own]
            maps = torch.where(mask > 0, compute(images)[0], maps)
        for table, bank in before.items():
            tables[table].bank[row] = bank
        yield [samples[number] for number in members], images, (maps, nearest)


def _left_out(count: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Masks [count, 1, h, w], 1 where patches are left out: one image after the other, or the quarters of a single."""
    height, width = size
    quarters = [(slice(top, top + height // 2 + height % 2), slice(left, left + width // 2 + width % 2))
                for top in (0, height // 2) for left in (0, width // 2)]
    for number in range(count):
        for rows, columns in quarters if count == 1 else [(slice(None), slice(None))]:
            mask = torch.zeros(count, 1, height, width)
            mask[number, 0, rows, columns] = 1
            yield mask
