"""BDD100K's detection JSON, in the three generations that are about: https://doc.bdd100k.com/format.html

det_20 (2020) and bdd100k_labels_images (2018) hold a list of frames, labels/100k one file a picture. Old files say
bike, motor and person. What the official configuration ignores (bdd100k/configs/det.toml) becomes a crowd of the class
that it maps to, and so does what has the attribute `crowd`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from .annotations import (
    CROWD,
    OBJECT,
    Box,
    Choice,
    Part,
    Record,
    Source,
    find_image,
    index_images,
    read_json,
    to_numbers,
)
from .log import DataError, log

LAYOUT = "images/100k/train, images/100k/val and labels/det_20/det_train.json, det_val.json"
FILES = ("labels/det_20/det_{}.json", "labels/bdd100k_labels_images_{}.json", "bdd100k_labels_images_{}.json")
FOLDER = "labels/100k/{}"
ALIASES = {"bike": "bicycle", "motor": "motorcycle", "person": "pedestrian", "caravan": "car", "van": "car"}
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
CORNERS = ("x1", "y1", "x2", "y2")
Frame = tuple[dict[str, Any] | None, Path]  # None: a file of its own, read when its turn comes


def read_bdd100k(source: Path, choice: Choice) -> Source:
    """Read the newest generation that is there, of the splits train and val or those of `choice`. Raises DataError."""
    parts = []
    for part, split in (("train", choice.train or "train"), ("valid", choice.valid or "val")):
        roots = [root for root in (source, source / "bdd100k") if (root / f"images/100k/{split}").is_dir()]
        if not roots:
            raise DataError(f"{source}: has no images/100k/{split} (expected {LAYOUT})")
        images = index_images(roots[0] / f"images/100k/{split}")
        frames = _frames(roots[0], split)
        parts.append(Part(part, frames, partial(_read_frame, images=images, split=split)))
        log.info("%s: %d of %d pictures are annotated", frames[0][1], len(frames), len(images))
    return Source(parts, (), ALIASES)


def _frames(root: Path, split: str) -> list[Frame]:
    for name in FILES:
        file = root / name.format(split)
        if file.is_file():
            return [(frame, file) for frame in _listed(file)]
    files = sorted((root / FOLDER.format(split)).glob("*.json"))
    if not files:
        places = ", ".join(name.format(split) for name in (*FILES, FOLDER + "/*.json"))
        raise DataError(f"{root}: has no annotations of {split} (expected one of {places})")
    return [(None, file) for file in files]


def _listed(file: Path) -> list[dict[str, Any]]:
    """Give the frames of a file that holds many, as a list or, in Scalabel's newer form, below "frames"."""
    data = read_json(file)
    frames = data.get("frames") if isinstance(data, dict) else data
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) and "name" in f for f in frames):
        raise DataError(f"{file}: is no BDD100K detection file (expected a list of frames with 'name' and 'labels')")
    return frames


def _read_frame(item: Frame, *, images: dict[str, Path], split: str) -> Record:
    frame, file = item
    if frame is None:
        data = read_json(file)
        frames = data.get("frames") if isinstance(data, dict) else None
        if not isinstance(frames, list) or not frames or not isinstance(frames[0], dict) or "objects" not in frames[0]:
            raise DataError(f"{file}: is no BDD100K file of one picture (expected 'frames' with 'objects')")
        frame = {"name": data.get("name", file.stem), "labels": frames[0]["objects"]}
    image = find_image(images, Path(str(frame["name"])).stem, str(file))
    boxes, dropped = [], []
    labels = frame.get("labels") or []
    if not isinstance(labels, list):
        raise DataError(f"{file}: {frame['name']}: 'labels' is no list")
    for place, label in enumerate(labels, start=1):
        where = f"{file}: {frame['name']}, label {place}"
        if not isinstance(label, dict) or not isinstance(label.get("category"), str) or not label["category"]:
            raise DataError(f"{where}: has no category")
        corners, attributes, category = label.get("box2d"), label.get("attributes"), label["category"]
        if not corners:
            dropped.append("lanes and drivable areas")
            continue
        if not isinstance(corners, dict):
            raise DataError(f"{where}: 'box2d' is not x1, y1, x2, y2")
        box = to_numbers([corners.get(corner) for corner in CORNERS], 4, f"{where}: 'box2d'")
        is_crowd = category in IGNORED or (isinstance(attributes, dict) and bool(attributes.get("crowd")))
        boxes.append(Box(IGNORED.get(category, category), box, CROWD if is_crowd else OBJECT))
    return Record(str(file), image, f"{split}/{image.name}", None, boxes, dropped)
