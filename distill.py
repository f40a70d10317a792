"""Train a student with a teacher beside it: another detector of the same classes, whatever their cfgs.

    python distill.py --cfg pruned.cfg --weights pruned.weights --t_weights runs/big/last.pt --data data/mine.data

All flags of train.py are here too, which does the same with --t_weights; the run's folder is as it leaves it. Unless
--kd asks for mgd, a step takes little more than one of train.py and a forward pass of the teacher together.
docs/distillation.md says what to choose.
"""

from collections.abc import Sequence

from utils import cli
from utils.train_flags import parse_args
from utils.training import train


def main(argv: Sequence[str] | None = None) -> None:
    """Train the student, test and save epoch by epoch."""
    train(parse_args(__doc__, argv, is_distilling=True))


if __name__ == "__main__":
    cli.run(main)
