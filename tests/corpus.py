"""Image files that no test data set has but some folder will: how to make them, and whether they must be read."""

import io
import os
import pickle
import socket
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "bmp": "BMP", "webp": "WEBP", "jp2": "JPEG2000",
           "ppm": "PPM", "tga": "TGA"}


class Item(NamedTuple):
    """``make`` writes it to a path that ends in ``name``. It must be read if ``read`` is True, and be refused with a
    line that names it if False; None allows both.
    """

    name: bytes
    make: Callable[[Path], object]
    read: Optional[bool]

    def path(self, folder: Path) -> Path:
        return folder / os.fsdecode(self.name)


def make(items: List[Item], folder: Path) -> Dict[str, Item]:
    """Make the items in a folder; returns them by path."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        item.make(item.path(folder))
    return {str(item.path(folder)): item for item in items}


@lru_cache(maxsize=1)
def corpus() -> List[Item]:
    items = [*_truncated(), *_others(), *_bombs(), *_modes(), *_exif(), *_names(), *_files()]
    assert len({item.name for item in items}) == len(items)
    return items


def encoded(kind: str, pixels: Any = PIXELS, **options: Any) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def good(path: Path) -> None:
    path.write_bytes(encoded("PNG"))


def _item(name: str, content: bytes, read: Optional[bool]) -> Item:
    return Item(os.fsencode(name), lambda path: path.write_bytes(content), read)


def _truncated() -> Iterator[Item]:
    """Images cut off before and in the signature, after it, in the header, in the pixels, before the end."""
    for suffix, kind in FORMATS.items():
        whole = encoded(kind)
        sizes = {0, 1, 4, 8, 16, 24, *(len(whole) * part // 8 for part in range(1, 8)), len(whole) - 1}
        for size in sorted(sizes):
            yield _item(f"cut-{size:05}.{suffix}", whole[:size], False if size < 8 else None)
        yield _item(f"whole.{suffix}", whole, True)
        yield _item(f"more.{suffix}", whole + bytes(1000), True)


def _others() -> Iterator[Item]:
    contents = {
        "zeros": bytes(4096), "text": b"hello\n" * 100, "html": b"<!DOCTYPE html><title>404</title>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "zip": b"PK\3\4" + bytes(100),
        "elf": b"\x7fELF" + bytes(99), "pickle": pickle.dumps({"image": [1]}), "pdf": b"%PDF-1.4\n",
        "psd": b"8BPS\0\1" + bytes(40), "eps": encoded("EPS"), "ico": encoded("ICO"),
        "icns": encoded("ICNS", Image.new("RGB", (16, 16))),
        "pcx": encoded("PCX"), "dds": encoded("DDS")}
    for name, content in contents.items():
        yield _item(f"{name}-by-nature.png", content, False)
    for suffix, kind in FORMATS.items():
        yield _item(f"{suffix}-by-nature.{'png' if suffix != 'png' else 'jpg'}", encoded(kind), True)


def png(width: int, height: int, bits: int, colour: int, data: bytes, *chunks: bytes) -> bytes:
    """A PNG with this compressed data, after further chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _bombs() -> Iterator[Item]:
    """Small files of very large images or texts, and extreme shapes."""
    yield _item("bomb-3.6-gigapixels.png", png(60_000, 60_000, 1, 0, zlib.compress(bytes(1 << 20))), False)
    yield _item("bomb-largest.png", png(2**31 - 1, 2**31 - 1, 16, 6, zlib.compress(bytes(100))), False)
    yield _item("bomb-without-height.png", png(10, 0, 8, 0, zlib.compress(b"")), False)
    yield _item("bomb-in-text.png", png(1, 1, 8, 0, zlib.compress(bytes(2)),
                                        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26)))), None)
    yield _item("bomb-in-profile.png", png(1, 1, 8, 0, zlib.compress(bytes(2)),
                                           chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 26)))), None)
    yield _item("bomb-4-gigapixels.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;", False)
    jpeg = encoded("JPEG").replace(struct.pack(">HH", 48, 40), b"\xff\xff\xff\xff")
    yield _item("bomb-4-gigapixels.jpg", jpeg, False)
    sizes = 100, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0
    yield _item("bomb.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", *sizes), False)
    yield _item("bomb.tif", tiff(100_000, 100_000, bytes(64)), False)
    yield _item("bomb.ppm", b"P6 2000000000 2000000000 255\n" + bytes(64), False)
    yield _item("bomb-of-digits.ppm", b"P6 " + b"9" * 100_000 + b" 1 255\n", False)
    yield _item("one-pixel.png", encoded("PNG", PIXELS[:1, :1]), True)
    yield _item("one-pixel.jpg", encoded("JPEG", PIXELS[:1, :1]), True)
    yield _item("wide.png", encoded("PNG", np.zeros((3, 30_000, 3), np.uint8)), True)
    yield _item("tall.png", encoded("PNG", np.zeros((30_000, 3, 3), np.uint8)), True)
    yield _item("wide.jpg", encoded("JPEG", np.zeros((3, 30_000, 3), np.uint8)), True)


def tiff(width: int, height: int, data: bytes, **more: int) -> bytes:
    """A grey TIFF of one strip; ``more`` are tags, as t274=6."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data),
            **{int(name[1:]): value for name, value in more.items()}}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def _modes() -> Iterator[Item]:
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    ramp = np.linspace(0, 1, 48 * 40, dtype=np.float32).reshape(48, 40)
    yield _item("cmyk.jpg", encoded("JPEG", cmyk), True)
    yield _item("cmyk.tif", encoded("TIFF", cmyk), True)
    yield _item("cmyk-with-a-broken-profile.jpg", encoded("JPEG", cmyk, icc_profile=b"no profile"), True)
    yield _item("16-bit.png", encoded("PNG", np.rint(65535 * ramp).astype(np.uint16)), True)
    yield _item("16-bit.tif", encoded("TIFF", np.rint(65535 * ramp).astype(np.uint16)), True)
    yield _item("float.tif", encoded("TIFF", ramp), True)
    yield _item("float-beyond-1.tif", encoded("TIFF", 300 * ramp), False)
    yield _item("float-nan.tif", encoded("TIFF", np.full((4, 4), np.nan, np.float32)), False)
    yield _item("32-bit.tif", encoded("TIFF", np.full((4, 4), 1 << 30, np.int32)), False)
    yield _item("transparent.png", encoded("PNG", np.zeros((8, 8, 4), np.uint8)), True)
    frames = [Image.fromarray(np.roll(PIXELS, shift, 0)) for shift in range(5)]
    options = {"save_all": True, "append_images": frames[1:]}
    for suffix in ("gif", "png", "webp", "tif"):
        yield _item(f"animated.{suffix}", encoded(FORMATS[suffix], frames[0], **options), True)
    yield _item("several.jpg", encoded("MPO", frames[0], **options), True)


def _exif() -> Iterator[Item]:
    """Good images with broken EXIF data."""
    ifd = b"II*\0\x08\0\0\0"
    for name, exif in {
        "garbage": b"garbage", "empty": b"", "cut": ifd + b"\xff\xff\x12\x01",
        "behind-the-end": b"II*\0\xff\xff\xff\x7f",
        "orientation-99": ifd + b"\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0" + bytes(4),
        "loop": ifd + b"\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\x08\0\0\0",  # the next directory is this one
        "orientation-of-gigabytes": ifd + b"\1\0\x12\1\3\0\xff\xff\xff\x7f\x08\0\0\0" + bytes(4),
    }.items():
        for suffix in ("jpg", "png", "webp"):
            yield _item(f"exif-{name}.{suffix}", encoded(FORMATS[suffix], exif=b"Exif\0\0" + exif), True)
    yield _item("orientation-of-99.tif", tiff(4, 3, bytes(12), t274=99), True)


def _names() -> Iterator[Item]:
    """Good images with hostile names."""
    for name in ("line\nbreak", "return\r", "tab\t", "bell\a", "\x1b[31mred\x1b]0;title\a", "-o", "--help", "a'b\"c",
                 "$(id)", "<script>alert(1)<", "sp ace ", "%s%n", "a..", "\u202egnp", "\u2028", "\U0001f600", "a|b",
                 "a,b", "{}", "w" * 251):
        yield Item(os.fsencode(f"{name}.png"), good, True)
    for number, name in enumerate((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80" * 60)):
        yield Item(b"%d-%s.png" % (number, name), good, True)
    yield Item(b"CAPITALS.PNG", good, True)


def _files() -> Iterator[Item]:
    def socket_at(path: Path) -> None:
        before = os.getcwd()  # noqa: PTH109 - the path of a socket has at most 108 bytes
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(before)

    def unreadable(path: Path) -> None:
        good(path)
        path.chmod(0)

    def loop_of_two(path: Path) -> None:
        other = path.with_name("other-loop")
        other.symlink_to(path)
        path.symlink_to(other)

    def folder(path: Path) -> None:
        path.mkdir()
        (path / "round").symlink_to(path)
        (path / "up").symlink_to(path.parent)

    def link(path: Path) -> None:
        target = path.with_name("linked to")
        good(target)
        path.symlink_to(target)

    yield Item(b"fifo.png", os.mkfifo, False)
    yield Item(b"socket.png", socket_at, False)
    yield Item(b"zeros-without-end.png", lambda path: path.symlink_to("/dev/zero"), False)
    yield Item(b"nothing.png", lambda path: path.symlink_to("/dev/null"), False)
    yield Item(b"dangling.png", lambda path: path.symlink_to("nowhere.png"), False)
    yield Item(b"loop.png", lambda path: path.symlink_to(path.name), False)
    yield Item(b"loop-of-two.png", loop_of_two, False)
    yield Item(b"link.png", link, True)
    yield Item(b"unreadable.png", unreadable, os.geteuid() == 0)
    yield Item(b"folder", folder, None)  # is not read itself, but its links form a circle
