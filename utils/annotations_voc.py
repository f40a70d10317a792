"""Pascal VOC's XML, also as BCCD, raccoon and many labelling tools write it, and DIOR's.

VOC counts pixels from 1 and a box holds its last pixel: xmin 1, xmax 100 is the whole width of 100 pixels. Objects that
are `difficult` need not be found (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html). DIOR
(https://arxiv.org/abs/1909.00133) has neither `difficult` nor one spelling of its class names.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .annotations import (
    DIFFICULT,
    OBJECT,
    Box,
    Choice,
    Part,
    Record,
    Source,
    find_folder,
    find_image,
    index_images,
    read_bytes,
    to_numbers,
)
from .lists import read_lines
from .log import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
VOC_LAYOUT = "VOCdevkit/VOC2007 …, or a folder with Annotations, JPEGImages and ImageSets/Main"
DIOR_LAYOUT = "DIOR's Annotations, JPEGImages-trainval, JPEGImages-test and ImageSets/Main"
Item = tuple[Path, Path, str]  # annotation, picture, name below images/


def read_voc(source: Path, choice: Choice) -> Source:
    """Read VOC's layout: every year below VOCdevkit, or one folder alone. Raises DataError.

    Training takes trainval where a test list can be tested on, train and val otherwise. `choice` names other lists of
    ImageSets/Main, or files: .txt with a stem a line, or .csv with a column `filename`.
    """
    devkit = source / "VOCdevkit" if (source / "VOCdevkit").is_dir() else source
    years = sorted(path for path in devkit.glob("VOC20*") if path.is_dir())
    roots = years or [devkit]
    lists = {root: _lists(root) for root in roots}
    has_test = any("test" in found for found in lists.values())
    wanted = {
        "train": [choice.train] if choice.train else ["trainval", "train"] if has_test else ["train"],
        "valid": [choice.valid] if choice.valid else ["test"] if has_test else ["val"],
    }
    images = {root: index_images(find_folder(root, "JPEGImages", "images", expected=VOC_LAYOUT)) for root in roots}
    parts = []
    for part, splits in wanted.items():
        items: list[Item] = []
        for root in roots:
            split = next((split for split in splits if split in lists[root] or (source / split).is_file()), None)
            if split is None:
                continue
            annotations = find_folder(root, "Annotations", "annotations", expected=VOC_LAYOUT)
            for stem in _stems(lists[root].get(split, source / split)):
                annotation = annotations / f"{stem}.xml"
                image = find_image(images[root], stem, str(annotation))
                items.append((annotation, image, f"{root.name}/{image.name}" if years else image.name))
        if not items:
            raise DataError(
                f"{source}: has no list {' or '.join(splits)} (expected {VOC_LAYOUT}; --train and --valid name other"
                " lists, or files: .txt with a stem a line, .csv with a column 'filename')"
            )
        parts.append(Part(part, items, _read_item))
    return Source(parts, () if years else _names(parts))


def read_dior(source: Path, choice: Choice) -> Source:
    """Read DIOR: training takes its lists train and val, testing its test list. Raises DataError."""
    annotations = find_folder(source, "Annotations/Horizontal Bounding Boxes", "Annotations", expected=DIOR_LAYOUT)
    lists = find_folder(source, "ImageSets/Main", "ImageSets", "splits", expected=DIOR_LAYOUT)
    folders = [source / name for name in ("JPEGImages-trainval", "JPEGImages-test", "JPEGImages")]
    images = index_images(*[folder for folder in folders if folder.is_dir()])
    if not images:
        raise DataError(f"{source}: has no pictures (expected {DIOR_LAYOUT})")
    parts = []
    for part, splits in (("train", choice.train or "train,val"), ("valid", choice.valid or "test")):
        stems = [stem for split in splits.split(",") for stem in _stems(lists / f"{split}.txt")]
        items = []
        for stem in stems:
            image = find_image(images, stem, f"{lists}: {splits}")
            items.append((annotations / f"{stem}.xml", image, image.name))
        parts.append(Part(part, items, _read_item))
    return Source(parts)


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an annotation. A document type is refused: entities can blow a small file up. Raises DataError."""
    data = read_bytes(path)
    if b"<!DOCTYPE" in data.replace(b"\0", b""):  # also in UTF-16
        raise DataError(f"{path}: has a <!DOCTYPE (expected a plain annotation, which needs none)")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: is no XML: {error.msg} (cut short?)") from None
    except (LookupError, ValueError) as error:
        raise DataError(f"{path}: is no XML: {error}") from None


def _read_item(item: Item) -> Record:
    path, image, name = item
    root = parse_xml(path)
    size = _size(root, path)
    boxes, dropped = [], []
    for place, thing in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {place}"
        label = " ".join((thing.findtext("name") or "").split())
        if not label:
            raise DataError(f"{where}: has no <name>")
        if thing.find("bndbox") is None:
            raise DataError(f"{where}: has no <bndbox> (expected horizontal boxes)")
        x1, y1, x2, y2 = to_numbers([thing.findtext(f"bndbox/{corner}") for corner in CORNERS], 4, where)
        if x2 <= x1 or y2 <= y1:
            dropped.append("without an area")
            continue
        is_difficult = (thing.findtext("difficult") or "0").strip() == "1"
        # pixels count from 1, and the last one belongs to the box
        boxes.append(Box(label, (x1 - 1, y1 - 1, x2, y2), DIFFICULT if is_difficult else OBJECT))
    return Record(str(path), image, name, size, boxes, dropped)


def _size(root: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    if root.find("size") is None:
        return None
    height, width = to_numbers([root.findtext(f"size/{side}") for side in ("height", "width")], 2, f"{path}: <size>")
    return (int(height), int(width)) if height > 0 and width > 0 else None  # some tools write 0 by 0


def _lists(root: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((root / "ImageSets/Main").glob("*.txt"))}


def _stems(file: Path) -> list[str]:
    """Read a list's stems once each: the first word of a line, or a .csv's column `filename`."""
    lines = read_lines(file)
    if file.suffix == ".csv":
        rows = csv.DictReader(lines)
        if "filename" not in (rows.fieldnames or ()):
            raise DataError(f"{file}:1: has no column 'filename'")
        names = []
        for row in rows:
            if not row["filename"]:
                raise DataError(f"{file}:{rows.line_num}: has no filename")
            names.append(Path(row["filename"]).stem)
    else:
        names = [line.split()[0] for line in lines if line.strip()]
    return list(dict.fromkeys(names))


def _names(parts: Sequence[Part]) -> tuple[str, ...]:
    """Give the class names of all annotations, the most frequent first."""
    files = {path for part in parts for path, *_ in part.items}
    names = (" ".join((name.text or "").split()) for path in files for name in parse_xml(path).iterfind("object/name"))
    return tuple(name for name, _ in sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])))
