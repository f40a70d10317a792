"""Train a detector from a cfg and a .data file.

    python train.py --data data/visdrone.data --cfg cfg/yolov3-tiny.cfg --batch-size 16 --epochs 300

Writes runs/<name>/ (log, metrics.jsonl, TensorBoard events, pictures, last.pt and best.pt, and both as
Darknet .weights) and copies the checkpoints to weights/. On 2 cores with --precision bf16 YOLOv3-tiny sees about 30
images a second at 320. `--recipe darknet` trains as the cfg's [net] and [yolo] sections say.
"""

from collections.abc import Sequence

from utils import cli
from utils.train_flags import parse_args
from utils.training import train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test and save epoch by epoch."""
    train(parse_args(__doc__, argv))


if __name__ == "__main__":
    cli.run(main)
