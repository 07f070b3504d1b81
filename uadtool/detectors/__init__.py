"""Detection methods: a registry by name, and building one from its metadata."""

from uadtool.detectors.base import Detector, Output
from uadtool.detectors.stfpm import STFPM
from uadtool.errors import UadtoolError
from uadtool.metadata import Metadata

METHODS = {"stfpm": STFPM}

__all__ = ["METHODS", "Detector", "Output", "build_detector"]


def build_detector(metadata: Metadata) -> Detector:
    """The detector that the metadata describes, in its deployed form (batch norm folded), with random weights.

    Raises:
        UadtoolError: this version does not know the method or the teacher.
    """
    if metadata.method not in METHODS:
        raise UadtoolError(f"unknown method {metadata.method!r}; this version knows {', '.join(METHODS)}")
    try:
        detector = METHODS[metadata.method](metadata.teacher, metadata.image_size, len(metadata.classes),
                                            **metadata.options)
    except TypeError as error:
        raise UadtoolError(f"the model has options {metadata.options} that this version does not know; "
                           "use the version of uadtool that made it") from error
    return detector.fold_batch_norm()
