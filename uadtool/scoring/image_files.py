"""A file in a folder for each image: masks of anomalous regions, and copies of the anomalous images."""

import contextlib
import shutil
from pathlib import Path
from typing import Any, Dict

import numpy as np
from PIL import Image

from uadtool.data.images import ImageError, image_size
from uadtool.data.storage import Held, is_url, open_file, without_query
from uadtool.errors import UadtoolError
from uadtool.files import WRITTEN, atomic_write, check_folder, writing
from uadtool.scoring.anomaly_maps import upsample
from uadtool.terminal import printable


class OutputFolder:
    """A folder for one file per image. It is created if necessary; leftovers of killed runs are deleted.

    It must not hold images that are scored, since the files could overwrite them. The file ``WRITTEN`` in it lists what
    was written, so that the next run can replace all of it, and ``score`` does not take it for images of the user.

    Args:
        keep: leave the files of earlier runs; otherwise they are deleted.

    Raises:
        UadtoolError: the folder cannot be created or written to.
    """

    def __init__(self, directory: str, keep: bool = False) -> None:
        self._directory = Path(directory)
        self._names: Dict[str, int] = {}  # in use, each with the last number that was added to make it unique
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UadtoolError(f"cannot create the folder {directory}: {error.strerror}") from error
        self._resolved = self._directory.resolve()
        check_folder(self._directory)
        self._written = self._directory / WRITTEN
        if not keep:
            self._delete_written()
        self._note("")

    def _delete_written(self) -> None:
        with writing(self._written), contextlib.suppress(FileNotFoundError):
            for name in self._written.read_text(encoding="utf-8", errors="replace").splitlines():
                if name and "/" not in name and not name.startswith("."):
                    (self._directory / name).unlink(missing_ok=True)
            self._written.unlink()

    def _note(self, name: str) -> None:
        with writing(self._written), self._written.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n" if name else "")

    def path(self, image: str, suffix: str) -> Path:
        """A file for an image, named after the end of its path. Every call returns another file.

        Raises:
            UadtoolError: the image lies in this folder.
        """
        is_file = not (is_url(image) or isinstance(image, Held))
        if is_file and self._resolved in (Path(image).parent.resolve(), Path(image).resolve().parent):
            raise UadtoolError(f"{image} lies in {self._directory}, and a file there could overwrite it; write into a "
                               "separate folder")
        # In a data set: class, split, defect and file. Slashes and bytes that are not UTF-8 cannot stay.
        path = Path(without_query(image))
        parts = [part for part in path.parts if part not in ("/", "..")][-4:]
        stem = printable("-".join([*parts[:-1], path.stem])).encode()[-200:].decode("utf-8", "ignore")
        suffix = printable(suffix)[-20:]
        first = name = f"{stem}{suffix}"
        while name in self._names:
            self._names[first] += 1
            name = f"{stem}-{self._names[first]}{suffix}"
        self._names[name] = 1
        output = self._directory / name
        if output.is_symlink():  # never write through a link
            output.unlink()
        self._note(name)
        return output


class Masks(OutputFolder):
    """Writes a mask of each image as PNG into ``directory``: anomalous pixels are white, in the size of the image."""

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray) -> Dict[str, str]:
        """Write the mask of an ``image`` record and its map, float32 [h, w]; returns the record's ``mask``."""
        above = upsample(anomaly_map, image_size(record["path"])) > record["threshold"]
        path = self.path(record["path"], ".png")
        with atomic_write(path, durable=False) as temporary:
            Image.fromarray(above).save(temporary, format="PNG")
        return {"mask": str(path)}


class AnomalousImages(OutputFolder):
    """Copies anomalous images into ``directory``."""

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray) -> Dict[str, str]:
        """Copy the image of a record if it is anomalous; returns the record's ``copy``."""
        if not record["anomalous"]:
            return {}
        path = self.path(record["path"], Path(without_query(record["path"])).suffix)
        try:
            image = open_file(record["path"])
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot copy {record['path']}: it no longer exists") from error
        with image, atomic_write(path, durable=False) as temporary, temporary.open("wb") as copy:
            shutil.copyfileobj(image, copy)
        return {"copy": str(path)}
