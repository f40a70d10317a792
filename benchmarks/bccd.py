"""BCCD (364 pictures of blood cells, VOC XML) as Darknet labels: the benchmarks' small real dataset.

    python -m benchmarks.bccd runs/bccd

Reads $DARKSLIM_DATA/datasets/bccd and writes links to the images, labels, lists and a .data file. Boxes without an area
are left out and counted.
"""

import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

NAMES = ("RBC", "WBC", "Platelets")


def write_bccd(target: Path) -> Path:
    """Write the dataset below `target` and return its .data file: 292 training and 72 test pictures."""
    source = Path(os.environ.get("DARKSLIM_DATA", "../shared/data")).resolve() / "datasets/bccd/BCCD"
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    dropped = 0
    for part, split in (("train", "trainval"), ("valid", "test")):
        stems = (source / f"ImageSets/Main/{split}.txt").read_text().split()
        for stem in stems:
            image = target / f"images/{stem}.jpg"
            image.unlink(missing_ok=True)
            image.symlink_to(source / f"JPEGImages/{stem}.jpg")
            lines, empty = _labels(source / f"Annotations/{stem}.xml")
            (target / f"labels/{stem}.txt").write_text("".join(lines))
            dropped += empty
        (target / f"{part}.txt").write_text("".join(f"images/{stem}.jpg\n" for stem in stems))
    (target / "bccd.names").write_text("\n".join(NAMES) + "\n")
    data = target / "bccd.data"
    data.write_text("classes=3\ntrain=train.txt\nvalid=valid.txt\nnames=bccd.names\n")
    print(f"{data}: {dropped} boxes without an area left out")
    return data


def _labels(annotation: Path) -> tuple[list[str], int]:
    root = ElementTree.parse(annotation).getroot()
    width, height = (float(root.findtext(f"size/{side}")) for side in ("width", "height"))
    lines, empty = [], 0
    for item in root.iter("object"):
        corners = [float(item.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = corners[0] - 1, corners[1] - 1, corners[2], corners[3]  # VOC counts pixels from 1, inclusive
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            empty += 1
            continue
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(NAMES.index(item.findtext("name"))), *(f"{value:.6f}" for value in values)]) + "\n")
    return lines, empty


if __name__ == "__main__":
    write_bccd(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bccd"))
