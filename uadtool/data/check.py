"""A report on a data set before training: what is in it, what is odd, and whether training would refuse it."""

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np

from uadtool.data.dataset import choose_training, class_name, read_dataset
from uadtool.data.images import image_size
from uadtool.data.inspection import Look, findings, grey_bits, look_at, near_pairs, originals, sizes
from uadtool.data.layout import Dataset
from uadtool.data.roi import read_rois, with_roi
from uadtool.data.samples import SUFFIXES, Sample
from uadtool.data.splits import LEAST_HELD_OUT, LEAST_RATE, by_class, images_needed, split_held_out
from uadtool.data.storage import ignored
from uadtool.errors import UadtoolError
from uadtool.terminal import printable

ROI_CELLS = (32, 32)
"""Cells of the anomaly map of most models."""
MOST_SIZES = 5
"""Sizes of a class that the report lists, the most frequent first."""


def check(data: str, classes: Optional[Sequence[str]], held_out: float, false_positive_rate: float,
          threads: int, roi: Optional[str] = None) -> Dict[str, Any]:
    """Read every image of a data set, and describe it as schemas/check.json says, without ``schema`` and timing.

    Args:
        classes: only these classes; None for all.
        held_out, false_positive_rate, roi: as training would be asked for, with seed 0.

    Raises:
        UadtoolError: ``data`` is no data set, or a class is unknown.
    """
    dataset = read_dataset(data, classes)
    names = set(map(class_name, classes or dataset.classes))
    rows = [(sample, split) for sample, split in dataset.rows if sample.class_name in names]
    splits: Dict[Sample, str] = {sample: split for sample, split in rows if not sample.problem}
    unreadable = [{"path": sample.path, "error": sample.problem} for sample, _ in rows if sample.problem]
    looks: Dict[Sample, Look] = {}
    for sample, look in look_at(list(splits), threads):
        if isinstance(look, UadtoolError):
            unreadable.append({"path": sample.path, "error": str(look)})
        else:
            looks[sample] = look
    refusal = None
    good: List[Sample] = []
    rois: Dict[str, np.ndarray] = {}
    try:
        good = choose_training(data, dataset, classes)
        broken = sum(sample not in looks for sample in good)
        if broken:
            refusal = f"{broken} of {len(good)} training images cannot be read; mend or remove them"
        seen = [sample for sample in good if sample in looks]
        rois = read_rois(with_roi(seen, roi), sizes([looks[sample] for sample in seen]), ROI_CELLS)
    except UadtoolError as error:
        refusal = refusal or str(error)
    good_looks = [looks[sample] for sample in good if sample in looks]
    firsts = originals(good_looks)
    readable = [look.sample for look in good_looks]
    _, held = split_held_out(readable, held_out, 0, firsts)
    report = {
        "classes": {name: {**_class(name, splits, looks, held),
                           **({"roi": round(float(rois[name].mean()), 4)} if name in rois else {})}
                    for name in sorted(names)},
        "copies": _groups(readable, firsts),
        "leaks": _leaks(splits, looks),
        "blank": [look.sample.path for look in looks.values() if look.is_blank],
        "faint": [look.sample.path for look in looks.values() if look.is_faint],
        "unreadable": unreadable,
        "masks": _masks(dataset, splits, looks),
        "unused": [{"folder": folder, "images": images} for _, folder, images in dataset.unused],
        "ignored": _ignored(Path(data)) if Path(data).is_dir() else [],
    }
    return {**report, "images": len(splits), "findings": [*findings(good_looks, firsts), *_odd(
        report, held, false_positive_rate, grey_bits(good_looks))], "refusal": refusal}


def _class(name: str, splits: Dict[Sample, str], looks: Dict[Sample, Look], held_out: Iterable[Sample]
           ) -> Dict[str, Any]:
    """The counts of a class; an image without a split counts in both."""
    members = [sample for sample in splits if sample.class_name == name]
    seen = [looks[sample] for sample in members if sample in looks]
    sizes, bits = Counter(look.size for look in seen), Counter(look.bits for look in seen)
    ratios = [width / height for height, width in sizes]
    return {
        **{split: Counter(sample.label or "unlabelled" for sample in members if splits[sample] in (split, ""))
           for split in ("train", "test")},
        "held_out": sum(sample.class_name == name for sample in held_out),
        "sizes": [{"height": height, "width": width, "images": count}
                  for (height, width), count in sizes.most_common(MOST_SIZES)],
        "different_sizes": len(sizes),
        "aspect_ratios": [round(min(ratios), 4), round(max(ratios), 4)] if ratios else [],
        "bits": {str(depth): count for depth, count in sorted(bits.items())},
    }


def _groups(samples: Sequence[Sample], firsts: Sequence[int]) -> List[List[str]]:
    """The groups of copies among training images."""
    groups: Dict[int, List[str]] = defaultdict(list)
    for sample, first in zip(samples, firsts):
        groups[first].append(sample.path)
    return [paths for paths in groups.values() if len(paths) > 1]


def _leaks(splits: Dict[Sample, str], looks: Dict[Sample, Look]) -> List[List[str]]:
    """Pairs of a training and a test image of a class, or of any classes with the same pixels, that are copies."""
    pairs: Set[Tuple[str, str]] = set()
    by_content: Dict[bytes, List[Sample]] = defaultdict(list)
    for sample, look in looks.items():
        by_content[look.content].append(sample)
    for same in by_content.values():
        tests = [sample for sample in same if splits[sample] == "test"]
        pairs.update((sample.path, tests[0].path) for sample in same if splits[sample] == "train" and tests)
    for members in by_class(looks.values(), lambda look: look.sample).values():
        for numbers in near_pairs(np.stack([look.thumbnail for look in members])):
            one, other = sorted((members[number].sample for number in numbers), key=lambda s: splits[s], reverse=True)
            if (splits[one], splits[other]) == ("train", "test"):
                pairs.add((one.path, other.path))
    return [list(pair) for pair in sorted(pairs)]


def _masks(dataset: Dataset, splits: Dict[Sample, str], looks: Dict[Sample, Look]) -> Dict[str, List[str]]:
    """Masks by what is wrong with them: paths of images without, and of masks."""
    wrong: Dict[str, List[str]] = {"missing": list(dataset.unmasked), "unused": list(dataset.unused_masks),
                                   "unreadable": [], "other_size": []}
    for sample in splits:
        for mask in sample.masks:
            try:
                size = image_size(mask)
            except UadtoolError:
                wrong["unreadable"].append(mask)
                continue
            if sample in looks and size != looks[sample].size:
                wrong["other_size"].append(mask)
    return wrong


def _ignored(folder: Path) -> List[str]:
    """Folders and files below a folder that are ignored: hidden, left by a system, or no images."""
    found = []
    for here, folders, files in os.walk(folder):
        found += [os.path.join(here, name) for name in folders if ignored(name)]  # noqa: PTH118 thousands of names
        found += [os.path.join(here, name) for name in files  # noqa: PTH118
                  if ignored(name) or Path(name).suffix.lower() not in SUFFIXES]
        folders[:] = [name for name in folders if not ignored(name)]
    return sorted(found)


def _odd(report: Dict[str, Any], held_out: Sequence[Sample], rate: float, bits: Dict[str, int]) -> List[str]:
    """What is odd besides the content of good images."""
    small = [name for name, found in report["classes"].items() if 0 < found["held_out"] < LEAST_HELD_OUT]
    masks, needed = report["masks"], images_needed(rate) if rate >= LEAST_RATE else 0
    cases: List[Tuple[object, str]] = [
        (report["unreadable"], f"files or folders that cannot be read: {len(report['unreadable'])}"),
        (report["leaks"], f"pairs of a training and a test image that are copies, or nearly, which flatters the "
                          f"model: {len(report['leaks'])}"),
        (len(held_out) < needed, f"held-out images: {len(held_out)}, too few for a false-positive rate of {rate:g}, "
                                 f"which takes {needed}; new good images will exceed the threshold more often"),
        (small, f"classes with too few good images to learn what is normal: {', '.join(small)}"),
        (masks["missing"], f"images of defects without a mask: {len(masks['missing'])}"),
        (masks["unused"], f"masks of no image: {len(masks['unused'])}"),
        (masks["unreadable"], f"masks that cannot be read: {len(masks['unreadable'])}"),
        (masks["other_size"], f"masks of another size than their image: {len(masks['other_size'])}"),
        (report["unused"], "images in folders that are not used: "
                           f"{sum(place['images'] for place in report['unused'])}"),
        (bits, "bits of 16-bit grey: " + ", ".join(f"{depth} in {name}" for name, depth in bits.items())),
    ]
    return [text for condition, text in cases if condition]


def table(report: Dict[str, Any]) -> str:
    """The report of ``check`` for a person: a table of the classes, and what is odd."""
    from tabulate import tabulate  # lazy: only a person needs it

    rows = []
    for name, found in report["classes"].items():
        train, test = found["train"], found["test"]
        sizes = " ".join(f"{size['width']}x{size['height']}" for size in found["sizes"][:1])
        more = found["different_sizes"] - 1
        rows.append([printable(name), train.get("good", 0), found["held_out"],
                     *(test.get(label, 0) for label in ("good", "anomalous", "unlabelled")),
                     f"{sizes} and {more} more" if more > 0 else sizes])
    headers = ["class", "good to train on", "of these held out", "good to test on", "defects", "unlabelled", "size"]
    odd = [*report["findings"], *([f"training would refuse: {report['refusal']}"] if report["refusal"] else [])]
    return "\n".join([tabulate(rows, headers), "", *(f"- {printable(line)}" for line in odd or ["nothing is odd"])])
