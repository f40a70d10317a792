"""What pruning did, for people and programs: report.json, report.md, report.png and a table for the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter

from models import Darknet
from models.darknet import count_parameters

from .charts import COLOURS, GREY, save_figure
from .device import describe_machine
from .lint import bflops, weights_bytes
from .residual_blocks import Block, kept_layers
from .scores import Evaluation
from .timing import Timing

FLAT, UPRIGHT = 16, 45  # layers whose bars have room for numbers, and for upright ones
LIGHT = "#D9D9D9"
BESIDE_TITLE = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 9, "frameon": False}
FIGURES = (
    ("parameters", "parameters", "{0.parameters:,}"),
    ("bflops", "BFLOPs", "{0.bflops:.3f}"),
    ("weights_bytes", ".weights, MB", "{0.megabytes:.2f}"),
    ("ms", "latency, ms", "{0.ms:.1f} ± {0.spread_ms:.1f}"),
    ("map50", "mAP@.5", "{0.map50:.3f}"),
    ("map50_95", "mAP@.5:.95", "{0.map50_95:.3f}"),
)


@dataclass(frozen=True)
class LayerRow:
    """A layer that has a width of its own: its index in the expanded cfg, its line in the cfg as written, channels."""

    index: int
    section: str
    line: int
    before: int
    after: int


@dataclass(frozen=True)
class NetworkRow:
    """A network's cost and what it reaches: latency in milliseconds with its quartile spread, mAP as a fraction.

    None is what was not measured.
    """

    network: str
    parameters: int
    bflops: float | None
    weights_bytes: int
    ms: float | None = None
    spread_ms: float | None = None
    map50: float | None = None
    map50_95: float | None = None

    @property
    def megabytes(self) -> float:
        return self.weights_bytes / 1e6


@dataclass(frozen=True)
class Pruning:
    """All that a report tells. `networks` begin with the original and end with what was written.

    `size` is (height, width) of BFLOPs, latency and mAP; errors are relative, of the compact network to the masked one,
    None where they were not compared.
    """

    command: str
    cfg: str
    weights: str
    strategy: str
    criterion: str
    percent: float | None
    free_groups: int
    cut_groups: int
    removed_blocks: int
    size: tuple[int, int]
    layers: tuple[LayerRow, ...]
    networks: tuple[NetworkRow, ...]
    error_float64: float | None
    error_float32: float | None
    compensation_error: float | None = None


def layer_rows(model: Darknet, compact: Darknet, blocks: Sequence[Block] = ()) -> tuple[LayerRow, ...]:
    """Compare the widths of a network's layers with those of the one made of it without these blocks."""
    is_kept = kept_layers(model, blocks)
    assert is_kept.sum() == len(compact.layers), "the compact network was made of another one"
    left = iter(compact.layers)
    rows = []
    for index, (layer, section) in enumerate(zip(model.layers, model.expanded.sections[1:], strict=True)):
        after = next(left).channels if is_kept[index] else 0
        if layer.sets_channels:
            rows.append(LayerRow(index, section.name, section.line, layer.channels, after))
    return tuple(rows)


def network_row(
    name: str,
    model: Darknet,
    size: tuple[int, int],
    *,
    timing: Timing | None = None,
    evaluation: Evaluation | None = None,
) -> NetworkRow:
    """Give what a network costs at an input of `size` (height, width), and what was measured of it."""
    return NetworkRow(
        name,
        count_parameters(model),
        bflops(model, size),
        weights_bytes(model),
        *(timing or (None, None)),
        *((evaluation.map50, evaluation.map50_95) if evaluation else (None, None)),
    )


def write_report(pruning: Pruning, folder: Path) -> None:
    """Write report.json, report.md and report.png."""
    figures = asdict(pruning) | {"machine": describe_machine()}
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw_pruning(pruning, folder / "report.png")
    (folder / "report.md").write_text(_markdown(pruning), "utf-8", "surrogateescape")


def summary_table(pruning: Pruning) -> str:
    """Lay out for the terminal what pruning did to every figure."""
    rows = _figures(pruning)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _figures(pruning: Pruning) -> list[list[str]]:
    """Write the figures of all networks as a table of texts, a row a figure and its change in the last column."""
    networks = pruning.networks
    rows = [["", *(row.network for row in networks), "change"]]
    for key, title, form in FIGURES:
        values = [getattr(row, key) for row in networks]
        if any(value is not None for value in values):
            cells = ["-" if value is None else form.format(row) for row, value in zip(networks, values, strict=True)]
            rows.append([title, *cells, _change(key, values[0], values[-1])])
    return rows


def _change(key: str, before: float | None, after: float | None) -> str:
    """Write a change: of a fraction the difference, of a time how many times as fast, of what is counted the share."""
    if before is None or after is None:
        return "-"
    if key in ("map50", "map50_95"):
        return f"{after - before:+.3f}"
    return f"{before / after:.2f} times as fast" if key == "ms" else f"{after / before - 1:+.1%}"


def _markdown(pruning: Pruning) -> str:
    """Write report.md."""
    height, width = pruning.size
    share = pruning.cut_groups / max(1, pruning.free_groups)
    facts = [
        f"{pruning.cfg}, {pruning.weights}: strategy {pruning.strategy}, criterion {pruning.criterion}",
        f"{pruning.cut_groups:,} of {pruning.free_groups:,} free groups of channels cut ({share:.1%})",
        f"{pruning.removed_blocks} residual block{'s' * (pruning.removed_blocks > 1)} removed"
        if pruning.removed_blocks
        else "",
        _errors(pruning),
        ""
        if pruning.compensation_error is None
        else f"relative error of compensation: {pruning.compensation_error:.1e}",
        f"BFLOPs and latency at {width}x{height}; latency fused, channels_last, one picture, timed in turn: median and"
        f" quartile spread, {describe_machine()}",
    ]
    layers = [["layer", "section", "line", "channels before", "after", "left"]]
    layers += [
        [*map(str, (row.index, row.section, row.line, row.before, row.after)), f"{row.after / row.before:.0%}"]
        for row in pruning.layers
    ]
    parts = [
        "# What pruning did",
        f"```\n{pruning.command}\n```",
        _pipes(_figures(pruning)),
        "\n".join(f"- {fact}" for fact in facts if fact),
        "![channels before and after](report.png)",
        "## Layers",
        _pipes(layers),
    ]
    return "\n\n".join(parts) + "\n"


def _errors(pruning: Pruning) -> str:
    """Say how far masked and compact network differ."""
    errors = {"float64": pruning.error_float64, "float32": pruning.error_float32}
    told = ", ".join(f"{error:.1e} in {name}" for name, error in errors.items() if error is not None)
    text = "relative error of the compact network to the masked one, whose cut channels put out zero"
    return f"{text}: {told or 'not compared, cut through gates that mix channels'}"


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in Markdown, numbers to the right."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *body])


def draw_pruning(pruning: Pruning, path: Path) -> None:
    """Draw the channels of every layer before and after, and all figures of the networks relative to the original."""
    figure = Figure(figsize=(15, 10.5), layout="constrained")
    axes = figure.subplot_mosaic([["channels"], ["share"], ["figures"]], height_ratios=(4, 2, 3))
    _draw_channels(axes["channels"], pruning.layers)
    _draw_shares(axes["share"], pruning.layers)
    _draw_figures(axes["figures"], pruning)
    before, after = (pruning.networks[place].parameters for place in (0, -1))
    title = f"{pruning.cfg}: {before:,} → {after:,} parameters ({_change('parameters', before, after)})"
    figure.suptitle(title.replace("$", r"\$").encode(errors="replace").decode(), fontsize=14)  # paths need not be text
    save_figure(figure, path)


def _draw_channels(axes: Axes, rows: Sequence[LayerRow]) -> None:
    """Draw a bar a layer, on a scale of powers of two, so that narrow layers show too."""
    _draw_pairs(axes, rows, [row.before for row in rows], [row.after for row in rows])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    room = 2 if len(rows) <= FLAT or len(rows) > UPRIGHT else 6  # times the widest layer, for the numbers above it
    axes.set_ylim(min(row.after or row.before for row in rows) / 2, room * max(row.before for row in rows))
    axes.set_title("channels of every layer that has a width of its own", loc="left")
    axes.legend(**BESIDE_TITLE)
    if len(rows) <= UPRIGHT:
        for place, row in enumerate(rows):
            text = str(row.before) if row.before == row.after else f"{row.before} → {row.after}"
            turn = 0 if len(rows) <= FLAT else 90
            axes.annotate(
                text, (place, row.before), (0, 3), textcoords="offset points", ha="center", rotation=turn, fontsize=8
            )


def _draw_shares(axes: Axes, rows: Sequence[LayerRow]) -> None:
    """Draw what is left of every layer in per cent, and mark the layers that are gone."""
    _draw_pairs(axes, rows, [100] * len(rows), [100 * row.after / row.before for row in rows])
    gone = [place for place, row in enumerate(rows) if not row.after]
    if gone:
        crosses = axes.scatter(gone, [8] * len(gone), marker="x", color=COLOURS[5], s=18)
        axes.legend([crosses], ["removed"], **BESIDE_TITLE)
    axes.set_title("what is left of each, %", loc="left")
    axes.set(ylim=(0, 100), xlabel="layer of the expanded cfg")


def _draw_pairs(axes: Axes, rows: Sequence[LayerRow], before: Sequence[float], after: Sequence[float]) -> None:
    """Draw what was behind what is left, and name layers by their index, every n-th where there are many."""
    for values, colour, label in ((before, LIGHT, "before"), (after, COLOURS[0], "after")):
        axes.bar(range(len(rows)), values, 1, color=colour, edgecolor="white", linewidth=0.5, label=label)
    step = -(-len(rows) // UPRIGHT)
    axes.set_xticks(range(0, len(rows), step), [str(row.index) for row in rows[::step]], fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)


def _draw_figures(axes: Axes, pruning: Pruning) -> None:
    """Draw every figure of every network as a bar relative to the original's, with the figure on it.

    What lies between the first and the last network costs what one of them does: only its mAP is drawn.
    """
    networks = pruning.networks
    kinds = [kind for kind in FIGURES if getattr(networks[0], kind[0])]
    colours = (GREY, *COLOURS[4:0:-1][: len(networks) - 2], COLOURS[0])
    height = 0.8 / len(networks)
    for place, (key, _, form) in enumerate(kinds):
        rows = networks if key.startswith("map") else (networks[0], networks[-1])
        measured = [row for row in rows if getattr(row, key) is not None]
        for number, row in enumerate(measured):
            y = place + (number - (len(measured) - 1) / 2) * height
            share = 100 * getattr(row, key) / getattr(networks[0], key)
            bar = axes.barh(y, share, height, color=colours[networks.index(row)], edgecolor="white")
            axes.bar_label(bar, [form.format(row)], padding=3, fontsize=9)
    axes.set_yticks(range(len(kinds)), [title for _, title, _ in kinds])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="% of the original")
    axes.set_title(f"before and after, at {pruning.size[1]}x{pruning.size[0]}", loc="left")
    axes.legend([Patch(color=colour) for colour in colours], [row.network for row in networks], **BESIDE_TITLE)
