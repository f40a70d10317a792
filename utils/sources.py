"""Where pictures to detect on come from: files, folders, globs, videos, cameras and streams."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .lists import IMAGE_SUFFIXES, read_lines
from .log import DataError
from .pictures import read_picture

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts"}
STREAMS = ("rtsp://", "rtmp://", "http://", "https://")


@dataclass(frozen=True)
class Frame:
    """An RGB picture, the file or stream it is from, its number there, and for videos the frames a second."""

    picture: np.ndarray
    source: str
    number: int = 0
    fps: float = 0.0


def list_sources(source: str) -> list[str]:
    """Give every image and video that `source` names: a file, folder, glob, camera number, URL or list of them (.txt).

    Raises DataError where it names none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    elif path.suffix in (".txt", ".streams") and path.is_file():
        found = [line.strip() for line in read_lines(path) if line.strip() and not line.startswith("#")]
        found = [str(path.parent / name) if (path.parent / name).is_file() else name for name in found]
    elif path.is_file() or is_live(source):
        return [source]
    elif glob.has_magic(source):
        found = sorted(p for p in glob.glob(source, recursive=True) if is_image(p) or is_video(p))
    else:
        raise DataError(f"--source {source}: no such file or folder")
    found = [name for name in dict.fromkeys(found) if is_live(name) or not Path(name).is_dir()]
    if not found:
        raise DataError(f"--source {source}: names no image and no video")
    return found


def is_live(source: str) -> bool:
    """Tell a camera's number or a stream's address from a file."""
    return (source.isdecimal() and not Path(source).exists()) or source.startswith(STREAMS)


def is_image(source: str) -> bool:
    """Tell an image file by its ending."""
    return Path(source).suffix.lower() in IMAGE_SUFFIXES


def is_video(source: str) -> bool:
    """Tell a video file, a camera or a stream."""
    return Path(source).suffix.lower() in VIDEO_SUFFIXES or is_live(source)


def count_frames(sources: list[str]) -> int:
    """Give the number of pictures in all sources as far as it is known, for a progress bar."""
    total = 0
    for source in sources:
        if is_video(source) and Path(source).is_file():
            capture = cv2.VideoCapture(source)
            total += max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            capture.release()
        else:
            total += 1
    return total


def read_frames(sources: list[str], broken: list[str]) -> Iterator[Frame]:
    """Read picture after picture; what cannot be read is told in `broken`, a line each, and the others go on."""
    for source in sources:
        try:
            if is_video(source):
                yield from _read_video(source)
            else:
                yield Frame(read_picture(source), source)
        except DataError as error:
            broken.append(str(error))


def _read_video(source: str) -> Iterator[Frame]:
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
        number = 0
        while True:
            is_read, picture = capture.read()
            if not is_read:
                break
            yield Frame(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), source, number, fps or 25.0)
            number += 1
        expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if number else 0
        if number == 0:
            raise DataError(f"{source}: cannot be read as a video")
        if number < 0.98 * expected - 2:  # the count of some containers is an estimate
            raise DataError(f"{source}: ends after {number} of {expected} frames (cut short?)")
    finally:
        capture.release()
