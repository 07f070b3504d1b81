"""Errors and their exit codes. A message is one line: what was wrong, then what to do."""

import importlib
import importlib.util
from contextlib import contextmanager
from types import ModuleType
from typing import Iterator


class UadtoolError(Exception):
    """Bad input or a failed run."""

    exit_code = 1


class MissingPackage(UadtoolError):
    """An optional runtime or package is not installed."""

    exit_code = 3


class GateFailed(UadtoolError):
    """A gate (``--fail-above``, ``--gate``) failed."""

    exit_code = 4


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Turn an OSError in the block, which reads the file or folder ``name``, into a UadtoolError."""
    try:
        yield
    except OSError as error:
        raise UadtoolError(f"cannot read {name}: {error.strerror or error}") from error


def require(module: str, extra: str) -> ModuleType:
    """Import an optional ``module``, which the ``extra`` of uadtool installs.

    Raises:
        MissingPackage: the module is not installed; with the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingPackage(f"{missing} is not installed; pip install 'uadtool[{extra}]'") from error


def require_lab() -> None:
    """Require the packages of train, calibrate, quantize and export.

    Raises:
        MissingPackage: as ``require``.
    """
    for module in ("torch", "timm", "safetensors", "onnx"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(f"{module} is not installed; pip install 'uadtool[lab]' (Python 3.10 or newer)")
