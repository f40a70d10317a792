"""What is cut, in which order, and what stays."""

import numpy as np
import pytest

from models import Darknet, parse
from utils.log import DataError
from utils.plan import Plan, make_plan, smallest_cut
from utils.prune import find_groups

CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=1\nactivation=linear\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nmask=0\nnum=1\nclasses=1\n"
CHAIN = CONV.format(8) + CONV.format(4)
TIED = CHAIN + CONV.format(4) + "[shortcut]\nfrom=-2\nactivation=linear\n"


def planned(layers: str, **options) -> tuple[Plan, list[np.ndarray]]:
    """Plan with the ids of groups for importance, and give the groups of every layer."""
    model = Darknet(parse(f"[net]\nwidth=8\nheight=8\n{layers}{HEAD}"))
    groups = find_groups(model)
    importance = np.arange(len(groups.is_free), dtype=float)
    return make_plan(model, groups, importance, **options), [groups.group[line] for line in groups.lines]


def left(plan: Plan, layers: list[np.ndarray], count: int) -> list[int]:
    keep = plan.keep(count)
    return [int(keep[layer].sum()) for layer in layers]


def test_the_least_important_go_first_and_every_layer_keeps_its_best() -> None:
    plan, layers = planned(CHAIN)
    assert (plan.free, len(plan.order), plan.limit) == (12, 10, 10 / 12)
    assert plan.order.tolist() == sorted(plan.order)
    keep = plan.keep(10)
    assert [layer[keep[layer]].tolist() for layer in layers[:2]] == [[layers[0].max()], [layers[1].max()]]
    assert plan.keep(0).all()


def test_a_share_over_the_limit_names_it() -> None:
    plan, _ = planned(CHAIN)
    assert plan.count(0.5, "--percent 0.5") == 6
    assert plan.count(10 / 12, "") == 10
    with pytest.raises(DataError, match=r"^--percent 0\.9: at most 0\.833 can go \(10 of 12 free groups"):
        plan.count(0.9, "--percent 0.9")


def test_the_limit_that_is_named_can_be_asked_for() -> None:
    plan, _ = planned(CONV.format(700) * 2)
    with pytest.raises(DataError, match=r": at most 0\.998 can go \(1398 of 1400 free groups"):  # 0.99857
        plan.count(1, "--percent 1")
    assert plan.count(0.998, "") <= 1398 < round(0.999 * 1400)


def test_layers_keep_their_share() -> None:
    plan, layers = planned(CHAIN, layer_keep=0.3)
    assert left(plan, layers, len(plan.order))[:2] == [3, 2]  # 2.4 and 1.2, rounded up


def test_streams_stay_unless_slim() -> None:
    plan, layers = planned(TIED)
    assert (plan.free, left(plan, layers, len(plan.order))[:3]) == (8, [1, 4, 4])
    plan, layers = planned(TIED, cuts_residual=True)
    assert (plan.free, left(plan, layers, len(plan.order))[:3]) == (12, [1, 1, 1])


def test_layers_are_filled_up_to_multiples_with_their_best() -> None:
    plan, layers = planned(CHAIN, divisor=4)
    for count in range(len(plan.order) + 1):
        assert {each % 4 for each in left(plan, layers, count)[:2]} == {0}
    kept = plan.keep(5)[layers[0]]
    assert kept.tolist() == [False] * 4 + [True] * 4
    assert planned(CHAIN, divisor=1000)[0].keep(10).all()


def test_what_has_no_importance_stays() -> None:
    model = Darknet(parse(f"[net]\nwidth=8\nheight=8\n{CHAIN}{HEAD}"))
    groups = find_groups(model)
    importance = np.arange(len(groups.is_free), dtype=float)
    first = groups.group[groups.lines[0]]
    importance[first] = np.nan
    plan = make_plan(model, groups, importance)
    assert plan.free == 4
    assert plan.keep(len(plan.order))[first].all()


@pytest.mark.parametrize("needed", range(11))
def test_the_smallest_cut_that_is_enough(needed) -> None:
    plan, _ = planned(CHAIN)
    assert smallest_cut(plan, lambda keep: (~keep).sum() >= needed) == needed


def test_all_go_where_nothing_is_enough() -> None:
    assert smallest_cut(planned(CHAIN)[0], lambda keep: False) == 10
