"""Judge cfgs without building their weights: sizes, costs, reach, and every mistake with its line.

    python -m utils.lint cfg/*.cfg

Prints a row a file, BFLOPs at one input size for all, and the mistakes below, for a single file every layer too; ends
with exit status 2 where there is a mistake. Takes about a second a file. `--json` prints the rows for other programs,
`--expand` one cfg with primitive sections in place of macros, `--keys` the reference of the cfg language that stands in
docs/cfg-reference.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from models import CfgError, Darknet, dump, load_cfg, parse
from models.attention import ChannelGate, Eca
from models.darknet import count_parameters
from models.layer import Layer
from models.layers_conv import SharedConvolution
from models.layers_pool import Blur, LocalAvgPool, MaxPool

from .cfg_keys import reference
from .cli import make_parser, run, side
from .log import start_logging

HEADER = 20  # bytes of a .weights header of version 0.2
TABLE_SIZE = 416  # pixels: networks are compared at one input size, whatever their cfgs say


@dataclass(frozen=True)
class Verdict:
    """What is known of one file; without a network, which mistakes prevent, only `sections` and `errors` are."""

    file: str
    sections: int
    errors: tuple[str, ...] = ()
    model: Darknet | None = None


def judge(path: str) -> Verdict:
    """Parse the cfg at `path` and build its network on the meta device, which allocates nothing."""
    sections = 0
    try:
        cfg = load_cfg(path)
        sections = len(cfg.sections)
        with torch.device("meta"):
            return Verdict(path, sections, model=Darknet(cfg))
    except CfgError as error:
        return Verdict(path, sections, tuple(map(str, error.mistakes)))


def figures(verdict: Verdict, size: int | None = None) -> dict[str, object]:
    """Give the figures of a file as --json prints them; None where mistakes prevent a network.

    `parameters` are the trainable ones, `weights_bytes` the size of the .weights file, `bflops` count a multiply-add as
    two as Darknet does, at an input of `size` × `size` (default: the cfg's own; None where the network does not take
    that size), `strides` are pixels a cell of every head.
    """
    model = verdict.model
    return {
        "file": verdict.file,
        "sections": verdict.sections,
        "parameters": count_parameters(model) if model else None,
        "weights_bytes": weights_bytes(model) if model else None,
        "bflops": bflops(model, size and (size, size)) if model else None,
        "strides": [_pair(head.stride) for head in model.heads] if model else None,
        "errors": list(verdict.errors),
    }


def bflops(model: Darknet, size: tuple[int, int] | None = None) -> float | None:
    """Count the operations of one picture of `size` (height, width; default: of the cfg's own size), in 10^9.

    None where the network cannot take that size.
    """
    if size is not None and model.size != size:
        cfg = parse(dump(model.cfg), model.cfg.path)
        for key, side in zip(("height", "width"), size, strict=True):
            cfg.sections[0].set(key, side)
        try:
            with torch.device("meta"):
                model = Darknet(cfg)
        except CfgError:
            return None
        if any(side % model.stride for side in size):
            return None
    return sum(layer.flops for layer in model.layers) / 1e9


def weights_bytes(model: Darknet) -> int:
    """Give the size of the network's .weights file: its header and four bytes a value."""
    values = (attrgetter(name)(layer.module).numel() for layer in model.layers for name in layer.tensors)
    return HEADER + 4 * sum(values)


def receptive_fields(model: Darknet) -> list[tuple[float, float]]:
    """Give (height, width) in pixels of what every layer's cell sees of the input, borders aside.

    A window of size k over cells that are s pixels apart adds (k-1)·s to what its input sees; a layer with several
    inputs sees as much as the one that sees most. Upsampling copies cells, so it adds nothing.
    """
    fields: list[tuple[float, float]] = [(1, 1)]  # of the image, then of every layer
    for layer in model.layers:
        first = layer.inputs[0]
        step = model.layers[first].stride if first >= 0 else (1.0, 1.0)
        height, width = (
            max(fields[index + 1][axis] for index in layer.inputs) + _reach(layer, step, axis) * step[axis]
            for axis in (0, 1)
        )
        fields.append((height, width))
    return fields[1:]


def _reach(layer: Layer, step: tuple[float, float], axis: int) -> float:
    """Give the cells of the input, `step` pixels apart, that a cell of the output sees beyond one along an axis."""
    windows = [window for name, part in layer.module.named_modules() for window in _windows(layer, name, part, axis)]
    if not windows:  # a mean over all, or cells turned to channels: what the stride spans
        return max(0.0, layer.stride[axis] / step[axis] - 1)
    reach, apart = 0, 1
    for size, stride in windows:
        reach += (size - 1) * apart
        apart *= stride
    return reach


def _windows(layer: Layer, name: str, part: nn.Module, axis: int) -> Iterator[tuple[int, int]]:
    """Give size, dilation counted, and stride of what slides over the cells in a part of a layer."""
    match part:
        case nn.Conv2d(kernel_size=size, stride=stride, dilation=dilation):
            if not name.startswith("self."):  # of [crnn], which sees the frame before
                yield (size[axis] - 1) * dilation[axis] + 1, stride[axis]
        case SharedConvolution(window=window):
            yield (window.size - 1) * window.dilation + 1, window.stride[axis]
        case Eca() | ChannelGate():  # by means of the whole map
            yield layer.size[axis], 1
        case MaxPool(size=size, stride=stride) | LocalAvgPool(size=size, stride=stride):
            yield size, stride[axis]
        case Blur(kind=kind, stride=stride):
            yield 3 if kind == 1 else 2, stride[axis]


def make_table(verdicts: Sequence[Verdict], size: int = TABLE_SIZE) -> str:
    """Lay the figures out in columns, one row a file, with BFLOPs at an input of `size` × `size`."""
    cost = f"BFLOPs at {size}"
    rows = [("file", "sections", "parameters", "weights", cost, "input", "strides", "receptive field", "errors")]
    for verdict in verdicts:
        each, model = figures(verdict, size), verdict.model
        cells = ("", "", "", "", "", "")
        if model:
            fields = receptive_fields(model)
            cells = (
                f"{each['parameters']:,}",
                f"{each['weights_bytes']:,}",
                "-" if each["bflops"] is None else f"{each['bflops']:.3f}",
                f"{model.size[1]}x{model.size[0]}",
                " ".join(map(_text, each["strides"])),
                " ".join(_text(_pair(fields[head.layer])) for head in model.heads),
            )
        rows.append((verdict.file, str(verdict.sections), *cells, str(len(verdict.errors) or "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())
    return "\n".join(lines)


def _pair(sides: tuple[float, float]) -> float | list[float]:
    """Give (height, width) as one number where they are equal, whole numbers without a fraction."""
    height, width = (int(side) if side == int(side) else side for side in sides)
    return height if height == width else [height, width]


def _text(side: float | list[float]) -> str:
    """Write what `_pair` gives, a pair as width x height, as cfgs have it."""
    return f"{side[1]}x{side[0]}" if isinstance(side, list) else str(side)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.lint`."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="cfg files")
    parser.add_argument(
        "--size", type=side, help=f"sides of the input for BFLOPs (default: {TABLE_SIZE}; --json: the cfg's own)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of {file, sections, …, errors}, nothing else")
    form.add_argument("--expand", action="store_true", help="print the one cfg with its macros expanded, nothing else")
    form.add_argument("--keys", action="store_true", help="print every section and key that is read, in Markdown")
    args = parser.parse_args(argv)
    _check_files(parser, args)
    if args.keys:
        print(reference(), end="")
        return
    start_logging(stream=sys.stderr, tells_cfg=len(args.files) == 1)  # standard output is for the figures
    verdicts = [judge(path) for path in args.files]
    if args.json:
        print(json.dumps([figures(verdict, args.size) for verdict in verdicts], indent=1))
    elif args.expand and verdicts[0].model:
        print(dump(verdicts[0].model.expanded), end="")
    else:
        if len(verdicts) == 1 and verdicts[0].model:
            print(verdicts[0].model.summary() + "\n")
        print(make_table(verdicts, args.size or TABLE_SIZE))
        for mistake in (mistake for verdict in verdicts for mistake in verdict.errors):
            print(mistake)
    if any(verdict.errors for verdict in verdicts):
        sys.exit(2)


def _check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.keys and args.files:
        parser.error("argument --keys: takes no files")
    if args.expand and len(args.files) > 1:
        parser.error("argument --expand: takes one file")
    if not args.keys and not args.files:
        parser.error("the following arguments are required: FILE")


if __name__ == "__main__":
    run(main)
