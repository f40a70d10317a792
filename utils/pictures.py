"""Pictures in and out: RGB uint8 arrays [H, W, 3], upright, and files that are cut short told from whole ones."""

import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from .log import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")  # what Pillow and OpenCV both read
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
TRAILER = 4096  # bytes; cameras append that much after a JPEG's end


def read_picture(path: str) -> np.ndarray:
    """Read a picture as RGB uint8 [H, W, 3], turned upright as its EXIF data says. Raises DataError."""
    try:
        data = np.fromfile(path, np.uint8)  # OpenCV's own reader takes no path that is not UTF-8
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:  # a picture beyond OpenCV's own limit of pixels
        picture = None
    if picture is None:
        raise DataError(f"{path}: cannot be read as a picture")
    if data[:2].tobytes() == JPEG_START and JPEG_END not in data[-TRAILER:].tobytes():
        _, problem = check_picture(path)  # OpenCV fills up what a cut JPEG lacks and says nothing
        if problem:
            raise DataError(problem)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def check_picture(path: str) -> tuple[tuple[int, int], str]:
    """Decode a picture to its end and give its upright (height, width), and what is wrong with it."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            w, h = image.size
            is_turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientations that lie on their side
            image.draft("L", (max(1, w // 8), max(1, h // 8)))  # a JPEG is read in full, but decoded at an eighth
            image.load()
            return ((w, h) if is_turned else (h, w)), ""
    except FileNotFoundError:
        return (0, 0), f"{path}: no such image"
    except UnidentifiedImageError:
        return (0, 0), f"{path}: broken image: no image format known here"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return (0, 0), f"{path}: broken image: {error}"


def read_header(path: str | Path) -> tuple[tuple[int, int], int]:
    """Read a picture's (height, width) as stored and its EXIF orientation, 1 to 8, without decoding. Raises DataError.

    Orientations 5 to 8 show the picture on its side: upright its width is this height.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            # Pillow decodes a PNG to look for EXIF data behind the pixels, where OpenCV does not look
            is_plain = image.format == "PNG" and "exif" not in image.info
            orientation = 1 if is_plain else image.getexif().get(0x0112, 1)
            return (image.height, image.width), orientation if orientation in range(1, 9) else 1
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: broken image: no image format known here") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: broken image: {error}") from None


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture in the format of the path's ending. Raises DataError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        is_coded, data = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    except cv2.error:
        is_coded = False
    if not is_coded:
        raise DataError(f"{path}: cannot be written (no picture format by that ending)")
    path.write_bytes(data.tobytes())
