"""What TensorRT has to say."""

import logging
from typing import Any

log = logging.getLogger("uadtool")


def make_logger(trt: Any) -> Any:
    """A TensorRT logger: ``reason`` is the last error, warnings are debug messages here."""
    class Logger(trt.ILogger):  # type: ignore[misc]
        reason = "it gives no reason"

        def __init__(self) -> None:
            super().__init__()  # else TensorRT crashes on it

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.reason = " ".join(message.split())
            elif severity == trt.ILogger.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()
