"""BCCD (364 pictures of blood cells, VOC XML) as Darknet labels: the benchmarks' small real dataset.

    python -m benchmarks.bccd runs/bccd

Reads $DARKSLIM_DATA/datasets/bccd through utils.convert: 292 training and 72 test pictures, 4,886 boxes.
"""

import sys
from pathlib import Path

from benchmarks.real_data import real_data
from utils.annotations import Choice
from utils.annotations_voc import read_voc
from utils.convert import convert, report

NAMES = ("RBC", "WBC", "Platelets")


def write_bccd(target: Path) -> Path:
    """Write the dataset below `target` and return its .data file."""
    source = real_data() / "datasets/bccd/BCCD"
    data, writer = convert(read_voc(source, Choice()), target, name="bccd", names=NAMES)
    print(report(writer))
    return data


if __name__ == "__main__":
    write_bccd(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bccd"))
