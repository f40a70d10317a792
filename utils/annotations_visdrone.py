"""VisDrone-DET's text files: https://github.com/VisDrone/VisDrone2018-DET-toolkit

A line is `left,top,width,height,score,category,truncation,occlusion`. Category 0 is a region to be ignored, 11
("others") no class; an object of score 0 counts neither way.
"""

from functools import partial
from pathlib import Path

from .annotations import (
    CROWD,
    OBJECT,
    REGION,
    Box,
    Choice,
    Part,
    Record,
    Source,
    check_all_annotated,
    find_folder,
    find_image,
    index_images,
    to_numbers,
)
from .lists import read_lines
from .log import DataError

CATEGORIES = (
    *("ignored regions", "pedestrian", "people", "bicycle", "car", "van"),
    *("truck", "tricycle", "awning-tricycle", "bus", "motor", "others"),
)
REGIONS, OTHERS = 0, 11


def read_visdrone(source: Path, choice: Choice) -> Source:
    """Read VisDrone2019-DET-train and -val; `choice` names other splits, such as test-dev. Raises DataError."""
    parts = []
    for part, split in (("train", choice.train or "train"), ("valid", choice.valid or "val")):
        layout = f"VisDrone2019-DET-{split} with the folders images and annotations"
        names = (f"VisDrone2019-DET-{split}", f"VisDrone2019-DET-{split}/VisDrone2019-DET-{split}")
        roots = [source / name for name in reversed(names) if (source / name / "annotations").is_dir()]
        root = roots[0] if roots else find_folder(source, names[0], expected=layout)
        annotations = find_folder(root, "annotations", expected=layout)
        images = index_images(find_folder(root, "images", expected=layout))
        files = sorted(annotations.glob("*.txt"))
        check_all_annotated(annotations, images, files)
        parts.append(Part(part, files, partial(_read_file, images=images, split=split)))
    return Source(parts)


def _read_file(file: Path, *, images: dict[str, Path], split: str) -> Record:
    boxes, dropped = [], []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        x, y, w, h, score, category, *_ = to_numbers(line.strip().rstrip(",").split(","), 8, f"{file}:{number}")
        if not REGIONS <= category <= OTHERS or category != int(category) or score not in (0, 1):
            raise DataError(f"{file}:{number}: expected a score 0 or 1 and a category 0 to 11, gets {line.strip()!r}")
        corners = (x, y, x + w, y + h)
        if category == REGIONS:
            boxes.append(Box("", corners, REGION))
        elif category == OTHERS:
            dropped.append("category 'others'")
        else:
            boxes.append(Box(CATEGORIES[int(category)], corners, OBJECT if score else CROWD))
    image = find_image(images, file.stem, str(file))
    return Record(str(file), image, f"{split}/{image.name}", None, boxes, dropped)
