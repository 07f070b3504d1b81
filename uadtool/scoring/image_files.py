"""A file for each image in a folder: masks of what is anomalous, and the anomalous images themselves."""

import shutil
from pathlib import Path
from typing import Any, Dict

import numpy as np
from PIL import Image

from uadtool.data.images import ImageError, image_size, upsample
from uadtool.data.storage import is_url, open_file, without_query
from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, remove_leftovers
from uadtool.terminal import printable


class OutputFolder:
    """A folder that is made if need be, for one file per image; what a killed run left there is removed.

    No image that is scored may lie in it, for what is written there could take its place.

    Raises:
        UadtoolError: it cannot be made.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._names: Dict[str, int] = {}  # in use, and the last number that told others of this name from it
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UadtoolError(f"cannot make the folder {directory}: {error.strerror}") from error
        self._place = self._directory.resolve()
        remove_leftovers(self._directory)

    def path(self, image: str, suffix: str) -> Path:
        """A file for an image, named after the last parts of its path; every call gives another one.

        Raises:
            UadtoolError: the image lies in this folder.
        """
        if not is_url(image) and self._place in (Path(image).parent.resolve(), Path(image).resolve().parent):
            raise UadtoolError(f"{image} lies in {self._directory}, where its own picture would be written; write into "
                               "a folder of its own")
        # Class, split, defect and file of a dataset's image; bytes that are not UTF-8 and slashes cannot stay.
        named = Path(without_query(image))
        parts = [part for part in named.parts if part not in ("/", "..")][-4:]
        stem = printable("-".join([*parts[:-1], named.stem])).encode()[-200:].decode("utf-8", "ignore")
        suffix = printable(suffix)[-20:]
        wanted = name = f"{stem}{suffix}"
        while name in self._names:
            self._names[wanted] += 1
            name = f"{stem}-{self._names[wanted]}{suffix}"
        self._names[name] = 1
        path = self._directory / name
        if path.is_symlink():  # of an earlier run; what it leads to is not to be written
            path.unlink()
        return path


class Masks:
    """Writes where each image is anomalous, white on black, at the image's own size, as PNG into ``directory``."""

    def __init__(self, directory: str) -> None:
        self._folder = OutputFolder(directory)

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Dict[str, str]:
        """Write the mask of an ``image`` record and its map, float32 [h, w]; returns the record's ``mask``."""
        above = upsample(anomaly_map, image_size(record["path"])) > threshold
        path = self._folder.path(record["path"], ".png")
        with atomic_write(path, durable=False) as temporary:
            Image.fromarray(above).save(temporary, format="PNG")
        return {"mask": str(path)}


class AnomalousImages:
    """Copies anomalous images into ``directory``."""

    def __init__(self, directory: str) -> None:
        self._folder = OutputFolder(directory)

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Dict[str, str]:
        """Copy the image of a record if it is anomalous; returns the record's ``copy``."""
        if not record["anomalous"]:
            return {}
        path = self._folder.path(record["path"], Path(without_query(record["path"])).suffix)
        try:
            image = open_file(record["path"])
        except (OSError, ValueError) as error:
            raise ImageError(f"{record['path']} is gone, and was not copied") from error
        with image, atomic_write(path, durable=False) as temporary, temporary.open("wb") as copy:
            shutil.copyfileobj(image, copy)
        return {"copy": str(path)}
