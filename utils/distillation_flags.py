"""The flags of a distillation, for train.py and distill.py."""

import argparse
import difflib

from . import cli
from .distillation import DEFAULT, SCHEDULES, TEMPERATURES, Lessons
from .head_pairs import KINDS
from .recipe import Recipe
from .schedule import AnyRecipe

FLAGS = "t_cfg t_weights kd kd_weight kd_share kd_schedule kd_temperature".split()


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """Add --t_cfg, --t_weights and those that say what is learned from the teacher."""
    add = parser.add_argument
    add("--t_cfg", "--t-cfg", default="", help="cfg of a teacher to learn from (default: the one that a .pt carries)")
    add("--t_weights", "--t-weights", default="", help=".weights or .pt of the teacher, whole")
    add(
        "--kd",
        type=kinds,
        help=f"what of it: one or several of {', '.join(KINDS)} (default: {'+'.join(DEFAULT)})",
    )
    add("--kd-weight", type=weight, default="auto", help="factor on each of these losses, a number or auto (default)")
    share = "what --kd-weight auto holds them at together, as a share of the detection loss (default: %(default)s)"
    add("--kd-share", type=cli.rate, default=Lessons.share, help=share)
    add(
        "--kd-schedule", choices=SCHEDULES, default="constant", help="cosine: falls to 0 by the end (default: constant)"
    )
    soft = ", ".join(f"{kind} {value:g}" for kind, value in TEMPERATURES.items())
    add("--kd-temperature", type=cli.rate, help=f"softens what is compared (default: {soft})")


def kinds(text: str) -> str:
    """Read strategies, between commas or plus signs (for argparse), and join them by plus signs."""
    names = list(dict.fromkeys(text.replace(",", "+").split("+")))
    for name in names:
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1) or KINDS
            raise argparse.ArgumentTypeError(f"does not know {name!r} (expected {', '.join(near)})")
    return "+".join(names)


def weight(text: str) -> float | str:
    """Read a number above 0, or "auto" (for argparse)."""
    return text if text == "auto" else cli.rate(text)


def distillation_problem(args: argparse.Namespace, given: set[str]) -> str:
    """Say what is wrong with these flags together, or nothing."""
    if not args.t_weights:
        wrong = next((name for name in FLAGS if name in given), "")
        flag = wrong if wrong.startswith("t_") else wrong.replace("_", "-")
        return f"--{flag} needs --t_weights, the teacher's" if wrong else ""
    if args.batch_size == "auto":
        return "--batch-size auto does not count what a teacher takes: give a number"
    if "kd_share" in given and args.kd_weight != "auto":
        return "--kd-share says what --kd-weight auto aims at: leave one of them out"
    chosen = args.kd or "+".join(DEFAULT)
    if "kd_temperature" in given and not set(chosen.split("+")) & TEMPERATURES.keys():
        return f"--kd-temperature means nothing to --kd {chosen} (only to {' and '.join(TEMPERATURES)})"
    return ""


def make_lessons(args: argparse.Namespace, recipe: AnyRecipe) -> Lessons:
    """Give what the flags ask for; Darknet's recipe, which gives a truth one anchor, has ours stand in for `box`."""
    return Lessons(
        tuple(args.kd.split("+")) if args.kd else DEFAULT,
        None if args.kd_weight == "auto" else args.kd_weight,
        args.kd_share,
        args.kd_schedule,
        args.kd_temperature,
        args.epochs,
        recipe if isinstance(recipe, Recipe) else Recipe(),
    )
