import io
import itertools
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import corpus
import numpy as np
import pytest
from corpus import tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image, ImageCms

from uadtool.data import images
from uadtool.data.images import DEPTHS, ImageError, image_size, read_image, read_mask, read_masks, read_overview
from uadtool.data.read_ahead import read_ahead
from uadtool.errors import UadtoolError

RGB = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
"""A tiny picture whose pixels all differ, for lossless formats."""


def smooth(height: int, width: int) -> np.ndarray:
    """A picture [H, W, 3] without sharp edges, for lossy formats; its four corners differ."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    wave = 0.5 + 0.5 * np.sin(7 * x + 3 * y)
    return np.rint(255 * np.stack([x, y, wave], -1)).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def rgb(image: np.ndarray) -> np.ndarray:
    """Grey [H, W] as RGB."""
    return np.repeat(image[..., None], 3, -1)


# Formats and modes

@pytest.mark.parametrize(("suffix", "pixels", "expected", "options"), [
    *((suffix, RGB, RGB, {}) for suffix in ("png", "bmp", "tif", "ppm", "tga", "gif")),
    ("webp", RGB, RGB, {"lossless": True}), ("jp2", RGB, RGB, {"irreversible": False}),
    ("png", RGB[..., 0], rgb(RGB[..., 0]), {}), ("tif", RGB[..., 0].astype(np.float32) / 255, rgb(RGB[..., 0]), {}),
    ("png", RGB[..., 0] > 127, rgb((RGB[..., 0] > 127) * np.uint8(255)), {}),
])
def test_pixels_are_kept_as_they_are(suffix: str, pixels: np.ndarray, expected: np.ndarray, options: dict,
                                     tmp_path: Path) -> None:
    found = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **options), (3, 4))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, expected)


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    save(tmp_path / "a.png", Image.fromarray(RGB))
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.jpg"), (3, 4)), RGB)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg(options: dict, tmp_path: Path) -> None:
    picture = smooth(40, 30)
    found = read_image(save(tmp_path / "a.jpg", Image.fromarray(picture), quality=95, **options), (40, 30))
    assert np.abs(found.astype(int) - picture).max() < 32
    assert np.abs(found.astype(int) - picture).mean() < 2


def palette_image() -> Image.Image:
    """``RGB``, with a colour for each pixel."""
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("L")
    image.putpalette(RGB.reshape(-1, 3).tobytes())
    return image


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_palette(suffix: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / f"a.{suffix}", palette_image()), (3, 4)), RGB)


@pytest.mark.parametrize(("suffix", "transparency"), [("png", 5), ("gif", 5), ("png", bytes([255] * 5 + [0, 128]))])
def test_palette_with_transparency_lies_on_white(suffix: str, transparency: object, tmp_path: Path) -> None:
    expected = RGB.copy()
    expected[1, 1] = 255
    if isinstance(transparency, bytes):
        expected[1, 2] = np.rint((expected[1, 2] * 128.0 + 255 * 127) / 255)
    found = read_image(save(tmp_path / f"a.{suffix}", palette_image(), transparency=transparency), (3, 4))
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


@given(pixels=npst.arrays(np.uint8, (2, 3, 4)), grey=st.booleans())
@settings(max_examples=50)
def test_alpha_lies_on_white(pixels: np.ndarray, grey: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 2:] if grey else pixels))
    path = save(tmp_path_factory.getbasetemp() / "alpha.png", image)
    colour = rgb(pixels[..., 2]) if grey else pixels[..., :3]
    alpha = pixels[..., 3:] / 255
    found = read_image(path, (2, 3))
    np.testing.assert_allclose(found.astype(int), alpha * colour + (1 - alpha) * 255, atol=1)


def test_transparent_colour_of_rgb(tmp_path: Path) -> None:
    expected = RGB.copy()
    expected[0, 1] = 255
    path = save(tmp_path / "a.png", Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[0, 1]))
    np.testing.assert_array_equal(read_image(path, (3, 4)), expected)


def png(width: int, height: int, bits: int, colour_type: int, data: bytes) -> bytes:
    """A PNG of this data, without filters."""
    stride = len(data) // height
    lines = b"".join(b"\0" + data[i * stride:(i + 1) * stride] for i in range(height))
    return corpus.png(width, height, bits, colour_type, zlib.compress(lines))


@given(values=npst.arrays(np.uint16, (2, 3)))
@settings(max_examples=30)
def test_16_bit_grey_keeps_its_range(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected = rgb(np.rint(values / 65535 * 255))
    (folder / "16.png").write_bytes(png(3, 2, 16, 0, values.astype(">u2").tobytes()))
    (folder / "16.tif").write_bytes(tiff(3, 2, values.astype("<u2").tobytes(), t258=16))
    (folder / "inverted.tif").write_bytes(tiff(3, 2, (65535 - values).astype("<u2").tobytes(), t258=16, t262=0))
    (folder / "16.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray(values.astype(np.int32)).save(folder / "32.tif")
    Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes()).save(folder / "big.tif")
    for name in ("16.png", "16.tif", "inverted.tif", "16.pgm", "32.tif", "big.tif"):
        np.testing.assert_array_equal(read_image(str(folder / name), (2, 3)), expected, err_msg=name)


def test_12_bit_grey(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(2, 1, bytes([0xff, 0xf8, 0x00]), t258=12))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.tif"), (1, 2))[0, :, 0], [255, 128])


@given(values=npst.arrays(np.uint16, (2, 3)), depths=st.lists(st.sampled_from(DEPTHS), unique=True).map(sorted))
@settings(max_examples=100)
def test_grey_is_read_by_the_first_depth_that_fits(
    values: np.ndarray, depths: List[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = values >> np.uint16(values[0, 0] % 8)
    path = tmp_path_factory.getbasetemp() / "deep.png"
    path.write_bytes(png(3, 2, 16, 0, values.astype(">u2").tobytes()))
    bits = next((bits for bits in depths if values.max() < 2 ** bits), 16)
    expected = np.rint(values / np.float32(2 ** bits - 1) * 255)
    assert np.abs(read_image(str(path), (2, 3), depths)[..., 0] - expected).max() <= 1e-3
    assert read_overview(str(path), (2, 3))[:2] == ((2, 3), next(b for b in DEPTHS if values.max() < 2 ** b))


def cmyk_profile() -> bytes:
    """An ICC profile (v2, lut8) of a printer whose cyan ink is black and whose other inks are invisible."""
    def tag(kind: bytes, content: bytes) -> bytes:
        return kind + b"\0\0\0\0" + content

    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    linear = bytes(range(256))
    grid = b"".join(bytes([lightness, 128, 128]) for lightness in (255, 0) for _ in range(8))  # two points per ink
    lut = tag(b"mft1", bytes([4, 3, 2, 0]) + identity + 4 * linear + grid + 3 * linear)
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"A2B0", lut), (b"wtpt", tag(b"XYZ ", d50))]
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H4s28x", 2020, 1, 1, 0, 0, 0, b"acsp") + d50
    return header.ljust(128, b"\0") + table + body


LARGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (61, 47, 3), np.uint8))
"""Taller than the strips of the next test, and no multiple of them."""


@pytest.mark.parametrize(("name", "image", "options"), [
    ("a.png", LARGE, {}), ("a.png", LARGE.convert("L"), {}), ("a.png", LARGE.convert("1"), {}),
    ("a.png", LARGE.convert("P"), {}), ("a.png", LARGE.convert("RGBA").rotate(30), {}),
    ("a.png", LARGE.convert("P"), {"transparency": 7}), ("a.tif", LARGE.convert("CMYK"), {}),
    ("a.tif", LARGE.convert("CMYK"), {"icc_profile": cmyk_profile()}),
    ("a.tif", Image.fromarray(np.asarray(LARGE.convert("L"), np.float32) / 255), {}),
    ("a.png", Image.fromarray(np.asarray(LARGE.convert("L"), np.uint16) * 16), {}),
    ("a.jpg", LARGE.resize((470, 610)), {}), ("a.bmp", LARGE, {}),
])
@pytest.mark.parametrize("size", [(61, 47), (16, 16), (20, 47), (61, 9), (80, 90)])
def test_large_images_are_read_in_strips_with_the_same_result(
    name: str, image: Image.Image, options: Dict[str, Any], size: Tuple[int, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / name, image, **options)
    whole = read_image(path, size, (10, 12))
    monkeypatch.setattr(images, "STRIP", 400)
    assert np.array_equal(read_image(path, size, (10, 12)), whole)


@pytest.mark.slow
def test_a_line_scan_image_needs_little_more_memory_than_its_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", Image.new("L", (9500, 20_000), 7))
    script = """
        import sys
        from uadtool.data.images import limit_pixels, read_image
        from uadtool.host import peak_memory
        limit_pixels(200_000_000)
        before = peak_memory()
        assert (read_image(sys.argv[1], (64, 64)) == 7).all()
        print((peak_memory() - before) // 1_000_000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.png")],
                          capture_output=True, text=True, check=True)
    assert 180 < int(done.stdout) < 190 * 1.6


def antialiased(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis resized as the documentation says: rows of weights, and a result that is rounded to 8 bits."""
    scale = len(values) / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(len(values)) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    weights /= weights.sum(1, keepdims=True)
    return np.floor(np.tensordot(weights, values, 1) + 0.5)


@pytest.mark.parametrize("size", [(16, 16), (31, 47), (122, 20), (122, 94)])
def test_the_documented_resizing(size: Tuple[int, int], tmp_path: Path) -> None:
    pixels = np.asarray(LARGE, np.float64)
    expected = antialiased(antialiased(pixels.transpose(1, 0, 2), size[1]).transpose(1, 0, 2), size[0])
    difference = np.abs(read_image(save(tmp_path / "a.png", LARGE), size) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_16_bit_rgb(tmp_path: Path) -> None:
    values = RGB.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(png(4, 3, 16, 2, values.astype(">u2").tobytes()))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), (3, 4)), RGB)


@pytest.mark.parametrize(("values", "kind", "top"), [
    *((values, np.float32, 1) for values in ([-0.1, 1.0], [0.0, 1.5], [0.0, np.nan], [0.0, np.inf])),
    *((values, np.int32, 65535) for values in ([-1, 5], [0, 65536])),
])
def test_values_beyond_16_bits_or_1_are_refused(values: List[float], kind: type, top: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([values], kind)))
    with pytest.raises(ImageError, match=f"within 0 to {top}; save it with 8 or 16 bits"):
        read_image(path, (2, 2))


CMYK = {"white": (0, 0, 0, 0), "black": (0, 0, 0, 255), "cyan": (255, 0, 0, 0), "red": (0, 255, 255, 0)}


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(suffix: str, tmp_path: Path) -> None:
    for name, ink in CMYK.items():
        found = read_image(save(tmp_path / f"a.{suffix}", Image.new("CMYK", (8, 8), ink)), (8, 8))
        expected = np.array(Image.new("RGB", (8, 8), name))
        np.testing.assert_allclose(found.astype(int), expected, atol=2, err_msg=name)


@pytest.mark.parametrize("ink", [0, 128, 255])
def test_cmyk_follows_its_profile(ink: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (ink, 0, 0, 0)), icc_profile=cmyk_profile())
    lightness = 100 * (255 - ink) / 255
    luminance = ((lightness + 16) / 116) ** 3 if lightness > 8 else lightness / 903.3
    expected = 255 * (1.055 * luminance ** (1 / 2.4) - 0.055 if luminance > 0.0031308 else 12.92 * luminance)
    np.testing.assert_allclose(read_image(path, (8, 8)).astype(int), expected, atol=3)


@pytest.mark.parametrize("profile", [b"broken", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_unusable_profile_is_ignored(profile: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), CMYK["cyan"]), icc_profile=profile)
    np.testing.assert_allclose(read_image(path, (8, 8))[0, 0].astype(int), (0, 255, 255), atol=2)


@pytest.mark.parametrize(("mode", "red", "options", "tolerance"), [
    # sRGB red has L 54.3, a 80.8, b 69.9 under D50. Pillow stores a and b with an offset of 128.
    ("LAB", (138, 128 + 81, 128 + 70), {}, 6), ("YCbCr", (76, 85, 255), {"compression": "jpeg"}, 3),
])
def test_lab_and_ycbcr(mode: str, red: Tuple[int, int, int], options: dict, tolerance: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.new(mode, (16, 16), red), **options)
    np.testing.assert_allclose(read_image(path, (2, 2))[0, 0].astype(int), (255, 0, 0), atol=tolerance)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animation_is_its_first_frame(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path, (3, 4)), np.array(frames[0]))


# Orientation: where the first row and the first column of the file are, according to EXIF (EXIF 2.3, 4.6.4)

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lzw.tif": {"compression": "tiff_lzw"}, "webp": {"lossless": True}}.get(suffix, {})
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=exif, **options)
    assert image_size(path) == (3, 4)
    np.testing.assert_array_equal(read_image(path, (3, 4)), RGB)
    np.testing.assert_array_equal(read_mask(path, (3, 4)), RGB.any(-1))


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_a_resized_jpeg(orientation: int, tmp_path: Path) -> None:
    picture = smooth(360, 240)
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](picture))
    path = save(tmp_path / "a.jpg", Image.fromarray(stored), exif=exif, quality=95)
    assert image_size(path) == (360, 240)
    np.testing.assert_allclose(read_image(path, (30, 20)).astype(int), downscaled(picture, 12), atol=8)


def test_grey_16_bit_is_turned(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(3, 1, struct.pack("<3H", 0, 257, 514), t258=16, t274=6))
    assert image_size(str(tmp_path / "a.tif")) == (3, 1)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.tif"), (3, 1))[:, 0, 0], [0, 1, 2])


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    content = Path(path).read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start:start + 4], "big")
    end = content.index(b"IEND") - 4
    Path(path).write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert np.array_equal(read_image(path, (4, 3)), np.rot90(RGB, -1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_overview_of_an_image_that_is_turned(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(smooth(200, 600)), exif=exif)
    size, bits, pixels = read_overview(path, (16, 16))
    assert (size, bits) == ((600, 200), 8)
    assert np.array_equal(pixels, read_image(path, (16, 16)))


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"])
def test_broken_orientation_is_ignored(exif: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(read_image(path, (3, 4)), RGB)
    assert image_size(path) == (3, 4)


# Resizing

def downscaled(image: np.ndarray, factor: int) -> np.ndarray:
    """Antialiased bilinear: a triangle as wide as two target pixels, cut and renormalised at the border."""
    for axis in (0, 1):
        length = image.shape[axis]
        centres = (np.arange(length // factor) + 0.5) * factor - 0.5
        weights = np.maximum(0, 1 - np.abs(np.arange(length) - centres[:, None]) / factor)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


@pytest.mark.parametrize(("height", "width", "size"), [(60, 60, (20, 20)), (60, 90, (20, 30)), (45, 30, (15, 10))])
def test_resize_is_antialiased(height: int, width: int, size: Tuple[int, int], tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    found = read_image(save(tmp_path / "a.png", Image.fromarray(picture)), size)
    np.testing.assert_allclose(found.astype(int), downscaled(picture, 3), atol=1.01)


@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
       suffix=st.sampled_from(["png", "jpg"]))
@settings(max_examples=50)
def test_any_size(height: int, width: int, size: Tuple[int, int], suffix: str,
                  tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.getbasetemp() / f"size.{suffix}", Image.new("RGB", (width, height), (10, 100, 200)))
    found = read_image(path, size)
    assert found.shape == (*size, 3)
    np.testing.assert_allclose(found.reshape(-1, 3).astype(int) - (10, 100, 200), 0, atol=3)


@pytest.mark.parametrize("width", [1024, 1023, 1017])
def test_shrinking_while_decoding_is_faithful(width: int, tmp_path: Path) -> None:
    """A large JPEG with stripes against its fully decoded pixels, also if 8 does not divide its width."""
    picture = smooth(800, width)
    picture[:, width // 3:width // 3 + 9] = 255
    picture[-20:] = 0
    picture[:, -3:] = 0
    path = save(tmp_path / "a.jpg", Image.fromarray(picture), quality=95)
    with Image.open(path) as image:
        expected = np.array(image.resize((48, 64), Image.Resampling.BILINEAR))
    difference = np.abs(read_image(path, (64, 48)).astype(int) - expected)
    assert difference.mean() < 0.5
    assert difference.max() < 20


# Masks

@pytest.mark.parametrize("size", [(3, 4), (6, 8), (2, 4), (5, 12)])
def test_mask_is_resized_to_the_nearest(size: Tuple[int, int], tmp_path: Path) -> None:
    marked = np.array([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
    found = read_mask(save(tmp_path / "a.png", Image.fromarray(marked * np.uint8(255))), size)
    rows = ((np.arange(size[0]) + 0.5) * 3 / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * 4 / size[1]).astype(int)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, marked[rows][:, columns])


def test_several_masks_are_united(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{row}.png", Image.fromarray(np.arange(3)[:, None] == np.full(4, row)))
                     for row in (0, 2))
    assert read_masks([first, second], (3, 4)).tolist() == [4 * [True], 4 * [False], 4 * [True]]
    with pytest.raises(ImageError):
        read_masks([first, str(tmp_path / "none.png")], (3, 4))


def test_mask_values(tmp_path: Path) -> None:
    marked = np.array([[False, True, True], [False, False, True]])
    masks = {
        "1": Image.fromarray(marked),
        "L": Image.fromarray(marked * np.array([[1, 2, 255]], np.uint8)),
        "I": Image.fromarray(marked * np.int32(300)),
        "I;16": Image.fromarray(marked * np.uint16(256)),
        "F": Image.fromarray(marked * np.float32(0.5)),
        "P": Image.fromarray(marked * np.uint8(7)).convert("P"),
        "RGB": Image.fromarray(marked[..., None] * np.array([0, 0, 200], np.uint8)),
        "LA": Image.fromarray(np.stack([np.full((2, 3), 255, np.uint8), marked * np.uint8(9)], -1)),
        "RGBA": Image.fromarray(np.dstack([rgb(marked * np.uint8(1)), np.full((2, 3), 255, np.uint8)])),
        "CMYK": Image.fromarray(np.dstack([rgb(np.zeros((2, 3), np.uint8)), ~marked * np.uint8(255)]), "CMYK")}
    for mode, mask in masks.items():
        path = save(tmp_path / "a.tif", mask)
        np.testing.assert_array_equal(read_mask(path, (2, 3)), marked, err_msg=mode)


def test_mask_in_a_jpeg(tmp_path: Path) -> None:
    marked = np.zeros((32, 32), bool)
    marked[5:20, 9:21] = True
    path = save(tmp_path / "a.jpg", Image.fromarray(marked * np.uint8(255)), quality=75)
    np.testing.assert_array_equal(read_mask(path, (32, 32)), marked)


# What cannot be read

READERS: List[Callable[[str], object]] = [
    lambda path: read_image(path, (4, 4)), lambda path: read_mask(path, (4, 4)), image_size
]


def refused(path: Path, reader: Callable[[str], object] = READERS[0]) -> str:
    with pytest.raises(ImageError) as caught:
        reader(str(path))
    message = str(caught.value)
    assert message.startswith(f"cannot read {path}: ")
    assert "\n" not in message
    return message[len(f"cannot read {path}: "):]


@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_not_images(reader: Callable[[str], object], tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.png", reader) == "No such file or directory"
    assert refused(tmp_path / ("long" * 99), reader) == "File name too long"
    assert refused(tmp_path, reader) == "not a regular file"
    os.mkfifo(tmp_path / "fifo.png")
    assert refused(tmp_path / "fifo.png", reader) == "not a regular file"
    for name, content in {"empty.png": b"", "text.jpg": b"hello", "magic.png": b"\x89PNG\r\n\x1a\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert "not an image" in refused(tmp_path / name, reader)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch(mode=0)
    assert refused(tmp_path / "a.png") == "Permission denied"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "gif", "ppm"])
def test_truncated(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save(path, Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert refused(path)
    if suffix in ("jpg", "png"):
        assert image_size(str(path)) == (64, 64)  # only from the header


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save(path, Image.new("1", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    for reader in READERS:
        assert "more than 1400 pixels; if it is no bomb, raise --max-pixels" in refused(path, reader)


def encodings() -> Iterator[bytes]:
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "TGA"):
        file = io.BytesIO()
        Image.fromarray(smooth(16, 16)).save(file, kind)
        yield file.getvalue()


@given(content=st.sampled_from(list(encodings())), changes=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8), data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_are_read_or_refused(
    content: bytes, changes: List[Tuple[float, int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged[:data.draw(st.integers(1, len(damaged)))])
    try:
        assert read_image(str(path), (8, 8)).shape == (8, 8, 3)
    except ImageError:
        return


def test_files_are_closed(tmp_path: Path) -> None:
    good, broken = save(tmp_path / "a.png", Image.fromarray(RGB)), tmp_path / "b.tif"
    save(broken, Image.fromarray(smooth(64, 64)), compression="tiff_lzw")
    broken.write_bytes(broken.read_bytes()[:-500])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for reader in READERS:
        reader(good)
    with pytest.raises(ImageError) as caught:
        read_image(str(broken), (8, 8))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert caught.value.__cause__ is not None  # the traceback, which could keep the file open, is still alive


def test_pillow_does_not_warn(tmp_path: Path) -> None:
    save(tmp_path / "large.png", Image.new("RGB", (40, 40)))
    save(tmp_path / "palette.png", palette_image(), transparency=bytes([255] * 5 + [0, 128]))
    save(tmp_path / "exif.jpg", Image.fromarray(RGB),
         exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0")
    script = """
        import sys
        from PIL import Image
        from uadtool.data.images import read_image
        from uadtool.data.read_ahead import read_ahead
        Image.MAX_IMAGE_PIXELS = 1000
        for path, result in read_ahead(lambda path: read_image(path, (4, 4)), sys.argv[1:], 2, 4):
            assert result.shape == (4, 4, 3), result
    """
    paths = [str(tmp_path / name) for name in ("large.png", "palette.png", "exif.jpg")]
    done = subprocess.run([sys.executable, "-W", "always", "-c", textwrap.dedent(script), *paths],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Reading ahead

@given(items=st.lists(st.integers(0, 5), max_size=30), threads=st.integers(1, 4), ahead=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_read_ahead_keeps_the_order_and_the_bound(items: Sequence[int], threads: int, ahead: int) -> None:
    pulled = 0

    def source() -> Iterator[int]:
        nonlocal pulled
        for item in items:
            pulled += 1
            yield item

    def work(item: int) -> int:
        time.sleep(item / 10000)
        if item == 3:
            raise UadtoolError("three")
        return item * item

    taken = []
    for item, result in read_ahead(work, source(), threads, ahead):
        taken.append(item)
        assert pulled <= len(taken) + ahead
        assert str(result) == ("three" if item == 3 else str(item * item))
    assert taken == items


def test_read_ahead_works_in_parallel() -> None:
    together = threading.Barrier(3, timeout=10)
    results = read_ahead(lambda item: together.wait() >= 0, range(3), threads=3, ahead=3)
    assert [result for _, result in results] == [True] * 3


def test_read_ahead_works_before_it_is_asked() -> None:
    done = threading.Event()
    results = read_ahead(lambda item: done.set() if item == 2 else None, range(3), threads=1, ahead=2)
    assert next(results)[0] == 0
    assert done.wait(10)
    results.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_read_ahead_does_not_hold_back_results_while_the_source_waits(threads: int) -> None:
    more = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        yield 2
        assert more.wait(10)
        yield 3

    results = read_ahead(lambda item: -item, source(), threads, ahead=8)
    assert [next(results), next(results)] == [(1, -1), (2, -2)]
    assert not more.is_set()
    more.set()
    assert list(results) == [(3, -3)]


def test_read_ahead_raises_other_exceptions() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise UadtoolError("source")

    results = read_ahead(lambda item: item, source(), 2, 4)
    assert next(results) == (1, 1)
    with pytest.raises(UadtoolError, match="source"):
        next(results)
    results = read_ahead(lambda item: 1 // item, [1, 0, 1], 2, 4)
    assert next(results) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_read_ahead_ends_its_threads() -> None:
    before = set(threading.enumerate())
    results = read_ahead(lambda item: item, itertools.count(), 3, 5)
    next(results)
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    results.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("end", ["sys.exit(5)", "results.close(); sys.exit(5)"])
def test_program_ends_while_the_source_waits(end: str) -> None:
    script = f"""
        import os, sys
        from uadtool.data.read_ahead import read_ahead

        def source():
            yield 1
            os.read(0, 1)

        results = read_ahead(lambda item: item, source(), 2, 4)
        assert next(results) == (1, 1)
        {end}
    """
    read, write = os.pipe()
    try:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdin=read, capture_output=True,
                              timeout=30, check=False)
    finally:
        os.close(read)
        os.close(write)
    assert (done.returncode, done.stderr) == (5, b"")
