"""The raccoon dataset (200 pictures, one class, VOC XML) as Darknet labels: a second small real dataset.

    python -m benchmarks.raccoon runs/raccoon

Reads $DARKSLIM_DATA/datasets/raccoon through utils.convert, in its publisher's split: 160 training and 40 test
pictures, 217 boxes.
"""

import sys
from pathlib import Path

from benchmarks.real_data import real_data
from utils.annotations import Choice
from utils.annotations_voc import read_voc
from utils.convert import convert, report

SPLIT = Choice("data/train_labels.csv", "data/test_labels.csv")


def write_raccoon(target: Path) -> Path:
    """Write the dataset below `target` and return its .data file."""
    source = real_data() / "datasets/raccoon"
    data, writer = convert(read_voc(source, SPLIT), target, name="raccoon", names=("raccoon",))
    print(report(writer))
    return data


if __name__ == "__main__":
    write_raccoon(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/raccoon"))
