"""docs/zoo.md tells what is: its commands run and print what it shows, its tables and pictures are the code's."""

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from documents import code_blocks, commands, run_python
from PIL import Image

from docs import draw_blocks
from docs.block_graphs import Box, Panel, boxes, build, span
from docs.block_layout import HEIGHT, arrange
from models import grid
from models.layers_attention import ChannelGate, Eca, SpatialGate
from models.layers_merge import Route
from models.macros import MACROS
from utils import lint
from utils.cfg_keys import read_keys, section_names

ROOT = Path(__file__).resolve().parent.parent
ZOO = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
PANELS = [panel for panels in draw_blocks.PICTURES.values() for panel in panels]


def panel_name(panel: Panel) -> str:
    return f"{panel.macro}-{panel.keys}-{panel.unit}".replace(" ", "-")


def test_the_walk_through_runs_and_prints_what_it_shows(command, tmp_path, capfd):
    for name in ("cfg", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("demo"))
    blocks, shown = code_blocks(ZOO), 0
    for (kind, code), (next_kind, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind != "bash":
            continue
        for line in commands(code):
            capfd.readouterr()
            if line.startswith("python"):
                run_python(line, command)
            else:
                done = subprocess.run(["bash", "-c", line], env=os.environ | {"LC_ALL": "C"}, check=False)
                assert done.returncode == line.startswith("diff") * ("|" not in line), line
            out = capfd.readouterr().out
        if next_kind in ("text", "diff"):
            lines = [each for each in out.splitlines() if not each.startswith(("--- ", "+++ "))]
            assert "\n".join(lines) == expected.rstrip("\n"), line
            shown += 1
    assert shown >= 5
    assert {path.parent.name for path in tmp_path.glob("runs/*/best.pt")} == {"mine", "attended", "quantised"}
    assert list(tmp_path.glob("output/*.jpg"))


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", ZOO)
    assert len(links) > 6
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / "docs" / path if path else ROOT / "docs/zoo.md"
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


def test_the_table_of_blocks_has_every_macro_with_its_keys():
    keys, names = read_keys(), section_names()
    owner = {name: first for first, aliases in names.items() for name in aliases}
    rows = [line for line in ZOO.splitlines() if line.startswith("| `[") and "](http" in line]
    found = set()
    for row in rows:
        first, written, *_ = row.strip("| ").split(" | ")
        sections = re.findall(r"\[(\w+)\]", first)
        found |= set(sections)
        known = {name: key for name, key in keys[owner[sections[0]]].items() if name not in grid.KEYS}
        texts = dict(part.partition("=")[::2] for part in written.strip("`").split())
        assert texts.keys() == known.keys(), first
        for name, text in texts.items():
            default = known[name].default
            expected = (
                ""
                if default is None
                else "…"
                if default == ""
                else str(int(default) if isinstance(default, bool) else default)
            )
            assert text == expected, (first, name)
    assert found == {*MACROS, "eca", "ca", "sa", "channel_shuffle"}


def test_the_costs_of_attention_are_lints():
    rows = re.findall(r"^\| .* \| `((?:\w+-)?hand)`.* ([\d,]+) \| ([\d,]+) \|$", ZOO, flags=re.MULTILINE)
    counts = {kind: lint.figures(lint.judge(f"{ROOT}/cfg/yolov3-tiny-{kind}.cfg"))["parameters"] for kind, *_ in rows}
    assert rows == [(kind, f"{count:,}", f"{count - counts['hand']:,}") for kind, count in counts.items()]
    assert len(rows) == 4


@pytest.mark.parametrize("panel", PANELS, ids=panel_name)
def test_edges_are_the_inputs_of_layers(panel):
    model, drawn = build(panel), boxes(panel)
    first, last = span(panel, model)

    def through_wires(index: int) -> int:
        layer = model.layers[index]
        is_wire = (
            first <= index and isinstance(layer.module, Route) and (layer.module.groups, len(layer.inputs)) == (1, 1)
        )
        return through_wires(layer.inputs[0]) if is_wire else index

    inner = [index for index in range(first, last) if through_wires(index) == index]
    expected = {(through_wires(source), index) for index in inner for source in model.layers[index].inputs}
    edges = {(drawn[source].layer, box.layer) for box in drawn for source in box.inputs}
    assert {edge for edge in edges if edge[0] != edge[1]} == expected
    gates = [i for i in inner if isinstance(model.layers[i].module, (Eca, ChannelGate, SpatialGate))]
    assert sorted(box.layer for box in drawn if not box.gate) == [first - 1, *(i for i in inner if i not in gates)]
    assert {box.layer for box in drawn if box.gate} == set(gates)


def test_parts_of_gates_are_those_of_their_papers():
    graph = boxes(Panel("cbam", "", 64))
    assert [(box.label, box.inputs) for box in graph] == [
        ("input", ()),
        ("mean", (0,)),
        ("maximum", (0,)),
        ("stack", (1, 2)),
        ("linear", (3,)),
        ("linear", (4,)),
        ("add", (5,)),
        ("multiply", (0, 6)),
        ("mean", (7,)),
        ("maximum", (7,)),
        ("concat", (8, 9)),
        ("7×7 conv", (10,)),
        ("multiply", (7, 11)),
    ]
    assert [box.detail for box in boxes(Panel("eca", "", 64))] == ["64", "64 · over the map", "64 · sigmoid", "64"]


@pytest.mark.parametrize("panel", PANELS, ids=panel_name)
def test_no_edge_runs_through_a_box_and_no_boxes_overlap(panel):
    graph = boxes(panel)
    layout = arrange(graph)
    frames = [
        (x - w / 2, y - HEIGHT / 2, x + w / 2, y + HEIGHT / 2)
        for (x, y), w in zip(layout.places, layout.widths, strict=True)
    ]
    assert [pair for pair in pairs(frames) if overlap(*pair)] == []
    assert layout.edges.keys() == {(source, i) for i, box in enumerate(graph) for source in box.inputs}
    for (start, end), points in layout.edges.items():
        for (x0, y0), (x1, y1) in pairwise(points):
            assert x0 == x1 or y0 == y1
            breadth, depth = (0.01, 0) if x0 == x1 else (0, 0.01)
            line = (min(x0, x1) - breadth, min(y0, y1) - depth, max(x0, x1) + breadth, max(y0, y1) + depth)
            assert [i for i, frame in enumerate(frames) if overlap(line, frame)] == [], (start, end)
        for place, (x, y) in ((start, points[0]), (end, points[-1])):  # ends lie on the edges of the right boxes
            left, top, right, bottom = frames[place]
            assert (x in (left, right) and top < y < bottom) or (
                left < x < right and min(abs(y - top), abs(y - bottom)) < 1e-9
            )


@pytest.mark.parametrize("name", draw_blocks.PICTURES)
def test_texts_stand_free_and_inside(name):
    figure = draw_blocks.make_picture(draw_blocks.PICTURES[name])
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [tuple(text.get_window_extent().extents) for text in axes.texts if text.get_text()]
    patches = [tuple(patch.get_window_extent().extents) for patch in axes.patches if patch.get_zorder() == 3]
    assert [pair for pair in pairs(texts) if overlap(*pair)] == []
    assert all(contains(tuple(figure.bbox.extents), text) for text in texts)
    assert [text for text in texts for patch in patches if overlap(text, patch) and not contains(patch, text)] == []
    assert sum(contains(patch, text) for text in texts for patch in patches) > len(patches)


def test_pictures_are_up_to_date(tmp_path):
    draw_blocks.main(["--output", str(tmp_path / "new")])
    sizes = 0
    for name in draw_blocks.PICTURES:
        assert f"]({name})" in ZOO
        with Image.open(ROOT / "docs" / name) as ours, Image.open(tmp_path / "new" / name) as new:
            assert ours.text["Description"] == new.text["Description"], "run python -m docs.draw_blocks"
        sizes += (ROOT / "docs" / name).stat().st_size
    assert sizes < 300_000


def test_a_drawing_of_something_else_tells_it_from_the_old():
    assert draw_blocks.describe([Panel("eca", "", 64)]) != draw_blocks.describe([Panel("eca", "", 32)])
    assert Box("input", "64", "input", 0) in boxes(Panel("eca", "", 64))


def pairs(frames):
    return [(a, b) for i, a in enumerate(frames) for b in frames[:i]]


def overlap(a, b) -> bool:
    """Tell whether two frames (left, top, right, bottom) share more than a border."""
    return max(a[0], b[0]) < min(a[2], b[2]) - 1e-9 and max(a[1], b[1]) < min(a[3], b[3]) - 1e-9


def contains(outer, inner) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
