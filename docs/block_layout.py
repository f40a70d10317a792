"""Where the boxes and edges of a graph stand: the longest way straight down, the others beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .block_graphs import Box

WIDE, NARROW, HEIGHT, PITCH = 1.2, 0.86, 0.40, 0.62  # of boxes and rows, in inches
GAP = 0.17  # between a box or a way and the next

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Where boxes stand: centre (x, y) and width of each, y down; and the corners of every edge (from, to)."""

    places: list[Point]
    widths: list[float]
    edges: dict[tuple[int, int], list[Point]]

    @property
    def extent(self) -> tuple[float, float]:
        """Give the left and the right end."""
        lines = [x for corners in self.edges.values() for x, _ in corners]
        sides = [x + side * w / 2 for (x, _), w in zip(self.places, self.widths, strict=True) for side in (-1, 1)]
        return min(lines + sides), max(lines + sides)


def arrange(graph: Sequence[Box]) -> Layout:
    """Put the longest way through on the axis, and the other ways beside it, the shorter the nearer."""
    rows = [0] * len(graph)
    for i, box in enumerate(graph):
        rows[i] = max((rows[source] + 1 for source in box.inputs), default=0)
    widths = [NARROW if box.kind in ("input", "merge", "gate", "split") else WIDE for box in graph]
    main, *ways = _ways(graph)
    columns = dict.fromkeys(main, 0.0)
    taken: list[tuple[int, int, float]] = []  # first and last row of a way, and the x of its outer side
    lanes: dict[tuple[int, ...], float] = {}
    for way in sorted(ways, key=lambda way: (rows[way[-1]] - rows[way[0]], len(way))):
        half = max((widths[i] / 2 for i in way[1:-1]), default=0)
        options = []
        for side in (1, -1):
            crossed = range(rows[way[0]], rows[way[-1]] + 1)
            inner = max(widths[i] / 2 for i in main if rows[i] in crossed)
            outer = [side * x for start, end, x in taken if x * side > 0 and start < crossed[-1] and crossed[0] < end]
            options.append((max([inner, *outer]) + GAP + half, side))
        x, side = min(options, key=lambda option: option[0])
        taken.append((rows[way[0]], rows[way[-1]], side * (x + half)))
        lanes[way] = side * x
        columns |= dict.fromkeys(way[1:-1], side * x)
    places = [(columns[i], rows[i] * PITCH) for i in range(len(graph))]
    edges = {(a, b): [places[a], places[b]] for way in (main, *ways) for a, b in pairwise(way)}
    return Layout(places, widths, _route(edges, lanes, places, widths))


def _ways(graph: Sequence[Box]) -> list[tuple[int, ...]]:
    """Split the edges into ways, the longest first; each starts and ends in boxes of those before it."""
    left = {(source, i) for i, box in enumerate(graph) for source in box.inputs}
    ways: list[tuple[int, ...]] = []
    seen: set[int] = set()
    while left:
        best: dict[int, tuple[int, ...]] = {}  # longest way that ends in a box
        for i, box in enumerate(graph):
            before = [
                best[a] for a in box.inputs if (a, i) in left and a in best and (a not in seen or len(best[a]) == 1)
            ]
            longest = max(before, key=len, default=())
            best[i] = (*longest, i) if longest else (i,)
        ends = [way for i, way in best.items() if len(way) > 1 and (not seen or {i, way[0]} <= seen)]
        way = max(ends, key=len)
        ways.append(way)
        seen.update(way)
        left -= set(pairwise(way))
    return ways


def _route(
    edges: dict[tuple[int, int], list[Point]],
    lanes: dict[tuple[int, ...], float],
    places: list[Point],
    widths: list[float],
) -> dict[tuple[int, int], list[Point]]:
    """Give the corners of every edge: along a way straight down, and in and out of boxes at their sides."""
    ports: dict[tuple[int, int], list[tuple[int, float, tuple[int, ...]]]] = {}  # (box, side): what leaves and enters
    for way, x in lanes.items():
        for box, order, depth in ((way[0], 1, -abs(x)), (way[-1], 0, abs(x))):  # outer ones leave above, enter below
            ports.setdefault((box, 1 if x > places[box][0] else -1), []).append((order, depth, way))
    corners = {}
    for (box, side), ways in ports.items():
        for n, (order, _, way) in enumerate(sorted(ways), start=1):
            x, y = places[box]
            port = (x + side * widths[box] / 2, y + HEIGHT * (n / (len(ways) + 1) - 0.5))
            corners[way, order] = [port, (lanes[way], port[1])]
    routed = {}
    for (a, b), (start, end) in edges.items():
        routed[a, b] = [(start[0], start[1] + HEIGHT / 2), (end[0], end[1] - HEIGHT / 2)]
    for way in lanes:
        first, last = way[:2], way[-2:]
        routed[first] = [*corners[way, 1], *([] if first == last else routed[first][1:])]
        if first == last:
            routed[first] += corners[way, 0][::-1]
        else:
            routed[last] = [routed[last][0], *corners[way, 0][::-1]]
    return routed
