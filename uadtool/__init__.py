"""uadtool: one anomaly-detection model for all product classes, from good images to an edge device.

The Python API of the edge half, imported on first use:

- ``open_model(path)`` opens an exported detector;
- ``predict(model, paths)`` runs it over images, folders, data sets or manifests;
- ``compare(files)`` compares the score and bench files of several models.

    model = uadtool.open_model("model.onnx")
    for image, prediction in uadtool.predict(model, "photos"):
        if not isinstance(prediction, uadtool.UadtoolError):
            print(image.path, prediction.score, prediction.anomalous)

Bad input raises ``UadtoolError``, whose message is one line.
"""

from importlib import import_module
from typing import Any, List

__version__ = "0.1.0"

_API = {"open_model": "uadtool.runtimes.opening", "predict": "uadtool.scoring.predict",
        "compare": "uadtool.comparing.comparison", "UadtoolError": "uadtool.errors"}


def __getattr__(name: str) -> Any:
    """Import a name of the API on first use (PEP 562), so that ``import uadtool`` stays fast."""
    if name not in _API:
        raise AttributeError(f"module 'uadtool' has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)


def __dir__() -> List[str]:
    return sorted([*globals(), *_API])
