"""The flags of train.py and distill.py, what they rule out together, and the recipe that they choose."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models import Cfg
from models.grid import is_quantised

from . import cli, dist
from .darknet_recipe import read_darknet_recipe
from .distillation_flags import add_distillation_flags, distillation_problem
from .log import DataError, log
from .recipe import Recipe, load_recipe
from .schedule import AnyRecipe
from .sparsity import SCHEDULES, Penalty

EPOCHS, BATCH_SIZE = 300, 16
OURS = "hyp lr adam multi_scale rect".split()  # flags that mean nothing where the cfg is the recipe


def parse_args(doc: str | None, argv: Sequence[str] | None, *, is_distilling: bool = False) -> argparse.Namespace:
    """Read the command line; `is_distilling` asks for a teacher."""
    parser = cli.make_parser(doc)
    cli.add_model_flags(parser, is_training=True)
    cli.add_run_flags(parser, is_training=True)
    add = parser.add_argument
    add("--img-size", type=cli.side, nargs="+", default=[], help="longer side in pixels: N, or MIN MAX [TEST]")
    add("--epochs", type=cli.positive, help=f"passes over the images (default: {EPOCHS}; darknet: max_batches)")
    add("--name", default="", help="folder under runs/ (default: the cfg's name)")
    add("--seed", type=cli.natural, default=0, help="seed of all randomness (default: 0)")
    add("--recipe", choices=("darkslim", "darknet"), default="darkslim", help="ours (default), or what the cfg says")
    add("--hyp", default="", help="file of key=value lines over the recipe's defaults")
    add("--lr", type=cli.rate, help=f"peak learning rate (default: {Recipe.lr})")
    add("--adam", action="store_true", help="AdamW (at a twentieth of --lr) instead of SGD")
    add("--multi-scale", action="store_true", help="draw a size between MIN and MAX for every batch")
    add("--rect", action="store_true", help="batches of like shapes, without mosaic")
    add("--cache-images", nargs="?", const="ram", choices=("ram", "disk"), help="keep decoded images (default: in ram)")
    add("--w-bits", type=cli.bits, help="bits of the weights of all quantised convolutions (default: as in the cfg)")
    add("--a-bits", type=cli.bits, help="bits of their inputs (default: as in the cfg)")
    add("--freeze", type=cli.natural, default=0, help="leave the first N layers as they are (default: 0)")
    add("--patience", type=cli.positive, help="stop after N epochs without a better mAP (default: never)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--notest", action="store_true", help="test after the last epoch only")
    add("--nosave", action="store_true", help="write checkpoints after the last epoch only")
    add("--sync-bn", action="store_true", help="batch normalisation over the GPUs of all processes")
    add("--resume", nargs="?", const="weights/last.pt", help="go on with a last.pt, as it was started")
    add("-sr", "--sparsity-regularization", action="store_true", help="sparse training for pruning")
    add("--s", type=strength, default=1e-4, help="strength of -sr on γ, a number (default: %(default)s) or auto")
    schedule = "global: a hundredth of s after --sr-epoch; local: so for the channels that are to stay"
    add("--sr-schedule", choices=SCHEDULES, help=f"{schedule} (default: constant; with --s auto local)")
    add("--sr-epoch", type=cli.positive, help="epochs of s in full (default: half of all; with --s auto a tenth)")
    add(
        "--sr-target", type=cli.fraction, default=0.5, help="share of the channels that is to go (default: %(default)s)"
    )
    add_distillation_flags(parser)
    args = parser.parse_args(argv)
    if is_distilling and not (args.t_weights or args.resume):
        parser.error("give --t_weights, the teacher's, and with a .weights file its --t_cfg")
    if problem := _problem(args, parser):
        parser.error(problem)
    args.processes = dist.world_size()
    return args


def strength(text: str) -> float | str:
    """Read a number above 0, or "auto" (for argparse)."""
    if text == "auto":
        return text
    try:
        float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, gets {text!r}") from None
    return cli.rate(text)


def restore_args(args: argparse.Namespace, resumed: dict[str, Any]) -> argparse.Namespace:
    """Give the settings that the interrupted run was started with; only device and workers may change."""
    if "settings" not in resumed:
        raise DataError(f"{args.resume}: carries no settings of a training (only a last.pt of train.py does)")
    if "trainer" not in resumed:
        raise DataError(f"{args.resume}: its training is finished (start a new one with --weights {args.resume})")
    processes = resumed["settings"].get("processes", 1)
    if processes != args.processes:
        raise DataError(f"{args.resume}: was trained by {processes} processes, not {args.processes} (start as many)")
    changes = {"resume": args.resume, "workers": args.workers} | ({"device": args.device} if args.device else {})
    return argparse.Namespace(**vars(args) | resumed["settings"] | changes)  # a flag newer than the run is not set


def set_bits(cfg: Cfg, args: argparse.Namespace) -> Cfg:
    """Write --w-bits and --a-bits into every quantised section of a cfg. Raises DataError where it has none."""
    bits = {key: value for key, value in (("w_bits", args.w_bits), ("a_bits", args.a_bits)) if value}
    quantised = [section for section in cfg.sections if is_quantised(section)]
    if bits and not quantised:
        raise DataError(
            f"{cfg.path}: has no [quan_convolutional] for --w-bits and --a-bits (docs/quantisation.md turns a float cfg"
            " into one)"
        )
    for section in quantised:
        for key, value in bits.items():
            section.set(key, value)
    return cfg


def make_recipe(args: argparse.Namespace, cfg: Cfg, resumed: dict[str, Any]) -> AnyRecipe:
    """Give Darknet's recipe as the cfg has it, or ours: the defaults with --hyp, and then the flags, on top."""
    if args.recipe == "darknet":
        return read_darknet_recipe(cfg)
    if resumed:
        return Recipe(**resumed["recipe"])
    recipe = load_recipe(args.hyp, Recipe())
    recipe = replace(recipe, optimizer="adamw") if args.adam else recipe
    return recipe if args.lr is None else replace(recipe, lr=args.lr)


def make_plan(args: argparse.Namespace) -> Penalty | None:
    """Give what -sr is to do, None without it, and say it. Raises DataError for an --sr-epoch that never comes."""
    if not args.sparsity_regularization:
        return None
    is_auto = args.s == "auto"
    schedule = _schedule(args)
    turn = args.sr_epoch or max(1, args.epochs // (10 if is_auto else 2))
    if args.sr_epoch and turn >= args.epochs:
        raise DataError(f"--sr-epoch {turn}: expected fewer than the {args.epochs} epochs of the training")
    after = "" if schedule == "constant" else f" from epoch {turn + 1} on"
    log.info("sparse training: --s %s, --sr-schedule %s%s, --sr-target %g", args.s, schedule, after, args.sr_target)
    return Penalty(None if is_auto else args.s, schedule, turn, args.sr_target)


def _schedule(args: argparse.Namespace) -> str:
    return args.sr_schedule or ("local" if args.s == "auto" else "constant")


def _sparsity_problem(args: argparse.Namespace, given: set[str]) -> str:
    """Say what is wrong with -sr and its flags, or nothing."""
    wrong = [name for name in ("s", "sr_schedule", "sr_epoch", "sr_target") if name in given]
    if wrong and not args.sparsity_regularization:
        return f"--{wrong[0].replace('_', '-')} needs -sr"
    if not 0 < args.sr_target < 1:
        return "--sr-target expects a share above 0 and below 1"
    if args.s == "auto" and args.sr_schedule == "global":
        return "--s auto would make up for what --sr-schedule global takes off: give constant, local or a number"
    if args.sr_epoch and _schedule(args) == "constant":
        return "--sr-epoch needs --sr-schedule global or local"
    return ""


def _problem(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with the flags together, or nothing."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    sizes = args.img_size
    if args.resume:
        if given - {"resume", "device", "workers"}:
            return "--resume goes on as the run was started: give no other flag but --device and --workers"
    elif not (args.cfg and args.data):
        return "give --cfg and --data, or --resume"
    if args.recipe == "darknet" and (wrong := [name for name in OURS if name in given]):
        return f"--recipe darknet takes everything from the cfg: leave out --{wrong[0].replace('_', '-')}"
    if len(sizes) > 3 or sizes[:2] != sorted(sizes[:2]):
        return "--img-size expects N, or MIN MAX [TEST] with MIN at most MAX"
    if len(set(sizes[:2])) > 1 and not args.multi_scale:
        return "--img-size MIN MAX needs --multi-scale"
    if problem := _sparsity_problem(args, given) or distillation_problem(args, given):
        return problem
    if args.patience and args.notest:
        return "--patience needs the tests that --notest leaves out"
    if args.multi_scale and args.rect:
        return "give --multi-scale or --rect, not both"
    return ""
