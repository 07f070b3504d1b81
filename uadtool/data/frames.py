"""Frames from a pipe as samples, read in a thread: all of them, or always the latest."""

import threading
from collections import deque
from typing import Deque, Iterator, List, Optional

from uadtool.data.frame_stream import Frame, Read, Size, split, split_raw
from uadtool.data.samples import Sample
from uadtool.data.storage import Held
from uadtool.host import now_exactly

WAITING = 2
"""Frames that are read before they are wanted."""


class Frames:
    """The frames of a stream as samples, from now on until its end or ``stop``. A thread reads them.

    A frame's path is a name with its number and time. It is not a file on a disk, but ``storage.open_file`` opens it.
    A frame that is cut off is a sample with a ``problem``.

    Args:
        read: the stream.
        raw: (height, width) of frames of RGB24; None for JPEG and PNG.
        latest: yield only the newest frame whenever one is wanted, and drop those before it. Otherwise the source has
            to wait.

    Attributes:
        dropped: number of frames that were dropped.

    Raises:
        Exception: ``read`` raised it; frames that were read before are yielded first.
    """

    def __init__(self, read: Read, raw: Optional[Size] = None, latest: bool = False) -> None:
        self.dropped = 0
        self._latest = latest
        self._waiting: Deque[Sample] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._failures: List[BaseException] = []
        frames = split_raw(read, raw) if raw else split(read)
        threading.Thread(target=self._read, args=(frames,), daemon=True).start()

    def __iter__(self) -> Iterator[Sample]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                sample = self._waiting.popleft()
                self._changed.notify_all()
            yield sample
        for error in self._failures:
            raise error

    def stop(self) -> None:
        """End the iteration after the frames read so far."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read(self, frames: Iterator[Frame]) -> None:
        try:
            for number, frame in enumerate(frames, 1):
                sample = _sample(frame, number)
                with self._changed:
                    if self._latest:
                        self.dropped += len(self._waiting)
                        self._waiting.clear()
                    self._changed.wait_for(lambda: len(self._waiting) < WAITING or self._ended)
                    if self._ended:
                        return
                    self._waiting.append(sample)
                    self._changed.notify_all()
        except BaseException as error:
            self._failures.append(error)
        finally:
            self.stop()


def _sample(frame: Frame, number: int) -> Sample:
    arrived = now_exactly()
    name = f"frame-{number}-{arrived.replace('-', '').replace(':', '')}{frame.suffix}"
    problem = f"frame {number} {frame.problem}" if frame.problem else None
    return Sample(Held(name, frame.content), problem=problem, frame=number, arrived=arrived)
