"""Which convolutions suffer from integers: the error of a network's outputs with one group alone in integers."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from models.weights import write_atomically

from .charts import COLOURS, GREY, save_figure
from .int8 import Calibrated
from .optional import require
from .runtime import OnnxNetwork

SHOWN = 12  # rows of the table; the file has all


@dataclass(frozen=True)
class Row:
    """A layer that convolves: how far the raw heads are off when its group alone computes in integers.

    `error` is relative to the heads' root mean square, the mean over heads.
    """

    layer: int
    convolutions: int
    error: float


def rank(calibrated: Calibrated, pictures: Iterable[np.ndarray]) -> list[Row]:
    """Measure every group on pictures [1, C, H, W]; the most sensitive first."""
    inputs = [torch.from_numpy(x) for x in pictures]
    heads = replace_outputs(calibrated)
    wanted = run(heads, (), inputs)
    kinds = {node.name: node.op_type for node in heads.graph.graph.node}
    rows = []
    for group in tqdm(calibrated.groups, desc="sensitivity", unit="layer", leave=False):
        found = run(heads, (group.layer,), inputs)
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True)]
        convolutions = sum(kinds[name] == "Conv" for name in group.nodes)
        rows.append(Row(group.layer, convolutions, float(np.mean(errors))))
    return sorted(rows, key=lambda row: -row.error)


def replace_outputs(calibrated: Calibrated) -> Calibrated:
    """Give it with raw heads as outputs, without the decoding behind them."""
    onnx = require("onnx")
    graph = onnx.ModelProto()
    graph.CopyFrom(calibrated.graph)
    names = [node.output[0] for node in graph.graph.node if node.output[0].startswith("raw_")]
    ends = [place for place, node in enumerate(graph.graph.node) if node.output[0] in names]
    del graph.graph.node[max(ends) + 1 :], graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return Calibrated(graph, calibrated.ranges, calibrated.groups, calibrated.reduce_range)


def run(calibrated: Calibrated, layers: tuple[int, ...], inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Give the outputs over all inputs with the groups of some layers in integers, a flat array an output."""
    network = OnnxNetwork("sensitivity", calibrated.quantise(layers).SerializeToString())
    outputs = [network(x) for x in inputs]
    return [torch.cat([each.flatten() for each in several]).numpy() for several in zip(*outputs, strict=True)]


def least(holds: Callable[[int], bool], most: int) -> int | None:
    """Give the least number up to `most` that holds, if all above it do: by doubling, then bisection."""
    low, high = -1, 0
    while not holds(high):
        if high == most:
            return None
        low, high = high, min(2 * high + 1, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def table(rows: Sequence[Row]) -> str:
    """Lay the most sensitive rows out."""
    lines = ["layer   error of the raw heads with it alone in integers"]
    lines += [f"{row.layer:<8}{row.error:.5f}" for row in rows[:SHOWN]]
    rest = f", {len(rows) - SHOWN} more below {rows[SHOWN].error:.5f}" if len(rows) > SHOWN else ""
    return "\n".join(lines) + rest


def write(rows: Sequence[Row], kept: Iterable[int], stem: Path) -> list[Path]:
    """Write the rows as stem.json, and in the order of the network as stem.png, those kept in float marked."""
    floats = set(kept)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "png")]
    text = json.dumps([asdict(row) | {"is_float": row.layer in floats} for row in rows], indent=1) + "\n"
    write_atomically(files[0], lambda partial: partial.write_text(text))
    ordered = sorted(rows, key=lambda row: row.layer)
    figure = Figure(figsize=(max(6, 0.14 * len(rows)), 4), layout="constrained")
    axes = figure.subplots()
    for label, colour, is_float in (("integer", COLOURS[0], False), ("kept in float", COLOURS[1], True)):
        chosen = [(place, row.error) for place, row in enumerate(ordered) if (row.layer in floats) == is_float]
        if chosen:
            axes.bar(*zip(*chosen, strict=True), color=colour, label=label)
    axes.set_xticks(range(len(ordered)), [str(row.layer) for row in ordered], rotation=90, fontsize=7)
    axes.axhline(float(np.median([row.error for row in rows])), color=GREY, linewidth=1, label="median")
    axes.set(xlabel="layer", ylabel="relative error of the raw heads", xlim=(-1, len(ordered)))
    axes.set_title("one layer alone in integers", loc="left")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    save_figure(figure, files[1])
    return files
