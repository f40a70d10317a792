"""What to cut: the groups that matter least, as many as asked for, and never the whole of a layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models import Darknet

from .importance import Values
from .log import DataError
from .prune import Groups, Mask


@dataclass(frozen=True)
class Plan:
    """The groups in the order in which they go, the least important first.

    `order` holds those that may go without emptying a layer, `free` counts them and those that keep a layer alive,
    `layers` are the groups of every layer that has a width of its own, and how many of its channels are in each.
    """

    order: NDArray[np.int64]
    free: int
    groups: int
    layers: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
    importance: Values
    divisor: int = 1

    @property
    def limit(self) -> float:
        """Give the greatest share of the free groups that can go."""
        return len(self.order) / max(1, self.free)

    def keep(self, count: int) -> Mask:
        """Keep all groups but the first `count`, and those that fill a layer up to a multiple of the divisor."""
        keep = np.ones(self.groups, bool)
        keep[self.order[:count]] = False
        while self.divisor > 1:
            before = keep.sum()
            for members, sizes in self.layers.values():
                _fill_up(keep, members, sizes, self.importance, self.divisor)
            if keep.sum() == before:
                break
        return keep

    def count(self, share: float, flag: str) -> int:
        """Give how many groups a share of the free ones is. Raises DataError, naming `flag`, where it is too large."""
        count = round(share * self.free)
        if count > len(self.order):
            limit = math.floor(1000 * self.limit) / 1000  # rounded up it would be refused, too
            raise DataError(
                f"{flag}: at most {limit:.3f} can go ({len(self.order)} of {self.free} free groups,"
                " the others keep every layer alive: see --layer-keep)"
            )
        return count


def make_plan(
    model: Darknet,
    groups: Groups,
    importance: Values,
    *,
    cuts_residual: bool = False,
    layer_keep: float = 0.0,
    divisor: int = 1,
) -> Plan:
    """Order the groups that may go by importance (NaN: none is known, it stays).

    Every layer keeps at least the share `layer_keep` of its channels and at least one, its most important ones.
    `cuts_residual` lets go what shortcuts sum, too. A layer's channels are filled up to multiples of `divisor`.
    """
    may_go = groups.is_free & ~np.isnan(importance)
    if not cuts_residual:
        may_go &= ~groups.is_residual
    rank = np.where(may_go, importance, np.inf)  # what may not go is kept anyway
    layers = {}
    stays = np.zeros(len(rank), bool)
    for index, layer in enumerate(model.layers):
        if not layer.sets_channels:
            continue
        members, sizes = np.unique(groups.group[groups.lines[index]], return_counts=True)
        layers[index] = members, sizes
        best = np.argsort(-rank[members], kind="stable")
        held = np.cumsum(sizes[best]) - sizes[best]  # channels that better groups hold
        stays[members[best[held < max(1, layer_keep * layer.channels)]]] = True
    goes = np.flatnonzero(may_go & ~stays)
    order = goes[np.argsort(importance[goes], kind="stable")]
    return Plan(order, int(may_go.sum()), len(rank), layers, rank, divisor)


def smallest_cut(plan: Plan, is_enough: Callable[[Mask], bool]) -> int:
    """Give the smallest number of groups whose cut is enough, all where none is; by bisection."""
    low, high = 0, len(plan.order)
    while low < high:
        middle = (low + high) // 2
        if is_enough(plan.keep(middle)):
            high = middle
        else:
            low = middle + 1
    return high


def _fill_up(keep: Mask, members: NDArray[np.int64], sizes: NDArray[np.int64], rank: Values, divisor: int) -> None:
    """Take back a layer's best groups that were to go until its channels divide by `divisor`, or all are back."""
    gone = members[~keep[members]]
    counts = dict(zip(members.tolist(), sizes.tolist(), strict=True))
    left = int(sizes[keep[members]].sum())
    for group in gone[np.argsort(-rank[gone], kind="stable")].tolist():
        if left % divisor == 0:
            return
        keep[group] = True
        left += counts[group]
