"""Distillation: what the strategies compare, which heads and maps they pair, and whose weights move."""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import Darknet, load_cfg, parse
from tests.networks import FIXTURES, ROOT, SHIPPED, name, random
from utils.datasets import Batch
from utils.distillation import DEFAULT, MEMORY, MOST, Distiller, Lessons
from utils.engine import distribute, make_freeze, make_step_loss, make_trainer, train_one_epoch
from utils.feature_distillation import cwd, pkd
from utils.head_pairs import KINDS, Pair, feature_layer, find_pairs
from utils.log import DataError
from utils.output_distillation import Outputs, Truths, box, logits
from utils.recipe import Recipe

CPU = torch.device("cpu")
TINY = (FIXTURES / "tiny.cfg").read_text()
EXACT = tuple(kind for kind in KINDS if kind != "mgd")  # masked generation compares what no two networks share
TARGETS = torch.tensor([[0, 1, 0.3, 0.4, 0.2, 0.2], [1, 3, 0.7, 0.6, 0.2, 0.4], [1, 0, 0.5, 0.5, 0.7, 0.7]])
TRUTHS = Truths(TARGETS, (96, 96), Recipe())


def network(text: str = TINY, seed: int = 0) -> Darknet:
    """Build a network in evaluation mode; fresh batch normalisation would pass over the weights' scale."""
    torch.manual_seed(seed)
    return Darknet(parse(text)).eval()


def wide(text: str = TINY) -> str:
    """Give a cfg's text with wider layers, so that maps want adapters."""
    return text.replace("filters=32", "filters=48")


def lessons_of(distiller: Distiller, x: Tensor, targets: Tensor = TARGETS) -> dict[str, Tensor]:
    """Give the parts of the loss of a batch, of a detection loss of 1."""
    theirs, size = distiller.ask(x, torch.float32), (x.shape[2], x.shape[3])
    total, parts = distiller.add(torch.tensor(1.0), {}, distiller.pupil(x), theirs, targets, size)
    torch.testing.assert_close(total, 1 + parts["kd"])
    return parts


def pictures(number: int = 2, side: int = 96) -> Tensor:
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0))


# Getting at the maps


def test_features_are_the_layers_outputs_beside_the_heads():
    model = network()
    seen = {}
    for index in (3, 7, 9):
        model.blocks[index].register_forward_hook(lambda _m, _i, y, index=index: seen.update({index: y.clone()}))
    maps, found = model.features(pictures(), (9, 3, 7, 3))
    assert all(torch.equal(own, other) for own, other in zip(maps, model(pictures()), strict=True))
    assert [torch.equal(value, seen[index]) for value, index in zip(found, (9, 3, 7, 3), strict=True)] == [True] * 4


@pytest.mark.parametrize("cfg", ["slim-s", "yolov4", "ghost-yolov3-visdrone"])
def test_a_feature_layer_is_what_the_last_convolution_before_a_head_reads(cfg):
    with torch.device("meta"):
        model = Darknet(load_cfg(ROOT / f"cfg/{cfg}.cfg"))
    for head in model.heads:
        convolution = model.layers[head.layer - 1]
        assert convolution.channels == len(head.anchors) * head.entries
        assert (feature_layer(model, head),) == convolution.inputs


# What is compared


QUANTISED = TINY.replace("[convolutional]\nbatch", "[quan_convolutional]\nbatch")


@pytest.mark.parametrize("text", [TINY, QUANTISED], ids=["float", "quantised"])
def test_an_identical_teacher_teaches_nothing(text):
    student = network(text)
    parts = lessons_of(Distiller(student, network(text), Lessons(EXACT, weight=1)), pictures())
    other = lessons_of(Distiller(student, network(text, seed=1), Lessons(EXACT, weight=1)), pictures())
    for kind in EXACT:
        assert abs(parts[f"kd_{kind}"].item()) < 1e-6
        assert other[f"kd_{kind}"].item() > (1e-4 if text == TINY else 1e-5)


def outputs(t: Tensor, **changes: object) -> Outputs:
    return Outputs(t, replace(network().heads[0], **changes))


def test_logits_are_divergences_weighed_by_the_teachers_objectness():
    ours, theirs = random(2, 2, 3, 3, 9), random(2, 2, 3, 3, 9).flip(0)
    p, q = (theirs[..., 5:] / 3).sigmoid(), (ours[..., 5:] / 3).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    sure = theirs[..., 4].sigmoid()
    own = ours[..., 4].sigmoid()
    objectness = sure * (sure / own).log() + (1 - sure) * ((1 - sure) / (1 - own)).log()
    expected = 9 * (sure * each.sum(-1)).sum() + objectness.sum()
    total, count = logits(outputs(ours), outputs(theirs), TRUTHS, 3.0)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(count, sure.sum())
    given = outputs(ours.sigmoid(), is_new_coords=True)  # the same head, but its convolution is logistic already
    torch.testing.assert_close(logits(given, outputs(theirs), TRUTHS, 3.0)[0], expected)


def test_what_is_too_certain_learns_too():
    ours, theirs = torch.full((1, 2, 3, 3, 9), 1e-6, requires_grad=True), torch.full((1, 2, 3, 3, 9), 0.9)
    total, _ = logits(outputs(ours, is_new_coords=True), outputs(theirs, is_new_coords=True), TRUTHS, 1.0)
    total.backward()
    assert ours.grad[..., 4:].max() < 0


def test_classes_that_exclude_each_other_are_one_distribution():
    ours, theirs = random(1, 2, 3, 3, 9), random(1, 2, 3, 3, 9).flip(1)
    ours[..., 4] = theirs[..., 4]
    p, q = theirs[..., 5:].softmax(-1), ours[..., 5:].softmax(-1)
    total, _ = logits(outputs(ours, is_softmax=True), outputs(theirs, is_softmax=True), TRUTHS, 1.0)
    torch.testing.assert_close(total, (theirs[..., 4].sigmoid() * (p * (p / q).log()).sum(-1)).sum())


def test_boxes_learn_only_where_the_teacher_is_nearer_to_the_truth():
    """The truth lies in the middle of a cell and is as large as the first anchor: outputs of 0 hit it."""
    head = network().heads[0]
    side = head.anchors[0][0] / 96
    truth = Truths(torch.tensor([[0, 0, 1.5 / 6, 1.5 / 6, side, side]]), (96, 96), Recipe())
    right, wrong = torch.zeros(1, 2, 6, 6, 9), torch.zeros(1, 2, 6, 6, 9)
    wrong[:, 0, ..., 2:4], wrong[:, 1, ..., 2:4] = 0.3, -0.3  # the second anchor is larger than the truth
    wrong.requires_grad_()
    total, count = box(outputs(wrong), outputs(right), truth, 1.0)
    assert total > 0.05
    (slope,) = torch.autograd.grad(total, wrong)
    assert slope[0, 0, 1, 1, 2] > 0  # too wide: it is to shrink
    places = slope.abs().sum(-1).nonzero()
    assert places.tolist() == [[0, 0, 1, 1]]  # the other anchor's student is nearer to the truth than its teacher
    assert count >= 1
    assert box(outputs(right), outputs(right + 0.3), truth, 1.0)[0] == 0
    assert box(outputs(wrong), outputs(right), truth._replace(targets=truth.targets[:0]), 1.0) == (0, 0)
    strict = truth._replace(recipe=Recipe(anchor_ratio=1.01))  # the other anchor takes no such truth
    assert (count, box(outputs(wrong), outputs(right), strict, 1.0)[1]) == (2, 1)


def test_channels_are_compared_by_where_they_look():
    ours, theirs = random(2, 3, 4, 5), random(2, 3, 4, 5).flip(0)
    p, q = ((x.view(2, 3, 20) / 2).softmax(2) for x in (theirs, ours))
    torch.testing.assert_close(cwd(ours, theirs, 2.0), 4 * (p * (p / q).log()).sum(2).mean())
    torch.testing.assert_close(
        cwd(ours + 5, ours, 1.0), torch.tensor(0.0), atol=1e-6, rtol=0
    )  # how much does not count


def test_pearson_is_one_minus_the_correlation_of_the_channels():
    ours, theirs = random(2, 3, 4, 5), random(2, 3, 4, 5).flip(0)
    r = [torch.corrcoef(torch.stack((ours[:, c].flatten(), theirs[:, c].flatten())))[0, 1] for c in range(3)]
    torch.testing.assert_close(pkd(ours, theirs, 1.0), 1 - torch.stack(r).mean(), atol=1e-4, rtol=0)
    dead = torch.zeros(1, 3, 1, 1, requires_grad=True)
    pkd(dead, dead.detach(), 1.0).backward()
    assert dead.grad.abs().sum() == 0


# Pairs


def test_heads_pair_by_stride_and_shape_of_their_anchors():
    student = network()
    swapped = TINY.replace("mask=0,1", "mask=x").replace("mask=2,3", "mask=0,1").replace("mask=x", "mask=2,3")
    near = network(TINY.replace("12,12, 28,28", "29,27, 13,11"))
    pairs, _ = find_pairs(student, near, KINDS)
    assert pairs["logits"] == pairs["box"] == [Pair(0, 0, ((0, 1), (1, 0))), Pair(1, 1, ((0, 0), (1, 1)))]
    other = network(swapped)
    assert [pair.anchors for pair in find_pairs(student, other, ("cwd",))[0]["cwd"]] == [(), ()]
    with pytest.raises(
        DataError, match=r"--kd box: no head of .*: stride 8: no anchor is .*\(cwd, pkd, mgd would suit"
    ):
        find_pairs(student, other, ("cwd", "box"))


def test_heads_of_other_strides_and_classes_that_exclude_each_other():
    coarse = network(TINY.replace("[convolutional]", "[maxpool]\nsize=8\nstride=8\n\n[convolutional]", 1))
    with pytest.raises(DataError, match=r"no head of the teacher has this stride.*no strategy would suit"):
        find_pairs(network(), coarse, ("cwd",))
    student = network()
    student.heads[0] = replace(student.heads[0], is_softmax=True)
    assert [pair.student for pair in find_pairs(student, network(), ("logits",))[0]["logits"]] == [1]


def test_one_head_without_a_partner_is_told():
    student = network(TINY.replace("12,12, 28,28, 44,44, 72,72", "12,12, 28,28, 4,4, 7,7"))
    distiller = Distiller(student, network(), Lessons(("logits", "cwd")))
    assert distiller.describe()[1:] == [
        "--kd logits: heads without a partner: stride 16: no anchor is within a factor of 1.25 of one of the teacher's"
    ]


# Training


def epoch(distiller: Distiller, student: Darknet, recipe: Recipe | None = None) -> dict[str, float]:
    """Train a student on one batch and give the parts of its loss."""
    recipe = recipe or Recipe()
    trainer = make_trainer(student, recipe, epochs=2, steps=1, device=CPU, dtype=torch.float32, distiller=distiller)
    step_loss = make_step_loss(
        distribute(student, CPU, distiller.pupil), student, recipe, CPU, torch.float32, distiller
    )
    batch = Batch((pictures() * 255).byte(), TARGETS, [0, 1], [])
    freeze = make_freeze(student, 0)
    return train_one_epoch(trainer, [batch], step_loss, device=CPU, accumulate=1, title="", freeze=freeze)


def test_the_student_and_its_aids_learn_the_teacher_stays():
    student, teacher = network(), network(wide(), seed=1)
    distiller = Distiller(student, teacher, Lessons(KINDS))
    before = [[p.clone() for p in m.parameters()] for m in (student, distiller.pupil.aids, distiller.teacher)]
    seen = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    parts = epoch(distiller, student)
    assert {f"kd_{kind}" for kind in KINDS} | {"kd", "box", "objectness", "class", "loss"} == parts.keys()
    assert parts["loss"] == pytest.approx(sum(parts[name] for name in ("box", "objectness", "class", "kd")), rel=1e-5)
    moved = [
        [not torch.equal(a, b) for a, b in zip(old, m.parameters(), strict=True)]
        for old, m in zip(before, (student, distiller.pupil.aids, distiller.teacher), strict=True)
    ]
    assert all(moved[0])
    assert all(moved[1])
    assert not any(moved[2])
    assert all(torch.equal(value, seen[name]) for name, value in distiller.teacher.state_dict().items())
    assert distiller.pupil.aids["cwd"][0].weight.shape == (48, 32, 1, 1)


def test_auto_holds_the_lessons_at_a_share_of_the_detection_loss():
    student, teacher = network(), network(seed=1)
    distiller = Distiller(student, teacher, Lessons(EXACT, share=0.3))
    first = lessons_of(distiller, pictures())
    assert first["kd"].item() == pytest.approx(0.3, rel=1e-5)
    means = dict(distiller.means)
    second = lessons_of(distiller, pictures().flip(1))
    for kind in EXACT:
        value = MEMORY * means[kind] + (1 - MEMORY) * second[f"kd_{kind}"].item()
        assert distiller.means[kind] == pytest.approx(value, rel=1e-5)
    same = Distiller(student, network(), Lessons(("cwd",)))
    assert lessons_of(same, pictures())["kd"] < 1e-5 * MOST


def test_a_first_batch_without_a_lesson_does_not_count():
    distiller = Distiller(network(), network(seed=1), Lessons(("box",)))
    assert lessons_of(distiller, pictures(), TARGETS[:0])["kd"] == 0
    parts = lessons_of(distiller, pictures())
    assert parts["kd"].item() == pytest.approx(Lessons.share, rel=1e-5)


def test_cosine_fades():
    distiller = Distiller(network(), network(seed=1), Lessons(("cwd",), weight=2, schedule="cosine", epochs=4))
    found = []
    for number in range(4):
        distiller.begin(number)
        parts = lessons_of(distiller, pictures())
        found.append((parts["kd"] / parts["kd_cwd"]).item() / 2)
    assert found == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_maps_that_round_otherwise_are_told():
    student, teacher = network(), network(TINY.replace("size=2\nstride=2\n", "size=2\nstride=2\npadding=0\n"))
    distiller = Distiller(student, teacher, Lessons(("cwd",)))
    with pytest.raises(DataError, match="round sizes differently"):
        lessons_of(distiller, pictures(side=92))


# Any two cfgs


def of_four_classes(path: Path) -> str:
    """Give the text of a cfg with four classes in every head, and a small input."""
    parts = re.split(r"(?=\[yolo\])", path.read_text())
    for index, part in enumerate(parts):
        before, _, after = part.rpartition("filters=")
        heads = [len(re.search(r"mask=(.*)", each)[1].split(",")) for each in parts[index + 1 : index + 2]]
        if heads:
            part = f"{before}filters={9 * heads[0]}{after.lstrip('0123456789')}"
        parts[index] = re.sub(r"classes=\d+", "classes=4", part)
    return re.sub(r"(?m)^(width|height)=\d+", r"\1=96", "".join(parts))


def test_every_two_cfgs_of_the_zoo_have_something_to_compare():
    with torch.device("meta"):
        models = [Darknet(parse(of_four_classes(path))) for path in SHIPPED]
    assert len(models) > 30
    for student in models:
        for teacher in models:
            assert find_pairs(student, teacher, DEFAULT)[0]["pkd"]
        found, _ = find_pairs(student, student, KINDS)
        assert {len(pairs) for pairs in found.values()} == {len(student.heads)}


def step(student: Darknet, teacher: Darknet) -> dict[str, float]:
    """Train a student for one step with what suits it and a teacher; give the parts of its loss."""
    return epoch(Distiller(student, teacher, Lessons()), student)


def is_taught(parts: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in parts.values()) and parts["kd"] > 0


@pytest.mark.parametrize(
    "pair", [("slim-s", "shufflenetv2-1x"), ("demo", "yolov3-tiny-eca"), ("yolov4-tiny", "slim-s")], ids="-".join
)
def test_two_different_cfgs_start(pair):
    assert is_taught(step(*(network(of_four_classes(ROOT / f"cfg/{stem}.cfg")) for stem in pair)))


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_every_student_starts_with_every_teacher(path):
    for other in SHIPPED:
        assert is_taught(step(shipped(path), shipped(other)))


@functools.cache
def shipped(path: Path) -> Darknet:
    return network(of_four_classes(path))
