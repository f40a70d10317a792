"""`.data` and `.names` files, and lists of images: a list file, a folder, a glob pattern or one image."""

import glob
from dataclasses import dataclass
from pathlib import Path

from .log import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
DATA_KEYS = {"classes", "train", "valid", "names", "max_det"}
DARKNET_DATA_KEYS = {"backup", "eval", "results", "top", "labels", "difficult", "test"}


@dataclass(frozen=True)
class DataSpec:
    """A `.data` file: class names, where the train and valid images are, and detections counted per image."""

    path: str
    names: tuple[str, ...]
    train: Path | None
    valid: Path | None
    max_det: int = 100


def load_data(path: str | Path) -> DataSpec:
    """Read a `.data` file; its paths are relative to its own folder. Raises DataError."""
    found: dict[str, str] = {}
    mistakes = []
    for number, line in enumerate(read_lines(path), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not value:
            mistakes.append(f"{path}:{number}: expected key=value, gets {line!r}")
        elif key in found:
            mistakes.append(f"{path}:{number}: sets {key!r} a second time")
        elif key in DATA_KEYS:
            found[key] = value
        elif key not in DARKNET_DATA_KEYS:
            mistakes.append(f"{path}:{number}: does not know {key!r} (expected one of {', '.join(sorted(DATA_KEYS))})")
    mistakes += [
        f"{path}: {key!r} expects a number of at least 1, gets {found[key]!r}"
        for key in ("classes", "max_det")
        if not found.get(key, "1").isdecimal() or int(found.get(key, "1")) < 1
    ]
    if "names" not in found:
        mistakes.append(f"{path}: has no names= (a file with one class name a line)")
    if mistakes:
        raise DataError("\n".join(mistakes))
    names = load_names(_relative(found["names"], path))
    if int(found.get("classes", len(names))) != len(names):
        raise DataError(f"{path}: classes={found['classes']}, but {found['names']} has {len(names)} names")
    train, valid = (_relative(found[key], path) if key in found else None for key in ("train", "valid"))
    return DataSpec(str(path), names, train, valid, int(found.get("max_det", 100)))


def load_names(path: str | Path) -> tuple[str, ...]:
    """Read class names, one a line. Raises DataError."""
    names = tuple(line.strip() for line in read_lines(path) if line.strip())
    if not names:
        raise DataError(f"{path}: has no class names (one a line)")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: names a class twice: {', '.join(repeated)}")
    return names


def list_images(source: str | Path) -> list[str]:
    """Give the images of a list file (.txt), a folder, a glob pattern or a single file. Raises DataError."""
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    elif path.is_file() and path.suffix == ".txt":
        found = [str(_relative(line.strip(), path)) for line in read_lines(path) if line.strip()]
    elif path.is_file():
        found = [str(path)]
    else:
        found = sorted(p for p in glob.glob(str(source)) if Path(p).suffix.lower() in IMAGE_SUFFIXES)
        if not found and not glob.has_magic(str(source)):
            raise DataError(f"{source}: no such file or folder")
    if not found:
        raise DataError(f"{source}: names no image (expected {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def label_path(image: str) -> Path:
    """Give the label file of an image."""
    return (_sibling(image, "labels") or Path(image)).with_suffix(".txt")


def ignore_path(image: str) -> Path | None:
    """Give the file of an image's ignored regions (utils/ignored.py), None where no folder is called `images`."""
    path = _sibling(image, "ignore")
    return path and path.with_suffix(".txt")


def read_lines(path: str | Path) -> list[str]:
    """Read a text file as lines. Raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not a text file") from None


def _relative(written: str, file: str | Path) -> Path:
    """Resolve a path written in `file`: relative to its folder, or where that is not there to the working directory."""
    beside = Path(file).parent / written
    return Path(written) if not beside.exists() and Path(written).exists() else beside


def _sibling(image: str, folder: str) -> Path | None:
    """Replace the last `images` (or `JPEGImages`) folder of a path."""
    parts = list(Path(image).parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] in ("images", "JPEGImages"):
            return Path(*parts[:place], folder, *parts[place + 1 :])
    return None
