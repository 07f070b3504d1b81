"""TensorRT's messages."""

from typing import Any, List

from uadtool.terminal import log


def make_logger(trt: Any) -> Any:
    """A TensorRT logger. ``reason`` is the first error, which causes the others. Errors and warnings are logged."""
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()  # without it TensorRT crashes
            self._errors: List[str] = []

        @property
        def reason(self) -> str:
            return self._errors[0] if self._errors else "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(" ".join(message.split()))
            if severity <= trt.ILogger.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()
