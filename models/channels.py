"""Who lives and dies together: every channel of every layer has an id, and ties join ids into groups.

A layer's flow says how ids pass through it: it takes the ids of its inputs and gives those of its output. A channel of
a group can go only with all others of the group, wherever in the network they stand.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Line: TypeAlias = NDArray[np.int64]  # the ids of a map's channels, in their order


class Channels:
    """The ids given out so far, and what is known of them.

    `is_approximate` lets channels go that a gate over all channels mixes with the others.
    """

    def __init__(self, *, is_approximate: bool = False) -> None:
        self.is_approximate = is_approximate
        self.count = 0
        self._ties: list[tuple[Line, Line]] = []
        self._fixed: list[Line] = []
        self._residual: list[Line] = []

    def fresh(self, count: int) -> Line:
        """Give out new ids."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, a: Line, b: Line) -> None:
        """Join ids pair by pair."""
        self._ties.append((a, b))

    def tie_parts(self, ids: Line, parts: int) -> None:
        """Join the ids at the same place of every one of `parts` equal parts, so that the parts stay equal."""
        rows = ids.reshape(parts, -1)  # [parts, channels of a part]
        for row in rows[1:]:
            self.tie(rows[0], row)

    def fix(self, ids: Line) -> None:
        """Let ids stay whatever happens."""
        self._fixed.append(ids)

    def mark_residual(self, ids: Line) -> None:
        """Note that ids are summed by a shortcut."""
        self._residual.append(ids)

    def groups(self) -> Line:
        """Give the group of every id, the smallest id in it [count]."""
        group = np.arange(self.count)
        if not self._ties:
            return group
        a, b = (np.concatenate(side) for side in zip(*self._ties, strict=True))
        while (group[a] != group[b]).any():  # each round joins neighbours, then lets every id look up its group
            low, high = np.minimum(group[a], group[b]), np.maximum(group[a], group[b])
            np.minimum.at(group, high, low)
            while (group[group] != group).any():
                group = group[group]
        return group

    def fixed(self) -> Line:
        """Give the ids that stay whatever happens."""
        return np.concatenate([*self._fixed, np.zeros(0, np.int64)])

    def residual(self) -> Line:
        """Give the ids that are summed by a shortcut."""
        return np.concatenate([*self._residual, np.zeros(0, np.int64)])


Flow: TypeAlias = Callable[[Channels, Sequence[Line], int], Line]


def same(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Pass the ids of the first input on."""
    return inputs[0]


def fresh(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Make channels that depend on no single one of the input."""
    return channels.fresh(count)


def kept(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Make channels that have to stay, of channels that have to stay."""
    made = channels.fresh(count)
    channels.fix(np.concatenate([*inputs, made]))
    return made


def fixed(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Pass on ids that all have to stay."""
    channels.fix(inputs[0])
    return inputs[0]


def mixed(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Pass on ids through a gate to which every channel matters a little."""
    return inputs[0] if channels.is_approximate else fixed(channels, inputs, count)


def tied(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Join the ids of a gate with those of the map that it opens, unless it is the same for all of them."""
    gate, source = inputs
    if len(gate) == len(source):
        channels.tie(gate, source)
    else:
        channels.fix(gate)
    return source


def summed(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
    """Join the ids of maps that are added, as far as both have channels."""
    first, *others = inputs
    for other in others:
        both = min(len(first), len(other))
        channels.tie(first[:both], other[:both])
    for each in inputs:
        channels.mark_residual(each)
    return first


def concatenated(groups: int, group: int) -> Flow:
    """Make the flow of slice `group` of `groups` of every input, one after the other; slices stay equal."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        for ids in inputs:
            channels.tie_parts(ids, groups)
        return np.concatenate([np.split(ids, groups)[group] for ids in inputs])

    return flow


def shuffled(groups: int) -> Flow:
    """Make the flow of a shuffle: channel c of group g becomes c·groups + g."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        channels.tie_parts(inputs[0], groups)
        return inputs[0].reshape(groups, -1).T.ravel()

    return flow


def convolved(groups: int, *, keeps_inputs: bool = False) -> Flow:
    """Make the flow of a convolution: fresh, in equal groups, or channel by channel where a group has one input."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        (source,) = inputs
        if keeps_inputs:
            channels.fix(source)
        if groups == len(source) > 1:
            return source.repeat(count // groups)
        channels.tie_parts(source, groups)
        made = channels.fresh(count)
        channels.tie_parts(made, groups)
        return made

    return flow


def folded(cells: int) -> Flow:
    """Make the flow of cells that become channels, the channels of a cell side by side."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        return np.tile(inputs[0], cells)

    return flow


def unfolded(cells: int) -> Flow:
    """Make the flow back."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        channels.tie_parts(inputs[0], cells)
        return inputs[0][:count]

    return flow


def scrambled(cells: int) -> Flow:
    """Make the flow of [reorg]: of every block of `cells` channels in a row come `cells` in a row, `cells` times."""

    def flow(channels: Channels, inputs: Sequence[Line], count: int) -> Line:
        blocks = inputs[0].reshape(-1, cells)  # [blocks, cells]
        for column in blocks.T[1:]:
            channels.tie(blocks[:, 0], column)
        return np.tile(blocks[:, 0], cells).repeat(cells)

    return flow
