"""Time networks against each other on the CPU: in PyTorch, plain and fused, in ONNX Runtime and in OpenVINO.

    python -m utils.benchmark cfg/slim-m.cfg best.onnx best-int8.onnx --img-size 416 --json speed.json

Prints the median time of a forward pass, raw heads without decoding, for every network and backend, all timed in turn
in one process, and how many times as fast as the first row it is. Ten rows take some 20 s.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Darknet, load_cfg
from models.weights import checkpoint_cfg, load_checkpoint, load_model, write_atomically

from . import cli
from .export import bits, describe_network, make_onnx
from .log import DataError, log
from .network import Network
from .onnx_metadata import RAW
from .optional import require
from .runtime import OnnxNetwork
from .timing import ROUNDS, summarise, time_in_turn


class Entry(NamedTuple):
    """A network on a backend, what it computes in, and the picture or pictures that it gets."""

    name: str
    backend: str
    arithmetic: str
    network: Network
    x: Tensor


def eager(model: Darknet, name: str) -> Network:
    return copy.deepcopy(model).eval()


def fused(model: Darknet, name: str) -> Network:
    return model.fuse().to(memory_format=torch.channels_last)


def onnx(model: Darknet, name: str, runtime: str = "onnxruntime") -> Network:
    metadata = describe_network(model, outputs=RAW, names=(), size=model.size)
    return OnnxNetwork(name, make_onnx(model, metadata)[1], runtime=runtime)


BACKENDS: dict[str, Callable[[Darknet, str], Network]] = {
    "eager": eager,
    "fused": fused,
    "onnx": onnx,
    "openvino": partial(onnx, runtime="openvino"),
}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # the backends that take an .onnx
DEFAULT = ["eager", "fused", "onnx"]


def open_network(path: str, runtime: str = "onnxruntime") -> Darknet | OnnxNetwork:
    """Load a .cfg with fresh weights, of which speed does not depend, a .pt or an .onnx.

    Raises CfgError, WeightsError, and DataError where the name has another ending.
    """
    match Path(path).suffix:
        case ".onnx":
            return OnnxNetwork(path, runtime=runtime)
        case ".pt":
            return load_model(checkpoint_cfg(load_checkpoint(path), path), path)
        case ".cfg":
            return Darknet(load_cfg(path))
    raise DataError(f"{path}: expected a name that ends in .cfg, .pt or .onnx")


def arithmetic(network: Network) -> str:
    """Name what a network computes in: FP32 or INT8; simulated: integers' levels in floating point."""
    if isinstance(network, OnnxNetwork):
        said = network.metadata.arithmetic
        return "INT8" if said.startswith("INT8") else "simulated" if "simulated" in said else "FP32"
    return "simulated" if bits(network) else "FP32"


def make_entries(paths: Sequence[str], backends: Sequence[str], *, side: int | None, batch: int) -> list[Entry]:
    """Make a row of every network and backend; an .onnx has those of RUNTIMES, or ONNX Runtime where none is asked for.

    Raises what open_network raises.
    """
    entries = []
    first, *others = [each for each in backends if each in RUNTIMES] or ["onnx"]
    for path in paths:
        network = open_network(path, RUNTIMES[first])
        size = cli.network_size(network, side)
        if network.is_fixed and size != network.size:
            raise DataError(f"{path}: takes {network.size[1]}x{network.size[0]} alone (give no --img-size)")
        x = torch.rand(batch, network.channels, *size, generator=torch.Generator().manual_seed(0))  # [B, C, H, W]
        kind = arithmetic(network)
        if isinstance(network, OnnxNetwork):
            entries.append(Entry(path, first, kind, network, x))
            entries += [
                Entry(path, backend, kind, OnnxNetwork(path, runtime=RUNTIMES[backend]), x) for backend in others
            ]
            continue
        for backend in backends:
            form = torch.channels_last if backend == "fused" else torch.contiguous_format
            entries.append(
                Entry(path, backend, kind, BACKENDS[backend](network, path), x.contiguous(memory_format=form))
            )
    return entries


@torch.inference_mode()
def measure(entries: Sequence[Entry], rounds: int) -> list[dict[str, Any]]:
    """Time entries in turn; medians and quartile spreads in milliseconds a batch, ratios of speed to the first one."""
    spent = time_in_turn([partial(entry.network, entry.x) for entry in entries], rounds=rounds)
    timings = [summarise(ms) for ms in spent]
    return [
        {
            "network": entry.name,
            "backend": entry.backend,
            "arithmetic": entry.arithmetic,
            "size": list(entry.x.shape[2:]),
            "batch": len(entry.x),
            "threads": torch.get_num_threads(),
            "median_ms": timing.ms,
            "spread_ms": timing.spread_ms,
            "ratio": timings[0].ms / timing.ms,
            "rounds": len(ms),
        }
        for entry, timing, ms in zip(entries, timings, spent, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out."""
    width = max(len("network"), *(len(row["network"]) for row in rows))
    lines = [f"{'network':<{width}}  {'backend':<10}{'arithmetic':<11}{'size':>9}{'ms':>10}{'±':>8}{'× first':>9}"]
    for row in rows:
        size = f"{row['size'][1]}x{row['size'][0]}"
        numbers = f"{row['median_ms']:10.2f}{row['spread_ms']:8.2f}{row['ratio']:9.2f}"
        lines.append(f"{row['network']:<{width}}  {row['backend']:<10}{row['arithmetic']:<11}{size:>9}{numbers}")
    batch, threads, count = (rows[0][key] for key in ("batch", "threads", "rounds"))
    lines.append(f"batch {batch}, {threads} CPU threads; medians and quartile spreads of {count} timings in turn")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help=".cfg (fresh weights), .pt or .onnx")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=tuple(BACKENDS),
        help="eager and fused are PyTorch's, for a .cfg and a .pt (default: eager fused onnx)",
    )
    parser.add_argument("--img-size", type=cli.side, help="longer side in pixels (default: as in each file)")
    parser.add_argument("--batch-size", type=cli.positive, default=1, help="pictures a call (default: 1)")
    parser.add_argument("--rounds", type=rounds, default=ROUNDS, help="timings of a row at most (default: %(default)s)")
    parser.add_argument("--json", default="", help="write the rows to this file")
    return parser.parse_args(argv)


def rounds(text: str) -> int:
    """Read a number of timings: the spread takes two (for argparse)."""
    value = cli.positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, gets {text}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m utils.benchmark`."""
    args = parse_args(argv)
    backends = args.backends or DEFAULT
    for backend in [each for each in backends if each in RUNTIMES]:
        require("onnx")
        require(RUNTIMES[backend])
    rows = measure(make_entries(args.files, backends, side=args.img_size, batch=args.batch_size), args.rounds)
    log.info(table(rows))
    if args.json:
        write_atomically(args.json, lambda partial: partial.write_text(json.dumps(rows, indent=1) + "\n"))


if __name__ == "__main__":
    cli.run(main)
