"""The flags of train.py, what they rule out together, and the recipe that they choose."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models import Cfg

from . import cli, dist
from .darknet_recipe import read_darknet_recipe
from .log import DataError
from .recipe import Recipe, load_recipe
from .schedule import AnyRecipe

EPOCHS, BATCH_SIZE = 300, 16
OURS = "hyp lr adam multi_scale rect".split()  # flags that mean nothing where the cfg is the recipe


def parse_args(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
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
    add("--freeze", type=cli.natural, default=0, help="leave the first N layers as they are (default: 0)")
    add("--patience", type=cli.positive, help="stop after N epochs without a better mAP (default: never)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--notest", action="store_true", help="test after the last epoch only")
    add("--nosave", action="store_true", help="write checkpoints after the last epoch only")
    add("--sync-bn", action="store_true", help="batch normalisation over the GPUs of all processes")
    add("--resume", nargs="?", const="weights/last.pt", help="go on with a last.pt, as it was started")
    add("-sr", "--sparsity-regularization", action="store_true", help="sparse training for pruning")
    add("--s", type=cli.rate, default=1e-4, help="strength of -sr on every γ (default: %(default)s)")
    args = parser.parse_args(argv)
    if problem := _problem(args, parser):
        parser.error(problem)
    args.processes = dist.world_size()
    return args


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


def make_recipe(args: argparse.Namespace, cfg: Cfg, resumed: dict[str, Any]) -> AnyRecipe:
    """Give Darknet's recipe as the cfg has it, or ours: the defaults with --hyp, and then the flags, on top."""
    if args.recipe == "darknet":
        return read_darknet_recipe(cfg)
    if resumed:
        return Recipe(**resumed["recipe"])
    recipe = load_recipe(args.hyp, Recipe()) if args.hyp else Recipe()
    recipe = replace(recipe, optimizer="adamw") if args.adam else recipe
    return recipe if args.lr is None else replace(recipe, lr=args.lr)


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
    if "s" in given and not args.sparsity_regularization:
        return "--s needs -sr"
    if args.patience and args.notest:
        return "--patience needs the tests that --notest leaves out"
    if args.multi_scale and args.rect:
        return "give --multi-scale or --rect, not both"
    return ""
