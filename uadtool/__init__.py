"""uadtool: one anomaly-detection model for all product classes, from good images to an edge device.

The Python API, imported when it is used:

- ``uadtool.open_model(path)`` opens an exported detector;
- ``uadtool.predict(model, paths)`` runs it over images, folders, data sets or manifests;
- ``uadtool.compare(files)`` sets the results of several models side by side.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = {"open_model": "uadtool.runtimes.opening", "predict": "uadtool.scoring.predict",
        "compare": "uadtool.comparing.comparison"}


def __getattr__(name: str) -> Any:
    """PEP 562: so that ``import uadtool`` costs nothing."""
    if name not in _API:
        raise AttributeError(f"module 'uadtool' has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)
