"""Lay out the solar cells of the package elpv-dataset as a data set in MVTec layout, with two classes.

usage: python solar_cells.py FOLDER

Electroluminescence images, 300 x 300 pixels, of mono- and polycrystalline cells (Buerhop-Lutz et al. 2018; licence of
the images: CC BY-NC-SA 4.0). Functional cells (defect probability 0) are good: of every five, four train and one tests.
Cells that are certainly defective (probability 1) test; uncertain cells are left out.
"""

import csv
import shutil
import sys
from collections import Counter
from pathlib import Path

import elpv_dataset

CLASSES = {"mono", "poly"}


def main(folder: Path) -> None:
    folder = folder.resolve()
    if folder.exists() and not {path.name for path in folder.iterdir()} <= CLASSES:
        sys.exit(f"{folder} holds files other than solar cells, which would be lost; name a new folder")
    source = Path(elpv_dataset.__file__).parent / "data"
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    seen: Counter[str] = Counter()
    with (source / "labels.csv").open(newline="") as labels:
        for name, probability, kind in csv.reader((" ".join(line.split()) for line in labels), delimiter=" "):
            if float(probability) == 1:
                place = "test/defective"
            elif float(probability) == 0:
                place = "test/good" if seen[kind] % 5 == 4 else "train/good"
                seen[kind] += 1
            else:
                continue
            target = partial / kind / place / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
