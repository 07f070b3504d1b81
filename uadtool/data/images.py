"""From an image file to the pixels that a model sees. All commands decode and resize images here."""

import io
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Iterator, Tuple

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


def read_image(path: str, size: Tuple[int, int]) -> NDArray[np.uint8]:
    """Decode an image as a person sees it and resize it to ``size`` (height, width), whatever its shape.

    The EXIF orientation is applied, transparent pixels lie on white, 16-bit and float grey keep their whole range, CMYK
    follows its colour profile, and an animation gives its first frame. Resizing is bilinear with antialiasing.

    Returns:
        RGB, uint8 [H, W, 3], values 0 to 255.

    Raises:
        ImageError: the file is missing, broken, not an image, not a regular file, or too large (Pillow's limit).
    """
    height, width = size
    with _opened(path) as image:
        # Shrinking a JPEG by 2, 4 or 8 while decoding is cheap. At least twice the final size remains.
        side = 2 * max(size)
        draft = image.draft(image.mode, (side, side))
        pixels = _to_rgb(image)
        orientation = _orientation(image)
        stored_size = (height, width) if orientation >= 5 else (width, height)
        if pixels.size != stored_size:
            pixels = pixels.resize(stored_size, Image.Resampling.BILINEAR, box=draft[1] if draft else None)
        return np.array(_upright(pixels, orientation))


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
        black = 127 if image.format == "JPEG" else 0
        if image.mode.startswith(("I", "F")):
            marked = np.asarray(image) != 0
        elif image.mode in ("1", "L") and "transparency" not in image.info:
            marked = np.asarray(image) > black
        else:
            channels = np.asarray(image.convert("RGBA"))
            marked = (channels[..., :3].max(-1) > black) & (channels[..., 3] > 0)
        mask = _upright(Image.fromarray(marked), _orientation(image))
        return np.array(mask.resize(size[::-1], Image.Resampling.NEAREST))


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


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        from PIL import ImageCms

        profile, srgb = io.BytesIO(image.info["icc_profile"]), ImageCms.createProfile("sRGB")
        try:
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            assert converted is not None
            return converted
        except ImageCms.PyCMSError:
            pass  # a broken profile, or not a CMYK profile
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """8-bit grey [H, W] from 12 or 16 bits or float; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tags = getattr(image, "tag_v2", {})
    top = 1 if image.mode == "F" else 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ValueError(f"its values range from {low} to {high}, not within 0 to {top}; save it with 8 or 16 bits")
    scaled = np.rint(values * np.float32(255 / top)).astype(np.uint8)
    return 255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled


def upsample(anomaly_map: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize a float32 map [h, w] to ``size`` (height, width) bilinearly, pixel centres aligned."""
    return np.asarray(Image.fromarray(anomaly_map).resize(size[::-1], Image.Resampling.BILINEAR))
