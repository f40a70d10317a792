"""Where detections go: pictures, videos and text files in one folder, no two sources under one name."""

from pathlib import Path

import cv2
import numpy as np

from .log import DataError, log
from .pictures import save_picture
from .sources import Frame, is_video

WRITABLE = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # endings of colour pictures


class PictureWriter:
    """Writes each source under its own name; a video's frames go to one .mp4 (or .avi for other codecs)."""

    def __init__(self, folder: Path, sources: list[str], *, fourcc: str) -> None:
        self.folder, self.fourcc = folder, fourcc
        self.paths = _distinct_paths(folder, sources, fourcc)
        self._video: cv2.VideoWriter | None = None
        self._source = ""
        self._check_originals(sources)
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame, picture: np.ndarray) -> None:
        """Write an RGB picture. Raises DataError when it cannot be written."""
        if not is_video(frame.source):
            save_picture(self.paths[frame.source], picture)
            return
        if self._source != frame.source:
            self.close()
            self._open(frame, picture)
        assert self._video is not None
        self._video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def write_text(self, frame: Frame, text: str) -> None:
        """Write the label file of a picture or, numbered, of a video's frame."""
        path = self.paths[frame.source]
        stem = f"{path.stem}_{frame.number:06d}" if is_video(frame.source) else path.stem
        path.with_name(f"{stem}.txt").write_text(text)

    def close(self) -> None:
        """Finish the video that is being written."""
        if self._video is not None:
            self._video.release()
            self._video = None

    def _check_originals(self, sources: list[str]) -> None:
        """Raise DataError where a result would replace a source, or lie among sources with labels of their own."""
        folders = {Path(source).resolve().parent for source in sources if Path(source).exists()}
        if self.folder.resolve() in folders:
            raise DataError(f"--output {self.folder}: holds pictures to detect on (give another folder)")
        there = sum(path.exists() for path in self.paths.values())
        if there:
            log.info("%s: %d results of an earlier run are replaced", self.folder, there)

    def _open(self, frame: Frame, picture: np.ndarray) -> None:
        if len(self.fourcc) != 4:
            raise DataError(f"--fourcc {self.fourcc}: expected four characters like mp4v or MJPG")
        path, (height, width) = self.paths[frame.source], picture.shape[:2]
        self._video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*self.fourcc), frame.fps, (width, height))
        if not self._video.isOpened():
            raise DataError(f"{path}: cannot be written with --fourcc {self.fourcc} (try mp4v, or MJPG)")
        self._source = frame.source


def _distinct_paths(folder: Path, sources: list[str], fourcc: str) -> dict[str, Path]:
    """Give every source a name of its own in `folder`: its file name, with the parent's where two are alike."""
    paths: dict[str, Path] = {}
    taken: set[str] = set()
    for source in sources:
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(source).name) or "stream"
        if not is_video(source) and Path(name).suffix.lower() not in WRITABLE:
            name += ".png"
        if is_video(source):
            name = Path(name).stem + (".mp4" if fourcc in ("mp4v", "avc1", "hvc1") else ".avi")
        stem, suffix, number = Path(name).stem, Path(name).suffix, 1
        while stem in taken:
            number += 1
            stem = f"{Path(name).stem}-{number}"
        taken.add(stem)
        paths[source] = folder / f"{stem}{suffix}"
    return paths
