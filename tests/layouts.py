"""Datasets in their publishers' layouts, small, for the tests of the converter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def draw(path: Path, size: tuple[int, int]) -> Path:
    """Write a black picture of (height, width), whatever its ending a PNG: the least bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", (size[1], size[0])).save(path, format="PNG")
    return path


def voc_xml(objects: Sequence[tuple[Any, ...]], size: tuple[int, int] = (100, 200), extra: str = "") -> str:
    """Write an annotation of objects (name, xmin, ymin, xmax, ymax[, difficult])."""
    things = "".join(
        f"<object><name>{name}</name><difficult>{(difficult or [0])[0]}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, *difficult in objects
    )
    h, w = size
    return f"{extra}<annotation><size><width>{w}</width><height>{h}</height></size>{things}</annotation>"


def voc(root: Path, objects: dict[str, Sequence[tuple[Any, ...]]], lists: dict[str, Sequence[str]]) -> Path:
    """Lay out a VOC folder of pictures 200 wide and 100 high."""
    for stem, things in objects.items():
        draw(root / f"JPEGImages/{stem}.jpg", (100, 200))
        write(root / f"Annotations/{stem}.xml", voc_xml(things))
    for name, stems in lists.items():
        write(root / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in stems))
    return root


def small_voc(root: Path) -> Path:
    """Lay out three pictures, train a and b, test c."""
    objects = {"a": [("dog", 1, 1, 100, 50)], "b": [], "c": [("cat", 51, 26, 150, 75), ("dog", 1, 1, 20, 20)]}
    return voc(root, objects, {"trainval": "ab", "test": "c"})


def visdrone(root: Path, lines: dict[str, str]) -> Path:
    """Lay out VisDrone with one picture, 200 by 100, in each of the splits."""
    for split, text in lines.items():
        draw(root / f"VisDrone2019-DET-{split}/images/{split}_1.jpg", (100, 200))
        write(root / f"VisDrone2019-DET-{split}/annotations/{split}_1.txt", text)
    return root


def coco(
    root: Path,
    *,
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> Path:
    """Lay out COCO with the same pictures (200 by 100) in train2017 and val2017."""
    for split in ("train2017", "val2017"):
        for image in images:
            draw(root / split / image["file_name"], (100, 200))
        data = {"images": images, "annotations": annotations, "categories": categories}
        write(root / f"annotations/instances_{split}.json", json.dumps(data))
    return root


def bdd_pictures(root: Path, stems: dict[str, Sequence[str]]) -> Path:
    """Lay out BDD100K's pictures, 1280 by 720."""
    for split, names in stems.items():
        for stem in names:
            draw(root / f"images/100k/{split}/{stem}.jpg", (720, 1280))
    return root
