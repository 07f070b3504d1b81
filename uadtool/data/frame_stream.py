"""A stream, cut into frames: JPEG or PNG files (as ``ffmpeg -f image2pipe`` writes them), or raw pixels.

A JPEG may hold another one, its EXIF thumbnail. Therefore files are not cut at markers, but read segment by segment
(ITU-T T.81, annex B) and chunk by chunk (https://www.w3.org/TR/png/#5DataRep), without decoding them.
"""

import re
import zlib
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

MOST_BYTES = 64 << 20
"""Bytes of an encoded frame at most. A damaged length may claim gigabytes."""

LEAST_BYTES = 100
"""Bytes of a JPEG at least: a smaller segment holds no thumbnail."""

SEPARATOR = 1024
"""Bytes other than zero that may stand between two frames: an IP camera sends headers (multipart/x-mixed-replace), and
others pad their frames with zeros."""

Read = Callable[[], bytes]
"""Returns the next bytes of a stream as soon as there are any, and ``b""`` at its end."""

Size = Tuple[int, int]


class Frame(NamedTuple):
    """A frame as an image file: its content and the suffix of its name; or, with an empty content, its ``problem``."""

    content: bytes
    suffix: str = ""
    problem: str = ""


def split_raw(read: Read, size: Size) -> Iterator[Frame]:
    """The frames of a stream of raw RGB24 pixels of this (height, width), as PPM files."""
    stream, (height, width) = _Stream(read), size
    header, length = b"P6 %d %d 255\n" % (width, height), height * width * 3
    while stream.has(length):
        yield Frame(header + stream.take(length), ".ppm")
    if stream.data:
        yield Frame(b"", ".ppm", f"is cut off: {len(stream.data)} of {length} bytes; does --raw say its size?")


def split(read: Read) -> Iterator[Frame]:
    """The JPEG and PNG files of a stream, which may alternate.

    A file that is cut off or damaged in its structure is one frame with a ``problem``, and so are more bytes between
    files than ``SEPARATOR``. The next frame starts at the next start marker.
    """
    stream = _Stream(read)
    usual: Optional[Size] = None  # of the last JPEG
    broken, doubt = False, 0  # a file that starts before the byte ``doubt`` may be the thumbnail of a broken frame
    while True:
        skipped = stream.skip_to_start()
        if skipped > SEPARATOR and not broken:
            yield Frame(b"", problem=f"is not JPEG or PNG: {skipped} bytes without a start marker")
        if not stream.data:
            return
        png, doubtful = stream.data.startswith(PNG), stream.taken < doubt
        try:
            end, size = _png_end(stream) if png else _jpeg_end(stream)
        except _Cut as cut:
            if not doubtful:
                yield Frame(b"", ".png" if png else ".jpg", f"is cut off or damaged: {cut}")
            broken, doubt = True, max(doubt, stream.taken + cut.doubt)
            stream.take(cut.resume)
            continue
        content = stream.take(end)
        if doubtful and usual and size and 2 * max(size) <= max(usual):
            continue
        broken, doubt, usual = False, 0, size or usual
        yield Frame(content, ".png" if png else ".jpg")


PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_START = re.compile(re.escape(PNG) + b"|" + re.escape(JPEG))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that ends a scan: RST0 to RST7 do not, nor does an escaped 0xFF."""
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers without a segment."""
_SOF = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of segments with the size of the image."""
_APP = set(range(0xE0, 0xF0))
"""Markers of segments that may hold other files."""


class _Cut(Exception):
    """A frame that is not whole. The next one is looked for from ``resume`` on; a file before ``doubt`` may be in it.

    Both are places in bytes from its start.
    """

    def __init__(self, resume: int, reason: str, doubt: int = 0) -> None:
        super().__init__(reason)
        self.resume, self.doubt = resume, doubt


class _Stream:
    """Bytes that arrive piece by piece: ``taken`` counts those that are done with, ``data`` are the next ones."""

    def __init__(self, read: Read) -> None:
        self.data = bytearray()
        self.taken = 0
        self._read = read

    def has(self, count: int) -> bool:
        """Whether there are ``count`` bytes; waits for them."""
        while len(self.data) < count:
            if not self.more():
                return False
        return True

    def more(self) -> bool:
        """Read a piece; False at the end of the stream."""
        piece = self._read()
        self.data += piece
        return bool(piece)

    def take(self, count: int) -> bytes:
        content = bytes(self.data[:count])
        del self.data[:count]
        self.taken += len(content)
        return content

    def skip_to_start(self) -> int:
        """Drop what comes before the next start of a frame, or all. Returns the number of bytes other than zero."""
        skipped = 0
        while True:
            found = _START.search(self.data)
            dropped = self.take(found.start() if found else max(0, len(self.data) - len(PNG) + 1))
            skipped += len(dropped) - dropped.count(0)
            if found:
                return skipped
            if not self.more():
                rest = self.take(len(self.data))
                return skipped + len(rest) - rest.count(0)


def _jpeg_end(stream: _Stream) -> Tuple[int, Optional[Size]]:
    """The end of the JPEG at the start of the stream, and its (height, width).

    Raises:
        _Cut: it is not whole.
    """
    data, place, size = stream.data, 2, None
    # The last segment without its marker: its length may be wrong, and reach into the next frame. If it may hold files,
    # ``doubt`` is its end.
    resume, doubt = place, 0
    while True:
        _require(stream, place + 2, resume, doubt)
        code = data[place + 1]
        if data[place] != 0xFF or not (code in _ALONE or code >= 0xC0):
            raise _Cut(resume, "a marker is missing", doubt)
        if code == 0xFF:  # a fill byte
            place += 1
        elif code == _EOI:
            return place + 2, size
        elif code == _SOI:
            raise _Cut(place, "another frame starts in it")
        elif code in _ALONE:
            place += 2
        else:
            _require(stream, place + 4, resume, doubt)
            length, resume = int.from_bytes(data[place + 2:place + 4], "big"), place + 2
            if length < 2:
                raise _Cut(resume, "the length of a segment is wrong")
            holds_files = code in _APP and length > LEAST_BYTES
            place += 2 + length
            doubt = place if holds_files else 0
            _require(stream, place + 2, resume, doubt)
            found = _START.search(data, max(resume, place - 2) if holds_files else resume, place + 2)
            if found:
                raise _Cut(found.start(), "another frame starts in it")
            if code in _SOF and length >= 7:
                height, width = data[resume + 3:resume + 5], data[resume + 5:resume + 7]
                size = int.from_bytes(height, "big"), int.from_bytes(width, "big")
            elif code == _SOS:
                place = _scan_end(stream, place, resume)


def _scan_end(stream: _Stream, place: int, resume: int) -> int:
    """The place of the marker after the compressed pixels that start at ``place``."""
    while True:
        found = _MARKER.search(stream.data, place)
        if found:
            return found.start()
        place = max(place, len(stream.data) - 1)  # the last byte may be half of a marker
        _require(stream, len(stream.data) + 1, resume)


def _png_end(stream: _Stream) -> Tuple[int, None]:
    """As ``_jpeg_end``, without the size: a PNG holds no thumbnail."""
    place = resume = len(PNG)
    while True:
        _require(stream, place + 8, resume)
        length, kind = int.from_bytes(stream.data[place:place + 4], "big"), bytes(stream.data[place + 4:place + 8])
        if not kind.isalpha():  # bytes.isalpha is about ASCII
            raise _Cut(resume, "a chunk is missing")
        resume, end = place + 8, place + 12 + length
        _require(stream, end, resume)
        start = stream.data.find(PNG, resume, end)
        if start >= 0:
            raise _Cut(start, "another frame starts in it")
        with memoryview(stream.data) as data:
            checksum = zlib.crc32(data[place + 4:end - 4])
        if checksum != int.from_bytes(stream.data[end - 4:end], "big"):
            raise _Cut(resume, "a checksum is wrong")
        if kind == b"IEND":
            return end, None
        place = end


def _require(stream: _Stream, count: int, resume: int, doubt: int = 0) -> None:
    """Raise a ``_Cut`` with these places unless there are ``count`` bytes."""
    if count > MOST_BYTES:
        raise _Cut(resume, f"it would be larger than {MOST_BYTES >> 20} MiB", doubt)
    if not stream.has(count):
        raise _Cut(resume, "the stream ends in it", doubt)
