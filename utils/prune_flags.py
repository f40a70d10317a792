"""The flags of normal_prune.py, and what they rule out together."""

import argparse
import re
from collections.abc import Sequence

from . import cli
from .importance import CRITERIA

PERCENT = 0.5  # of the free groups, where nothing says how much to cut
RECALIBRATE = 256  # pictures: statistics of batch normalisation settle within some hundred
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
GOALS = ("percent", "target_params", "target_flops", "target_latency", "target_speedup")


def parse_args(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(doc)
    cli.add_model_flags(parser)
    cli.add_run_flags(parser)
    add = parser.add_argument
    cli.add_size_flags(parser)
    add("--output", default="", help="folder of all results (default: the working directory, weights in weights/)")
    goal = parser.add_argument_group("how much to cut (one of)")
    goal.add_argument("--percent", type=cli.fraction, help=f"share of the free groups, 0 to 1 (default: {PERCENT})")
    goal.add_argument("--target-params", type=amount, help="parameters to reach: 5.9M, or a share of them: 0.25")
    goal.add_argument("--target-flops", type=amount, help="operations to reach: 2.5G, or a share of them: 0.25")
    goal.add_argument("--target-latency", type=cli.rate, help="milliseconds of a forward pass on this device")
    goal.add_argument("--target-speedup", type=cli.rate, help="times as fast as now on this device")
    what = parser.add_argument_group("what to cut")
    what.add_argument("--criterion", choices=CRITERIA, default="gamma", help="importance (default: gamma)")
    what.add_argument("--batches", type=cli.positive, default=16, help="batches of --criterion taylor (default: 16)")
    add("--hyp", default="", help="recipe of --criterion taylor and of --iterative (key=value lines)")
    what.add_argument(
        "--strategy",
        choices=("normal", "slim"),
        default="normal",
        help="normal leaves what shortcuts sum, slim cuts it too (default: normal)",
    )
    what.add_argument("--layers", type=cli.natural, default=0, help="whole residual blocks to take out first")
    what.add_argument(
        "--layer-keep",
        type=cli.fraction,
        default=0.05,
        help="share of its channels that every layer keeps (%(default)s)",
    )
    what.add_argument("--divisor", type=cli.positive, default=1, help="channels in multiples of this (default: 1)")
    what.add_argument(
        "--approximate", action="store_true", help="cut through gates that mix channels (ECA, CBAM's of positions) too"
    )
    after = parser.add_argument_group("what follows the cut")
    after.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="carry the constants of cut channels on (default)",
    )
    after.add_argument(
        "--recalibrate",
        type=cli.natural,
        default=RECALIBRATE,
        help="training pictures to estimate batch normalisation on, 0: none (default: %(default)s)",
    )
    after.add_argument("--max-drop", type=cli.points, help="refuse to lose more points of mAP@.5 (0 to 100)")
    after.add_argument("--force", action="store_true", help="write what the guard refuses")
    after.add_argument("--sensitivity", action="store_true", help="measure and draw what every layer can spare first")
    after.add_argument("--iterative", type=cli.positive, default=1, help="cut in this many steps, trained in between")
    after.add_argument("--epochs", type=cli.positive, default=3, help="of training between steps (default: 3)")
    add("--seed", type=cli.natural, default=0, help="seed of all randomness (default: 0)")
    args = parser.parse_args(argv)
    goals = [f"--{name.replace('_', '-')}" for name in GOALS if getattr(args, name) is not None]
    if len(goals) > 1:
        parser.error(f"{' and '.join(goals)} say how much to cut: give one of them")
    for flag, needed, is_met in (
        ("epochs", "--iterative", args.iterative > 1),
        ("batches", "--criterion taylor", args.criterion == "taylor"),
    ):
        if getattr(args, flag) != parser.get_default(flag) and not is_met:
            parser.error(f"--{flag} needs {needed}")
    if args.iterative > 1 and args.layers and not goals:
        parser.error("--iterative cuts channels in steps, and --layers alone cuts none: say how much (--percent 0.5)")
    if not goals:
        args.percent = 0.0 if args.layers else PERCENT
    return args


def amount(text: str) -> float:
    """Read a number with K, M or G behind it, or a share up to 1 (for argparse)."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([KMG]?)", text.upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a number above 0 such as 5.9M or 0.25, gets {text!r}")
    return float(match[1]) * UNITS[match[2]]
