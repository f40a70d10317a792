"""Draw the gates and blocks of docs/zoo.md from what their macros expand to.

    python -m docs.draw_blocks

writes docs/blocks-*.png, or into `--output`, and prints their names; takes about five seconds.
Every picture holds the graph that it shows as text, so that a test tells when it is out of date.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Line
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.cli import make_parser, run

from .block_graphs import Box, Panel, boxes
from .block_layout import HEIGHT, Layout, Point, arrange

PICTURES: dict[str, tuple[Panel, ...]] = {
    "blocks-gates.png": (
        Panel("se", "reduction=16", 64),
        Panel("eca", "kernel_size=3", 64),
        Panel("cbam", "ratio=16 kernel_size=7", 64),
    ),
    "blocks-darknet.png": (
        Panel("residual", "", 64),
        Panel("csp", "filters=64", 64),
        Panel("csp_tiny", "filters=64", 32),
        Panel("elan", "filters=64", 64),
    ),
    "blocks-mobile.png": (
        Panel("inverted_residual", "filters=40 hidden=120 size=5 se=32", 40),
        Panel("ghost_bottleneck", "filters=40 hidden=120", 40),
        Panel("ghost_bottleneck", "filters=40 hidden=72 stride=2", 24),
    ),
    "blocks-osa-shuffle.png": (
        Panel("osa", "filters=64 hidden=32 convs=3 ese=1 residual=1", 64),
        Panel("shuffle_stage", "filters=116", 24, unit=0, note="filters=116, first unit"),
        Panel("shuffle_stage", "filters=116", 24, unit=1, note="every following unit"),
    ),
}
# Meaning, fill and edge. Hues of Okabe and Ito's palette, which colour-blind people tell apart; fills are lighter
KINDS = {
    "input": ("", "#ffffff", "#777777"),
    "conv": ("convolution", "#c8e4f6", "#2b7fb5"),
    "depthwise": ("depthwise convolution", "#fbdca6", "#c07f00"),
    "pool": ("pooling", "#bfe6d8", "#00805c"),
    "gate": ("gate", "#efcfe0", "#a84f82"),
    "merge": ("merge", "#e4e4e4", "#666666"),
    "split": ("split, shuffle", "#fbf6ba", "#9c9200"),
}
MARGIN, TITLE = 0.30, 0.62  # in inches
ROUND = 0.07  # radius of corners
DPI = 150
INK = "#444444"


def draw_panel(axes: Axes, panel: Panel, graph: Sequence[Box], x: float, y: float) -> float:
    """Draw a panel with its left upper corner at (x, y) and give its right end."""
    layout = arrange(graph)
    left, right = layout.extent
    width = right - left
    dx, dy = x - left, y + TITLE + HEIGHT / 2
    axes.text(dx, y, f"[{panel.macro}]", family="monospace", weight="bold", size=9, ha="center", va="top")
    words = panel.note or panel.keys
    for line, text in enumerate(textwrap.wrap(words, 26)):
        axes.text(dx, y + 0.20 + 0.15 * line, text, size=6.8, color=INK, ha="center", va="top")
    _draw_bands(axes, graph, layout, (dx, dy), (x - 0.08, x + width + 0.08))
    for points in layout.edges.values():
        _draw_edge(axes, [(px + dx, py + dy) for px, py in points])
    for box, (px, py), box_width in zip(graph, layout.places, layout.widths, strict=True):
        _draw_box(axes, box, px + dx, py + dy, box_width)
    return x + width


def _draw_bands(axes: Axes, graph: Sequence[Box], layout: Layout, shift: Point, ends: tuple[float, float]) -> None:
    """Shade what is one layer, where a panel shows the parts of several."""
    gates = dict.fromkeys(box.gate for box in graph if box.gate)
    for gate in gates if len(gates) > 1 else ():
        ys = [y + shift[1] for (_, y), box in zip(layout.places, graph, strict=True) if box.gate == gate]
        top, bottom = min(ys) - HEIGHT / 2 - 0.075, max(ys) + HEIGHT / 2 + 0.075
        _draw_rounded(axes, (ends[0], top), ends[1] - ends[0], bottom - top, fc="#f3f3f3", ec="none")
        place = (ends[1] - 0.1, bottom - 0.1)
        axes.text(*place, f"[{gate}]", family="monospace", size=8, ha="right", va="bottom", color=INK)


def _draw_box(axes: Axes, box: Box, x: float, y: float, width: float) -> None:
    _, fill, edge = KINDS[box.kind]
    _draw_rounded(axes, (x - width / 2, y - HEIGHT / 2), width, HEIGHT, fc=fill, ec=edge, lw=0.9, zorder=3)
    above = 0.075 if box.detail else 0
    axes.text(x, y - above, box.label, size=7.4, ha="center", va="center", zorder=4)
    axes.text(x, y + 0.095, box.detail, size=6.3, color=INK, ha="center", va="center", zorder=4)


def _draw_rounded(
    axes: Axes, corner: Point, width: float, height: float, *, radius: float = ROUND, **style: object
) -> None:
    axes.add_patch(FancyBboxPatch(corner, width, height, f"round,pad=0,rounding_size={radius}", **style))


def _draw_edge(axes: Axes, points: list[Point]) -> None:
    """Draw a line with rounded corners and an arrowhead at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    length = abs(x1 - x0) + abs(y1 - y0)
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    size, half = 0.075, 0.038
    base = (x1 - ux * size, y1 - uy * size)
    verts, codes = [points[0]], [Line.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        verts += [_toward(corner, before), corner, _toward(corner, after)]
        codes += [Line.LINETO, Line.CURVE3, Line.CURVE3]
    axes.add_patch(PathPatch(Line([*verts, base], [*codes, Line.LINETO]), fc="none", ec=INK, lw=0.9, zorder=2))
    head = [(x1, y1), (base[0] - uy * half, base[1] + ux * half), (base[0] + uy * half, base[1] - ux * half), (x1, y1)]
    axes.add_patch(PathPatch(Line(head), fc=INK, ec="none", zorder=2))


def _toward(corner: Point, other: Point) -> Point:
    """Give the point where the rounding of a corner ends."""
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    share = min(ROUND, (abs(dx) + abs(dy)) / 2) / (abs(dx) + abs(dy))
    return corner[0] + dx * share, corner[1] + dy * share


def make_picture(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, and what the colours mean."""
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    graphs = [boxes(panel) for panel in panels]
    x = MARGIN
    for panel, graph in zip(panels, graphs, strict=True):
        x = draw_panel(axes, panel, graph, x, MARGIN) + 1.6 * MARGIN
    width = x - 0.6 * MARGIN
    depth = max(max(y for _, y in arrange(graph).places) for graph in graphs)
    bottom = MARGIN + TITLE + depth + HEIGHT
    _draw_legend(axes, {box.kind for graph in graphs for box in graph}, width, bottom + MARGIN)
    height = bottom + 3 * MARGIN
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.set_size_inches(width, height)
    return figure


def _draw_legend(axes: Axes, kinds: set[str], width: float, y: float) -> None:
    """Say in the middle of a row what the colours mean."""
    meanings = [row for kind, row in KINDS.items() if kind in kinds and row[0]]
    lengths = [0.42 + 0.062 * len(meaning) for meaning, _, _ in meanings]
    x = (width - sum(lengths)) / 2
    for (meaning, fill, edge), length in zip(meanings, lengths, strict=True):
        _draw_rounded(axes, (x, y), 0.16, 0.12, radius=0.03, fc=fill, ec=edge, lw=0.8)
        axes.text(x + 0.22, y + 0.06, meaning, size=7, va="center", color=INK)
        x += length


def describe(panels: Sequence[Panel]) -> str:
    """Write the graphs of a picture as text: a line a box."""
    lines = []
    for panel in panels:
        lines.append(f"[{panel.macro}] {panel.keys} {panel.note}".strip())
        lines += [f"{i} {list(box.inputs)} {box.label} {box.detail} {box.kind}" for i, box in enumerate(boxes(panel))]
    return "\n".join(lines)


def _save(figure: Figure, text: str, path: Path) -> None:
    """Save a picture, with the text that describes it, in few colours, as it has no others."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64, dither=Image.Dither.NONE)
    info = PngInfo()
    info.add_itxt("Description", text)
    picture.save(path, pnginfo=info, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m docs.draw_blocks`."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the pictures (default: docs)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, panels in PICTURES.items():
        _save(make_picture(panels), describe(panels), args.output / name)
        print(args.output / name)


if __name__ == "__main__":
    run(main)
