"""COCO's instances JSON: https://cocodataset.org/#format-data

Boxes are left, top, width and height from 0. Category ids have gaps, or start at 0 in other people's files: only names
say which class it is. `iscrowd` marks a group, in which detections count neither way.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .annotations import CROWD, OBJECT, Box, Choice, Part, Record, Source, read_json, to_numbers
from .log import DataError

LAYOUT = "annotations/instances_train2017.json and …_val2017.json beside train2017 and val2017"
PLACES = {  # where the annotations of a part are looked for
    "train": ("annotations/instances_train*.json", "train/_annotations.coco.json"),
    "valid": ("annotations/instances_val*.json", "valid/_annotations.coco.json"),
}
ALIASES = {  # COCO's spelling: Darknet's
    "airplane": "aeroplane",
    "couch": "sofa",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "tv": "tvmonitor",
}


def read_coco(source: Path, choice: Choice) -> Source:
    """Read train2017 and val2017, or the JSON files that `choice` names. Raises DataError."""
    parts, names = [], {}
    for part, wanted in (("train", choice.train), ("valid", choice.valid)):
        patterns = (wanted,) if wanted else PLACES[part]
        files = sorted({file for pattern in patterns for file in source.glob(pattern)})
        if len(files) != 1:
            found = f"{len(files)} files" if files else "nothing"
            raise DataError(
                f"{source}: {found} like {' or '.join(patterns)} (expected {LAYOUT}; --train and --valid name others)"
            )
        data = _load(files[0])
        folder = _image_folder(source, files[0], data["images"])
        categories = {category["id"]: " ".join(category["name"].split()) for category in data["categories"]}
        if not all(categories.values()):
            raise DataError(f"{files[0]}: has a category without a name")
        names |= categories
        boxes = defaultdict(list)
        for annotation in data["annotations"]:
            boxes[annotation["image_id"]].append(annotation)
        known = {image["id"] for image in data["images"]}
        if len(known) < len(data["images"]) or boxes.keys() - known:
            raise DataError(f"{files[0]}: an image id stands twice, or an annotation names one that is not there")
        items = [(image, boxes.get(image["id"], ())) for image in data["images"]]
        parts.append(Part(part, items, partial(_read_item, file=files[0], folder=folder, categories=categories)))
    ordered = tuple(dict.fromkeys(names[key] for key in sorted(names, key=lambda key: (isinstance(key, str), key))))
    return Source(parts, ordered, ALIASES)


def _read_item(
    item: tuple[dict[str, Any], list[dict[str, Any]]], *, file: Path, folder: Path, categories: dict[int, str]
) -> Record:
    image, annotations = item
    path = PurePosixPath(image["file_name"])
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{file}: image {image['id']}: {image['file_name']!r} leads out of the dataset")
    size = None
    if image.get("height") and image.get("width"):
        height, width = to_numbers((image["height"], image["width"]), 2, f"{file}: image {image['id']}")
        size = (int(height), int(width))
    boxes = []
    for annotation in annotations:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation["category_id"] not in categories:
            raise DataError(f"{where}: there is no category {annotation['category_id']!r}")
        x, y, w, h = to_numbers(annotation["bbox"], 4, f"{where}: 'bbox'")
        kind = CROWD if annotation.get("iscrowd") else OBJECT
        boxes.append(Box(categories[annotation["category_id"]], (x, y, x + w, y + h), kind))
    # the writer's own folder is called images, and labels are found by the last one of that name
    inner = [part for part in (folder.name, *path.parts) if part not in ("images", "JPEGImages")]
    return Record(str(file), folder / path, "/".join(inner), size, boxes)


def _load(file: Path) -> dict[str, Any]:
    data = read_json(file)
    keys = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for key, wanted in keys.items():
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(_has(row, wanted) for row in rows):
            raise DataError(
                f"{file}: is no COCO detection file (expected a list {key!r} with {', '.join(wanted)} in every row)"
            )
    if not data["images"]:
        raise DataError(f"{file}: names no image")
    return data


def _has(row: Any, wanted: tuple[str, ...]) -> bool:
    """Tell whether a row has the keys: numbers or text for ids, text for names."""
    if not isinstance(row, dict) or not row.keys() >= set(wanted):
        return False
    is_right = {"id": (int, str), "name": (str,)}
    return all(isinstance(row[key], is_right.get(key.split("_")[-1], (object,))) for key in wanted)


def _image_folder(source: Path, file: Path, images: list[dict[str, Any]]) -> Path:
    """Find the folder that holds the first picture."""
    split = file.stem.removeprefix("instances_")
    folders = [source / split, source / "images" / split, file.parent, source, source / "images", file.parent.parent]
    for folder in folders:
        if (folder / images[0]["file_name"]).is_file():
            return folder
    raise DataError(f"{file}: there is no picture {images[0]['file_name']} in {folders[0]} (expected {LAYOUT})")
