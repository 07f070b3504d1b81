"""Streams of frames: whole frames come out as they went in, and a broken one costs one record."""

import io
import queue
import random
import struct
import threading
import time
from typing import Callable, Iterator, List, Tuple

import numpy as np
import pytest
from corpus import encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data import frame_stream
from uadtool.data.frame_stream import SEPARATOR, Frame, split, split_raw
from uadtool.data.frames import WAITING, Frames
from uadtool.data.images import read_image
from uadtool.data.storage import open_file

PIXELS = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
THUMBNAIL = encoded("JPEG", PIXELS[::3, ::3])


def with_thumbnail() -> bytes:
    """A JPEG whose EXIF data hold another JPEG."""
    ifd0 = struct.pack("<HHHIIHHIIII", 2, 0x10E, 2, 4, 0x63, 0x112, 3, 1, 1, 0, 0)[:-4] + struct.pack("<I", 38)
    ifd1 = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, 68, 0x202, 4, 1, len(THUMBNAIL), 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + ifd0 + ifd1 + THUMBNAIL
    return encoded("JPEG", PIXELS, exif=exif)


FILES = {
    "baseline": encoded("JPEG", PIXELS), "progressive": encoded("JPEG", PIXELS, progressive=True),
    "restarts": encoded("JPEG", PIXELS, restart_marker_blocks=3), "thumbnail": with_thumbnail(),
    "smooth": encoded("JPEG", np.zeros((96, 128), np.uint8)), "png": encoded("PNG", PIXELS),
    "small png": encoded("PNG", PIXELS[:1, :1]),
}
"""Frames of one size, all but the last, which has fewer bytes than may separate frames."""


def in_pieces(data: bytes, length: int) -> Callable[[], bytes]:
    pieces = iter([data[at:at + length] for at in range(0, len(data), length)])
    return lambda: next(pieces, b"")


def found(data: bytes, length: int = 1 << 16) -> Tuple[List[bytes], List[str]]:
    """The contents of whole frames, and the problems of others."""
    frames = list(split(in_pieces(data, length)))
    return [frame.content for frame in frames if not frame.problem], [f.problem for f in frames if f.problem]


def test_the_files_are_what_they_should_be() -> None:
    assert FILES["thumbnail"].count(b"\xff\xd8\xff") == 2
    assert FILES["progressive"].count(b"\xff\xda") > 5
    assert b"\xff\xd3" in FILES["restarts"]
    for content in FILES.values():
        Image.open(io.BytesIO(content)).load()


streams = st.lists(st.sampled_from(sorted(FILES)), min_size=1, max_size=6)
jpegs = st.lists(st.sampled_from([name for name in sorted(FILES) if "png" not in name]), min_size=1, max_size=6)
pngs = st.lists(st.sampled_from(["png", "small png"]), min_size=1, max_size=6)


BETWEEN = [b"", b"\0" * 5000, b"--frame\r\nContent-Type: image/jpeg\r\n\r\n"]
"""What cameras write before a frame."""


@given(streams, st.integers(1, 5000), st.sampled_from(BETWEEN))
def test_whole_frames_come_out_as_they_went_in(names: List[str], length: int, between: bytes) -> None:
    contents = [FILES[name] for name in names]
    assert found(b"".join(between + content for content in contents) + between, length) == (contents, [])


@given(jpegs | pngs, st.data(), st.integers(1, 9000))
def test_a_frame_that_is_cut_off_costs_one_record(names: List[str], data: st.DataObject, length: int) -> None:
    """Wherever it is cut off, all other frames are found; also if its end is that of the stream.

    Only behind the metadata that may hold files: there two broken frames may look like one.
    """
    stream, expected, cuts = FILES[names[0]], [FILES[names[0]]], 0
    for name in names:
        content = FILES[name]
        if data.draw(st.booleans()):
            metadata = content.rfind(THUMBNAIL) + len(THUMBNAIL) if name == "thumbnail" else 8
            end = data.draw(st.integers(metadata, len(content) - 1))
            stream, cuts = stream + content[:end], cuts + 1
        else:
            stream += content
            expected.append(content)
    contents, problems = found(stream, length)
    assert contents == expected
    assert len(problems) == cuts
    assert all("is cut off or damaged: " in problem for problem in problems)


def test_a_jpeg_is_cut_off_anywhere() -> None:
    """Also in its EXIF data, behind the thumbnail."""
    content = FILES["thumbnail"]
    behind = content.index(b"\xff\xd8\xff", 2) + len(THUMBNAIL)
    for end in (*range(3, 1000, 7), behind - 1, behind, behind + 1, len(content) - 1):
        for after in ("baseline", "thumbnail", "png"):
            whole, problems = found(FILES["baseline"] + content[:end] + FILES[after])
            assert whole == [FILES["baseline"], FILES[after]], end
            assert len(problems) == 1


def test_a_stream_that_becomes_smaller_at_a_broken_frame_loses_few_frames() -> None:
    """Where a thumbnail could be, frames like thumbnails are left out."""
    whole, problems = found(FILES["baseline"] + FILES["thumbnail"][:100] + 5 * THUMBNAIL)
    assert whole[0] == FILES["baseline"]
    assert set(whole[1:]) == {THUMBNAIL}
    assert 3 <= len(whole[1:]) < 5
    assert len(problems) == 1


@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts", "png"])
def test_a_stream_that_is_joined_in_the_middle(name: str) -> None:
    whole, problems = found(FILES[name][-SEPARATOR - 200:] + FILES["png"])
    assert whole == [FILES["png"]]
    assert len(problems) == 1


@given(streams, st.integers(0, 2**32), st.integers(1, 20))
def test_damaged_bytes_never_raise_nor_invent_frames(names: List[str], seed: int, changes: int) -> None:
    rng = random.Random(seed)
    stream = bytearray(b"".join(FILES[name] for name in names))
    for _ in range(changes):
        at = rng.randrange(len(stream))
        stream[at:at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        stream = stream or bytearray(1)
    at = 0
    for content in found(bytes(stream), rng.randrange(1, 5000))[0]:
        assert content.startswith((b"\xff\xd8\xff", b"\x89PNG"))
        at = stream.index(content, at) + len(content)


MARKERS = [b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda\0\2", b"\xff\xe1\xff\xff", b"\xff", b"\0", b"\x89PNG\r\n\x1a\n",
           b"\0\0\0\0IEND\0\0\0\0", b"\x7f\xff\xff\xffIDAT", b"\xff\xc0\0\7\0\0\0\0\0"]


@given(st.lists(st.sampled_from(MARKERS), max_size=40), st.integers(1, 9))
def test_any_order_of_markers_is_read_to_its_end(parts: List[bytes], length: int) -> None:
    read = in_pieces(b"".join(parts), length)
    list(split(read))
    assert read() == b""


def test_a_length_that_claims_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_stream, "MOST_BYTES", 50_000)
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31 - 1, b"IDAT")
    whole, (problem,) = found(huge + FILES["baseline"])
    assert whole == [FILES["baseline"]]
    assert problem == "is cut off or damaged: it would be larger than 0 MiB"
    endless = FILES["baseline"][:-2] + bytes(60_000)
    whole, (problem,) = found(endless + FILES["baseline"], 1000)
    assert whole == [FILES["baseline"]]
    assert "larger than" in problem


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 800_000, b"IDAT"),
                                   b"\xff\xd8\xff\xe1\xff\xff", b"\xff\xd8\xff\xdb\xff\xff", b"\xff\xd8\xff\xda\0\2"])
def test_many_starts_take_no_time(start: bytes) -> None:
    began = time.process_time()
    assert found(start * (1_000_000 // len(start)))[0] == []
    assert time.process_time() - began < 10


def test_bytes_that_are_no_frames_take_no_memory() -> None:
    """The stream is endless, so it must be dropped as it comes."""
    given_out = 0

    def read() -> bytes:
        nonlocal given_out
        given_out += 1
        return b"no image" * 8192 if given_out < 500 else b""

    only, = split(read)
    assert only.problem == f"is not JPEG or PNG: {499 * 65536} bytes without a start marker"


def test_raw_frames_are_files_of_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    *whole, cut = split_raw(in_pieces(pixels.tobytes() + b"more", 700), (20, 30))
    for frame, expected in zip(whole, pixels):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(frame.content))), expected)
    assert len(whole) == 3
    assert cut == Frame(b"", ".ppm", "is cut off: 4 of 1800 bytes; does --raw say its size?")
    assert list(split_raw(in_pieces(b"", 1), (20, 30))) == []


# In a thread


class Source:
    """A stream that gives what a test puts into it, and ends with ``None``."""

    def __init__(self) -> None:
        self.pieces: "queue.SimpleQueue[object]" = queue.SimpleQueue()
        self.reads = 0

    def read(self) -> bytes:
        self.reads += 1
        piece = self.pieces.get(timeout=30)
        if isinstance(piece, BaseException):
            raise piece
        return piece or b""  # type: ignore[return-value]


def test_frames_are_samples_that_can_be_read_and_opened() -> None:
    stream = FILES["baseline"] + FILES["png"][:300] + FILES["png"]
    one, broken, other = Frames(in_pieces(stream, 777))
    assert [sample.frame for sample in (one, broken, other)] == [1, 2, 3]
    assert one.path == f"frame-1-{one.arrived.replace('-', '').replace(':', '')}.jpg"
    assert other.path.endswith(".png")
    assert broken.problem == "frame 2 is cut off or damaged: another frame starts in it"
    assert np.array_equal(read_image(other.path, (96, 128)), PIXELS)
    with open_file(one.path) as file:
        assert file.read() == FILES["baseline"]


def test_the_source_waits_while_nobody_wants_frames() -> None:
    source = Source()
    for _ in range(20):
        source.pieces.put(FILES["baseline"])
    source.pieces.put(None)
    samples = iter(Frames(source.read))
    next(samples)
    assert source.reads <= WAITING + 3
    assert len(list(samples)) == 19


def test_the_latest_frame_is_the_newest() -> None:
    source = Source()
    frames = Frames(source.read, latest=True)
    samples = iter(frames)
    for burst, newest in ((3, 3), (1, 4), (5, 9)):
        for _ in range(burst):
            source.pieces.put(FILES["small png"])
        wait_until(lambda newest=newest: [sample.frame for sample in frames._waiting] == [newest])
        assert next(samples).frame == newest
    source.pieces.put(None)
    assert list(samples) == []
    assert frames.dropped == 2 + 0 + 4


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it takes too long")


def test_the_last_frame_is_never_dropped() -> None:
    assert [sample.frame for sample in Frames(in_pieces(50 * FILES["png"], 999), latest=True)][-1] == 50


def test_a_stop_ends_the_iteration_although_the_stream_goes_on() -> None:
    source = Source()
    frames = Frames(source.read)
    source.pieces.put(FILES["png"])
    samples: Iterator[object] = iter(frames)
    next(samples)
    threading.Timer(0.1, frames.stop).start()
    assert list(samples) == []
    source.pieces.put(None)


def test_what_the_stream_raises_is_raised() -> None:
    source = Source()
    source.pieces.put(FILES["png"])
    source.pieces.put(OSError("gone"))
    samples = iter(Frames(source.read))
    assert next(samples).frame == 1
    with pytest.raises(OSError, match="gone"):
        next(samples)
