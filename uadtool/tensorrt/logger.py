"""What TensorRT has to say."""

import logging
from typing import Any, List

log = logging.getLogger("uadtool")


def make_logger(trt: Any) -> Any:
    """A TensorRT logger: ``reason`` is the first error, of which others follow; all and warnings are debug messages."""
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()  # else TensorRT crashes on it
            self._errors: List[str] = []

        @property
        def reason(self) -> str:
            return self._errors[0] if self._errors else "it gives no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(" ".join(message.split()))
            if severity <= trt.ILogger.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()
