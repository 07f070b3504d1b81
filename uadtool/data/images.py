"""From an image file to the pixels that a model sees. All commands decode and resize images here."""

import io
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from uadtool.data import storage
from uadtool.errors import MissingPackage, UadtoolError

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274
"""TIFF tags; EXIF also has the last."""

FORMATS = ["PNG", "JPEG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "TGA"]
"""Supported image formats, whatever the file name. Pillow supports more, and runs Ghostscript for some."""
if find_spec("PIL.AvifImagePlugin"):  # Pillow 11.3 and later
    FORMATS.append("AVIF")

DEPTHS = (10, 12, 14, 16)
"""Bits of a camera whose grey values are stored in integers of 16 bits."""
STRIP = 1 << 24
"""Pixels of a larger image that are converted at once: what follows its decoding needs little memory."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that turns an image of this EXIF orientation upright; from 5 on, height and width change places."""

# Pillow warns of oddities that it can handle. The filter is global because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(UadtoolError):
    """An image file that cannot be read."""


def read_image(path: str, size: Tuple[int, int], depths: Sequence[int] = ()) -> NDArray[np.uint8]:
    """Decode an image as a person sees it and resize it to ``size`` (height, width), whatever its shape.

    The EXIF orientation is applied, transparent pixels lie on white, 16-bit and float grey keep their whole range, CMYK
    follows its colour profile, and an animation gives its first frame. Resizing is bilinear with antialiasing.

    Args:
        depths: numbers of bits, ascending. Grey of 16 bits is read by the first into which all its values fit, so that
            the largest of so many bits becomes 255; by 16 if there is none.

    Returns:
        RGB, uint8 [H, W, 3], values 0 to 255.

    Raises:
        ImageError: the file is missing, broken, not an image, not a regular file, or too large (``limit_pixels``).
    """
    with _opened(path) as image:
        return _decoded(image, size, depths)[0]


def read_mask(path: str, size: Tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a ground-truth mask and resize it to ``size`` (height, width) by nearest neighbour.

    A pixel belongs to a defect if it is neither black nor transparent. In a JPEG, whose black is not exact, it must be
    lighter than half.

    Returns:
        bool [H, W].

    Raises:
        ImageError: as ``read_image``.
    """
    with _opened(path) as image:
        image.load()  # EXIF data may follow the pixels
        black = 127 if image.format == "JPEG" else 0
        if image.mode in ("1", "L") and "transparency" not in image.info:
            return _nearest(image, _orientation(image), size) > black  # resized first: fewer pixels to compare
        if image.mode.startswith(("I", "F")):
            marked = np.asarray(image) != 0
        else:
            channels = np.asarray(image.convert("RGBA"))
            marked = (channels[..., :3].max(-1) > black) & (channels[..., 3] > 0)
        return _nearest(Image.fromarray(marked), _orientation(image), size)


def read_overview(path: str, size: Tuple[int, int]) -> Tuple[Tuple[int, int], int, NDArray[np.uint8]]:
    """What an image holds, with one decoding.

    Returns:
        Its (height, width) as a person sees it; the bits per channel: 8, or for 16-bit grey the first of ``DEPTHS``
        into which all values fit; and ``read_image(path, size, DEPTHS)``.

    Raises:
        ImageError: as ``read_image``.
    """
    with _opened(path) as image:
        stored = image.size
        pixels, white = _decoded(image, size, DEPTHS)
        width, height = image.size if image.format == "TIFF" else stored  # a TIFF is turned, a JPEG reduced by decoding
        return ((width, height) if _orientation(image) >= 5 else (height, width),
                white.bit_length() if white and image.mode != "F" else 8, pixels)


def limit_pixels(count: int) -> None:
    """Refuse images of more pixels than ``count`` from now on, in the whole process: a small file may hold many."""
    Image.MAX_IMAGE_PIXELS = (count + 1) // 2  # Pillow refuses twice as many


def read_masks(paths: Sequence[str], size: Tuple[int, int]) -> NDArray[np.bool_]:
    """The union of one or more masks; see ``read_mask``."""
    masks: NDArray[np.bool_] = np.logical_or.reduce([read_mask(path, size) for path in paths])
    return masks


def image_size(path: str) -> Tuple[int, int]:
    """(height, width) of an image as a person sees it, only from its header if the format allows.

    Raises:
        ImageError: as ``read_image``; damage after the header goes unnoticed.
    """
    with _opened(path) as image:
        if ORIENTATION in getattr(image, "tag_v2", ()):
            image.load()  # turns a TIFF's size; some versions of Pillow turn it earlier
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def fitted(size: Tuple[int, int], longest: int) -> Tuple[int, int]:
    """Scale ``size`` (height, width) so that its longer side is ``longest``; no side falls below 1."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image file. Any error in the block becomes an ImageError, since broken files raise all kinds."""
    try:
        with storage.open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except MissingPackage:
        raise
    except Exception as error:
        raise ImageError(f"cannot read {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or unsupported format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; if it is no bomb, raise --max-pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return f"decoder error {text}" if text.lstrip("-").isdigit() else text


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that remains to be applied, 1 to 8."""
    if image.format == "TIFF":
        return 1  # Pillow applies it while loading
    try:
        # Not the getexif of PngImageFile, which decodes all pixels to find EXIF data after them.
        orientation = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # broken EXIF data in a good image
        return 1
    return orientation if orientation in UPRIGHT else 1


def _nearest(image: Image.Image, orientation: int, size: Tuple[int, int]) -> NDArray[Any]:
    """The pixels of the image, upright, of ``size`` (height, width)."""
    return np.array(_upright(image, orientation).resize(size[::-1], Image.Resampling.NEAREST))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _decoded(image: Image.Image, size: Tuple[int, int], depths: Sequence[int]
             ) -> Tuple[NDArray[np.uint8], Optional[int]]:
    """What ``read_image`` returns, and what ``_white`` found."""
    height, width = size
    # Shrinking a JPEG by 2, 4 or 8 while decoding is cheap. At least twice the final size remains.
    side = 2 * max(size)
    draft = image.draft(image.mode, (side, side))
    image.load()  # EXIF data may follow the pixels
    orientation = _orientation(image)
    stored_size = (height, width) if orientation >= 5 else (width, height)
    white = _white(image, depths)
    pixels = _resized(image, _rgb_converter(image, white), stored_size, draft[1] if draft else None)
    return np.array(_upright(pixels, orientation)), white


Box = Tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Converter = Callable[[Image.Image], Image.Image]


def _resized(image: Image.Image, to_rgb: Converter, size: Tuple[int, int], box: Optional[Box]) -> Image.Image:
    """``to_rgb(image).resize(size, box=box)``, strip by strip if the image is large.

    The result is the same, or at most one level off where the image becomes wider: Pillow then starts with columns.

    Args:
        size: (width, height).
        box: the part of the image to take, or None for all of it.
    """
    if image.width * image.height <= STRIP:
        pixels = to_rgb(image)
        return pixels if pixels.size == size else pixels.resize(size, Image.Resampling.BILINEAR, box=box)
    left, top, right, bottom = box or (0, 0, *image.size)
    narrow, row = Image.new("RGB", (size[0], image.height)), 0
    for strip in _strips(image):
        narrow.paste(to_rgb(strip).resize((size[0], strip.height), Image.Resampling.BILINEAR,
                                          box=(left, 0, right, strip.height)), (0, row))
        row += strip.height
    return narrow.resize(size, Image.Resampling.BILINEAR, box=(0, top, size[0], bottom))


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The image in parts of its whole width, from top to bottom; a small image is one part."""
    rows = max(1, STRIP // image.width)
    for row in range(0, image.height, rows):
        whole = rows >= image.height
        yield image if whole else image.crop((0, row, image.width, min(row + rows, image.height)))


def _rgb_converter(image: Image.Image, white: Optional[int]) -> Converter:
    """The function that converts the image, or a strip of it, to RGB; ``white`` is what ``_white`` found."""
    if white:
        inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0

        def grey_to_rgb(strip: Image.Image) -> Image.Image:
            grey = np.rint(np.asarray(strip) * np.float32(255 / white)).astype(np.uint8)
            return Image.fromarray(255 - grey if inverted else grey).convert("RGB")

        return grey_to_rgb
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        return _by_profile
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return _on_white
    return lambda strip: strip.convert("RGB")


def _by_profile(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profile, srgb = io.BytesIO(image.info["icc_profile"]), ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except ImageCms.PyCMSError:  # a broken profile, or not a CMYK profile
        return image.convert("RGB")
    assert converted is not None
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _white(image: Image.Image, depths: Sequence[int]) -> Optional[int]:
    """The value of an image in 16-bit integers or float that becomes 255, see ``read_image``; None for 8 bits."""
    if not image.mode.startswith(("I", "F")):
        return None
    if image.mode == "F":
        tops = [1]
    elif getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,):
        tops = [4095]
    else:
        tops = [2 ** bits - 1 for bits in (*depths, 16)]
    strips = map(np.asarray, _strips(image))
    lows, highs = zip(*((strip.min(), strip.max()) for strip in strips))
    low, high = np.min(lows), np.max(highs)
    if not (low >= 0 and high <= tops[-1]):  # also refuses NaN
        raise ValueError(f"its values range from {low} to {high}, not within 0 to {tops[-1]}; save it with 8 or 16 "
                         "bits")
    return next(top for top in tops if high <= top)
