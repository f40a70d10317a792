"""Pruning as a user runs it: what it cuts and leaves, what the guard refuses, and what stops it."""

import json
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import CLASSIFIER, FIXTURES, ROOT
from torch import nn

from models import Darknet, dump, load_cfg, load_model, parse, save_weights
from models.darknet import count_parameters
from models.weights import load_checkpoint, save_checkpoint
from utils import bench, guard, prune_report, sensitivity
from utils.importance import norms
from utils.lint import bflops
from utils.timing import Timing


def conv(filters: int, size: int = 3, more: str = "") -> str:
    return f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\npad=1\nactivation=leaky\n{more}\n"


ADD = "[shortcut]\nfrom=-3\nactivation=linear\n\n"
HEAD = "[convolutional]\nfilters=27\nactivation=linear\n\n[yolo]\nanchors=9,9, 20,20, 40,40\nmask=0,1,2\nclasses=4\n"
BLOCK = conv(8, 1) + conv(16) + ADD
BODY = conv(8, more="stride=2") + conv(16, more="stride=2") + BLOCK + BLOCK + conv(24, more="stride=2")
NET = "[net]\nwidth=64\nheight=64\n\n"
CFG = NET + BODY + HEAD
FREE = 8 + 8 + 8 + 24  # groups: the stem, two bodies, the last; the stream of 16 is a residual one
FILES = ("pruned.cfg", "pruned.weights", "pruned.pt", "report.md", "report.json", "report.png")
SMALL = ("--workers", 0, "--device", "cpu", "--precision", "fp32", "--batch-size", 4)


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Draw nothing but where a test says that it looks at pictures."""
    if "drawn" not in request.node.name:
        for module, name in ((prune_report, "draw_pruning"), (sensitivity, "draw_sensitivity")):
            monkeypatch.setattr(module, name, lambda _, path: path.write_bytes(b"drawn"))
    monkeypatch.setattr(bench, "ROUNDS", 3)


def write(text: str = CFG, folder: str | Path = ".", *, name: str = "net", fresh: bool = False) -> tuple[object, ...]:
    """Write a cfg and weights whose γ are all different, and give the flags that name them."""
    cfg, weights = Path(folder) / f"{name}.cfg", Path(folder) / f"{name}.weights"
    cfg.write_bytes(text.encode())
    torch.manual_seed(0)
    model = Darknet(load_cfg(cfg), allow_unknown=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not fresh:
            module.weight.data = torch.rand(module.num_features) + 0.01
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.1, 0.1)
    save_weights(model, weights)
    return ("--cfg", cfg, "--weights", weights)


def judged(monkeypatch, score) -> None:
    """Let mAP@.5 be `score` of the share of the original's parameters that a network has, of which all are fused."""
    counts = []

    def evaluate(model, *_, **__):
        counts.append(count_parameters(model))
        map50 = score(counts[-1] / counts[0])
        return SimpleNamespace(map50=map50, map50_95=map50 / 2), []

    monkeypatch.setattr(bench, "evaluate", evaluate)


def widths(cfg: str | Path) -> list[int]:
    return [section.int("filters", 0) for section in load_cfg(cfg).sections if section.name == "convolutional"]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def complaint(outcome) -> str:
    """Give the last line on standard error, without the bars of progress before it."""
    assert outcome.status == 2, outcome.err
    return re.split(r"[\r\n]", outcome.err.rstrip())[-1].strip()


def assert_nothing(folder: Path) -> None:
    assert [str(path) for path in folder.rglob("*") if path.name in FILES or ".pruned" in path.name] == []


def test_what_it_leaves_drawn_and_written(command, scenes, tmp_path):
    outcome = command("normal_prune", *write(), "--data", scenes, *SMALL, "--percent", 0.5, "--force")
    assert outcome.status == 0, outcome.err
    places = [Path("weights") if name in ("pruned.weights", "pruned.pt") else Path() for name in FILES]
    assert [name for name, place in zip(FILES, places, strict=True) if not (place / name).is_file()] == []
    assert Path("report.png").read_bytes()[1:4] == b"PNG"
    figures = report(tmp_path)
    assert (figures["free_groups"], figures["cut_groups"], figures["percent"]) == (FREE, FREE // 2, 0.5)
    assert [row["network"] for row in figures["networks"]] == ["original", "masked", "compact"]
    first, _, last = figures["networks"]
    compact = load_model("pruned.cfg", "weights/pruned.weights")
    assert last["parameters"] == count_parameters(compact) < first["parameters"]
    assert last["weights_bytes"] == Path("weights/pruned.weights").stat().st_size
    assert last["bflops"] == bflops(compact)
    assert last["ms"] > 0
    assert all(0 <= row["map50"] <= 1 for row in figures["networks"])
    assert figures["error_float64"] <= 1e-9
    assert figures["error_float32"] <= 1e-4
    for title in ("parameters", "BFLOPs", ".weights, MB", "latency, ms", "mAP@.5", "mAP@.5:.95"):
        assert re.search(rf"^{re.escape(title)} ", outcome.out, flags=re.MULTILINE)
    checkpoint = load_checkpoint("weights/pruned.pt")
    assert checkpoint["names"] == scenes.with_suffix(".names").read_text().split()
    assert checkpoint["data"] == str(scenes)
    state = compact.state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in checkpoint["model"].items() if "num_batch" not in name
    )


def test_a_path_that_is_no_text_is_drawn(command, tmp_path):
    flags = write()
    name = os.fsdecode(b"n\xff.cfg")
    Path("net.cfg").rename(name)
    outcome = command("normal_prune", "--cfg", name, *flags[2:], *SMALL)
    assert outcome.status == 0, outcome.err
    assert name in Path("report.md").read_text("utf-8", "surrogateescape")
    assert report(tmp_path)["cfg"] == name


def test_the_cfg_is_a_diff_of_widths_with_a_comment(command, tmp_path):
    flags = write()
    assert command("normal_prune", *flags, *SMALL, "--percent", 0.5, "--seed", "1").status == 0
    before, after = dump(load_cfg("net.cfg")).splitlines(), Path("pruned.cfg").read_text().splitlines()
    note, count = after.pop(0), after.pop(0)
    assert count == "# {:,} of {:,} parameters".format(
        *(count_parameters(Darknet(load_cfg(cfg))) for cfg in ("pruned.cfg", "net.cfg"))
    )
    assert note.startswith("# pruned by: normal_prune.py --cfg net.cfg --weights net.weights")
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 4
    assert all(line.startswith("filters=") for pair in changed for line in pair)


def test_without_data_it_says_that_nothing_is_tested(command, tmp_path):
    outcome = command("normal_prune", *write(), *SMALL)
    assert outcome.status == 0, outcome.err
    assert "no --data with valid= is given: nothing is tested" in outcome.out
    assert "no --data with train= is given: batch normalisation keeps" in outcome.out
    assert "mAP" not in outcome.out
    assert [row["map50"] for row in report(tmp_path)["networks"]] == [None] * 3
    assert not load_checkpoint("weights/pruned.pt").get("names")  # numbers that stand in for names are no names


def test_gamma_goes_by_the_smallest(command, tmp_path):
    flags = write()
    model = load_model(*flags[1::2])
    values = np.sort(np.concatenate([norm.weight.detach().abs() for index, norm in norms(model) if index in FREE_AT]))
    assert command("normal_prune", *flags, *SMALL, "--percent", 0.5, "--no-compensate").status == 0
    compact = load_model("pruned.cfg", "weights/pruned.weights")
    left = np.sort(np.concatenate([norm.weight.detach() for index, norm in norms(compact) if index in FREE_AT]))
    assert np.array_equal(left, values[FREE // 2 :])


FREE_AT = (0, 2, 5, 8)  # the layers whose channels no shortcut sums


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "random"])
def test_every_criterion_cuts_what_is_asked(criterion, command, scenes, tmp_path, monkeypatch):
    judged(monkeypatch, lambda share: 0.9)
    flags = (*write(), "--data", scenes, *SMALL, "--percent", 0.25, "--recalibrate", 0, "--layer-keep", 0)
    more = ("--batches", 2) if criterion == "taylor" else ()
    outcome = command("normal_prune", *flags, "--criterion", criterion, *more)
    assert outcome.status == 0, outcome.err
    figures = report(tmp_path)
    assert (figures["criterion"], figures["cut_groups"]) == (criterion, FREE // 4)
    chosen = widths("pruned.cfg")
    assert command("normal_prune", *flags, "--output", "gamma").status == 0
    assert chosen != widths("gamma/pruned.cfg")


@pytest.mark.parametrize(("strategy", "free"), [("normal", FREE), ("slim", FREE + 16)])
def test_slim_cuts_what_shortcuts_sum_too(strategy, free, command, tmp_path):
    assert command("normal_prune", *write(), *SMALL, "--percent", 0.6, "--strategy", strategy).status == 0
    left = widths("pruned.cfg")
    assert left[1] == left[3] == left[5]
    assert (left[1] < 16) == (strategy == "slim")
    assert (report(tmp_path)["free_groups"], report(tmp_path)["cut_groups"]) == (free, round(0.6 * free))


def test_layers_take_out_whole_blocks(command, tmp_path):
    flags = write()
    outcome = command("normal_prune", *flags, *SMALL, "--layers", 1)
    assert outcome.status == 0
    assert "\n1 residual block taken out (layers 5 to 7): parameters 8,251 to 6,923\n" in outcome.out
    assert widths("pruned.cfg") == [8, 16, 8, 16, 24, 27]
    assert report(tmp_path)["removed_blocks"] == 1
    outcome = command("normal_prune", *flags, *SMALL, "--layers", 9)
    assert outcome.status == 2
    assert outcome.err.startswith("--layers 9: net.cfg has 2 residual blocks that can go")
    assert command("normal_prune", *flags, *SMALL, "--layers", 2, "--target-params", 0.99).status == 0
    assert widths("pruned.cfg") == [8, 16, 24, 27]  # the blocks alone reach the target


def test_a_percent_over_the_limit_names_the_limit(command, tmp_path):
    flags = (*write(), *SMALL, "--layer-keep", 0)
    outcome = command("normal_prune", *flags, "--percent", 1)
    assert outcome.status == 2
    assert outcome.err == (
        f"--percent 1: at most 0.916 can go ({FREE - 4} of {FREE} free groups, the others keep every"
        " layer alive: see --layer-keep)\n"
    )
    assert_nothing(tmp_path)
    assert command("normal_prune", *flags, "--percent", 0.916).status == 0
    assert widths("pruned.cfg") == [1, 16, 1, 16, 1, 16, 1, 27]  # no layer is cut to nothing


def test_nothing_goes_of_zero_per_cent(command, tmp_path):
    assert command("normal_prune", *write(), *SMALL, "--percent", 0).status == 0
    assert Path("pruned.cfg").read_text().split("\n", 2)[2] == CFG
    assert Path("weights/pruned.weights").read_bytes() == Path("net.weights").read_bytes()


def test_layers_keep_their_share_and_multiples(command, tmp_path):
    flags = (*write(), *SMALL, "--percent", 0.5)
    assert command("normal_prune", *flags, "--layer-keep", 0.5).status == 0
    assert widths("pruned.cfg") == [4, 16, 4, 16, 4, 16, 12, 27]
    assert command("normal_prune", *flags, "--divisor", 4).status == 0
    left = widths("pruned.cfg")[:-1]
    assert all(width % 4 == 0 for width in left)
    assert sum(left) < 96
    outcome = command("normal_prune", *flags, "--divisor", 1000, "--output", "none")
    assert outcome.status == 2
    assert outcome.err == "--divisor 1000: fills every layer up again, so that nothing would be cut\n"
    assert_nothing(Path("none"))


@pytest.mark.parametrize("target", ["8K", "0.75"])
def test_a_target_of_parameters_is_met_by_the_smallest_cut(target, command, tmp_path):
    flags = (*write(), *SMALL, "--criterion", "gamma")
    before = count_parameters(load_model(*flags[1:4:2]))
    bound = 8000 if target == "8K" else 0.75 * before
    assert command("normal_prune", *flags, "--target-params", target).status == 0
    count = report(tmp_path)["cut_groups"]
    assert report(tmp_path)["networks"][-1]["parameters"] <= bound
    assert command("normal_prune", *flags, "--percent", (count - 1) / FREE).status == 0
    assert report(tmp_path)["networks"][-1]["parameters"] > bound


@pytest.mark.parametrize("target", ["0.0022G", "2.2M", "0.7"])
def test_a_target_of_operations_is_met(target, command, tmp_path):
    flags = write()
    bound = 0.7 * bflops(load_model(*flags[1::2])) if target == "0.7" else 0.0022
    outcome = command("normal_prune", *flags, *SMALL, "--target-flops", target)
    assert outcome.status == 0, outcome.err
    assert 0.8 * bound < report(tmp_path)["networks"][-1]["bflops"] <= bound


@pytest.mark.parametrize(("flag", "value"), [("--target-speedup", 1.5), ("--target-latency", 20)])
def test_a_target_of_time_is_met_as_it_is_measured(flag, value, command, tmp_path, monkeypatch):
    flags = write()
    whole = count_parameters(load_model(*flags[1::2]))
    monkeypatch.setattr(  # 30 ms, in proportion to the parameters
        bench, "paired_ms", lambda models, *_, **__: [Timing(30 * count_parameters(m) / whole, 0) for m in models]
    )
    assert command("normal_prune", *flags, *SMALL, flag, value).status == 0
    assert 18 < report(tmp_path)["networks"][-1]["ms"] <= 20
    outcome = command("normal_prune", *flags, *SMALL, flag, 1000 if "speedup" in flag else 0.01)
    assert outcome.status == 2
    assert re.search(r"the most that can go leaves \d+\.\d ms, 0\.\d{3}", outcome.err)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--target-params", "100"),
            r"--target-params 100: asks for 100 parameters, 0\.\d+ .* leaves [\d,]+ parameters",
        ),
        (("--target-flops", "0.01"), r"--target-flops 0\.01: asks for 0\.\d+ BFLOPs, 0\.010 .* leaves 0\.\d+ BFLOPs"),
        (("--target-params", "9M"), r"--target-params 9,000,000: the network is there already \([\d,]+ parameters\)"),
        (("--iterative", 2, "--percent", 1), r"--percent 1: at most 0\.\d+ can go"),
    ],
)
def test_a_target_that_cannot_be_met_names_what_can(flags, words, command, scenes, tmp_path, monkeypatch):
    judged(monkeypatch, lambda share: 0.9)
    more = ("--data", scenes) if "--iterative" in flags else ()
    outcome = command("normal_prune", *write(), *more, *SMALL, *flags)
    assert re.match(words, complaint(outcome))
    assert "epoch" not in outcome.out + outcome.err
    assert_nothing(tmp_path)


def test_statistics_are_estimated_on_training_pictures(command, scenes, tmp_path, monkeypatch):
    judged(monkeypatch, lambda share: 0.9)
    flags = (*write(), "--data", scenes, *SMALL, "--percent", 0.3)
    assert command("normal_prune", *flags, "--recalibrate", 0, "--no-compensate").status == 0
    kept = load_model("pruned.cfg", "weights/pruned.weights").layers[1].module.bn.running_mean
    assert torch.equal(kept, load_model(*flags[1:4:2]).layers[1].module.bn.running_mean)
    assert command("normal_prune", *flags, "--recalibrate", 0).status == 0
    compensated = load_model("pruned.cfg", "weights/pruned.weights").layers[1].module.bn.running_mean
    assert command("normal_prune", *flags, "--recalibrate", 8, "--no-compensate").status == 0
    estimated = load_model("pruned.cfg", "weights/pruned.weights").layers[1].module.bn.running_mean
    assert command("normal_prune", *flags, "--recalibrate", 8).status == 0
    both = load_model("pruned.cfg", "weights/pruned.weights").layers[1].module.bn.running_mean
    assert not torch.allclose(kept, compensated)
    assert not torch.allclose(kept, estimated)
    assert torch.allclose(estimated, both)


def test_sensitivity_is_measured_layer_by_layer(command, scenes, tmp_path, monkeypatch):
    judged(monkeypatch, lambda share: 0.9)
    outcome = command("normal_prune", *write(), "--data", scenes, *SMALL, "--sensitivity", "--output", "out")
    assert outcome.status == 0, outcome.err
    rows = json.loads(Path("out/sensitivity.json").read_text())
    assert {tuple(row["layers"]) for row in rows} == {(0,), (1, 3, 6), (2,), (5,), (8,)}
    assert {row["ratio"] for row in rows} == set(sensitivity.RATIOS)
    assert all(row["map50"] == 0.9 for row in rows)
    assert Path("out/sensitivity.png").exists()


def test_iterative_prunes_and_trains_in_turn(command, scenes, tmp_path, monkeypatch):
    judged(monkeypatch, lambda share: 0.9)
    flags = (*write(), "--data", scenes, *SMALL, "--percent", 0.5, "--iterative", 3, "--epochs", 1)
    outcome = command("normal_prune", *flags)
    assert outcome.status == 0, outcome.err
    assert [outcome.out.count(f"step {number} of 3: ") for number in (1, 2, 3)] == [1, 1, 1]
    assert outcome.out.count("epoch 1/1: loss") == 2
    figures = report(tmp_path)
    assert figures["free_groups"] == FREE
    assert abs(figures["cut_groups"] - FREE // 2) <= 1
    assert [row["before"] - row["after"] for row in figures["layers"]] == [
        before - after for before, after in zip(widths("net.cfg"), widths("pruned.cfg"), strict=True)
    ]
    assert Path("pruned.cfg").read_text().count("# pruned by:") == 1
    outcome = command("normal_prune", *flags[:-6], "--target-params", 0.64, "--iterative", 2, "--epochs", 1)
    assert re.findall(r"^--target-params 0.64: (\S+) parameters now", outcome.out, re.M) == ["8,251", "8,251", "6,601"]
    assert count_parameters(Darknet(load_cfg("pruned.cfg"))) <= 0.64 * 8251


def test_the_guard_refuses_a_ruin_alone(command, scenes, tmp_path, monkeypatch):
    flags = (*write(), "--data", scenes, *SMALL, "--percent", 0.8)
    judged(monkeypatch, lambda share: 0.8 if share > 0.9 else 0.07)
    outcome = command("normal_prune", *flags)
    assert re.match(
        r"a ruin: mAP@\.5 falls from 0\.800 to 0\.070, less than a tenth; nothing is written \(--percent 0\.\d\d would"
        r" lose at most 5 points before fine-tuning; --force writes it all the same\)$",
        complaint(outcome),
    )
    assert_nothing(tmp_path)
    share = re.search(r"--percent (0\.\d\d)", outcome.err)[1]
    judged(monkeypatch, lambda share: 0.8 if share > 0.9 else 0.07)
    safe = command("normal_prune", *flags[:-1], share, "--max-drop", 5)
    assert safe.status == 0, safe.err
    judged(monkeypatch, lambda share: 0.8 if share > 0.9 else 0.07)
    forced = command("normal_prune", *flags, "--force", "--output", "forced")
    assert forced.status == 0
    assert "a ruin: " in forced.out
    assert (tmp_path / "forced/pruned.pt").exists()


def test_the_guard_warns_of_a_loss_and_refuses_more_than_max_drop(command, scenes, tmp_path, monkeypatch):
    flags = (*write(), "--data", scenes, *SMALL, "--percent", 0.8)
    judged(monkeypatch, lambda share: 0.8 * share)
    outcome = command("normal_prune", *flags, "--output", "warned")
    assert outcome.status == 0
    assert re.search(
        r"^mAP@\.5 falls by \d+\.\d points, from 0\.800 to 0\.\d+; --percent 0\.\d\d would", outcome.out, re.M
    )
    judged(monkeypatch, lambda share: 0.8 * share)
    refused = command("normal_prune", *flags, "--max-drop", 5, "--output", "refused")
    assert re.match(
        r"mAP@\.5 falls by \d+\.\d points, from 0\.800 to 0\.\d+ \(--max-drop 5\); nothing is", complaint(refused)
    )
    assert_nothing(tmp_path / "refused")
    judged(monkeypatch, lambda share: 0.8 - 0.4 * (1 - share))
    strict = command("normal_prune", *flags, "--max-drop", 2, "--output", "refused")
    share = re.search(r"--percent (0\.\d\d) would lose at most 2 points", complaint(strict))[1]
    judged(monkeypatch, lambda share: 0.8 - 0.4 * (1 - share))
    assert command("normal_prune", *flags[:-1], share, "--max-drop", 2, "--output", "kept").status == 0
    judged(monkeypatch, lambda share: 0.8 - 0.01 * (share < 1))
    assert "--percent" not in command("normal_prune", *flags, "--output", "fine").out


def test_nothing_is_written_where_masked_and_compact_differ(command, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "difference", lambda *_: 0.5)
    outcome = command("normal_prune", *write(), *SMALL)
    assert outcome.status == 2
    assert outcome.err.startswith("masked and pruned network differ by 5.0e-01 in float64 (expected 1e-09")
    assert_nothing(tmp_path)


NO_WEIGHTS = "--weights: not given, and there is no weights/best.pt"
BAD = {
    "fresh": ((), "fresh.weights: every γ is 1, which tells no channel from another: sparse training first"),
    "no weights": (("--weights", ""), NO_WEIGHTS),
    "absent weights": (("--weights", "none.weights"), "none.weights: "),
    "another cfg": (("--cfg", ROOT / "cfg/demo.cfg"), "net.weights: "),
    "classifier": (("--cfg", CLASSIFIER), "net.weights: "),
    "two goals": (("--percent", 0.1, "--target-params", "1K"), "usage:"),
    "percent": (("--percent", 60), "usage:"),
    "target": (("--target-params", "many"), "usage:"),
    "max-drop": (("--max-drop", 5), "--max-drop: needs --data with valid="),
    "sensitivity": (("--sensitivity",), "--sensitivity: needs --data with valid="),
    "taylor": (("--criterion", "taylor"), "--criterion taylor: needs --data with train="),
    "iterative": (("--iterative", 3), "--iterative: needs --data with train="),
    "absent data": (("--data", "none.data"), "none.data: cannot be read"),
    "empty list": (("--data", "empty.data"), "empty.txt: names no image"),
    "a file": (("--output", "net.cfg"), "net.cfg: cannot be read or written: File exists"),
    "itself": (
        ("--weights", "itself/pruned.weights", "--output", "itself"),
        "itself/pruned.weights: is read and would",
    ),
    "size": (("--img-size", 65), "--img-size 65: expected a multiple of 8"),
    "NaN": (("--weights", "nan.weights", "--criterion", "random"), "net.cfg: the network puts out NaN"),
}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--epochs", 5), "--epochs needs --iterative"),
        (("--batches", 5), "--batches needs --criterion taylor"),
        (("--iterative", 2, "--layers", 1), "--iterative cuts channels in steps, and --layers alone cuts none"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, words, command, tmp_path):
    outcome = command("normal_prune", *write(), *SMALL, *flags)
    assert outcome.status == 2
    assert f"error: {words}" in outcome.err
    assert_nothing(tmp_path)


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_answered_in_a_line(case, command, tmp_path):
    flags, words = BAD[case]
    given = write(name="fresh", fresh=True) if case == "fresh" else write()
    Path("itself").mkdir()
    Path("itself/pruned.weights").write_bytes(Path("net.cfg").read_bytes() if case == "NaN" else b"")
    if case == "NaN":
        data = Path("net.weights").read_bytes()
        Path("nan.weights").write_bytes(data[:20] + 8 * np.float32(3e38).tobytes() + data[52:])  # biases
    Path("empty.txt").touch()
    Path("empty.names").write_text("a\nb\nc\nd\n")
    Path("empty.data").write_text("names=empty.names\nvalid=empty.txt\ntrain=empty.txt\n")
    outcome = command("normal_prune", *given, *SMALL, *flags)
    assert outcome.status == 2
    assert outcome.err.startswith(words)
    assert words == "usage:" or outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    Path("itself/pruned.weights").unlink()
    assert_nothing(tmp_path)


def test_a_classifier_is_refused(command, tmp_path):
    torch.manual_seed(0)
    save_weights(Darknet(load_cfg(CLASSIFIER)), "class.weights")
    outcome = command("normal_prune", "--cfg", CLASSIFIER, "--weights", "class.weights", *SMALL)
    assert outcome.status == 2
    assert "is a classifier (expected a detector" in outcome.err


def test_a_full_disk_leaves_what_was_there(command, tmp_path):
    flags = (*write(), *SMALL, "--output", "out", "--percent")
    assert command("normal_prune", *flags, 0.8).status == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["pruned.weights"]) + 100, old[1]))
    try:
        outcome = command("normal_prune", *flags, 0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert outcome.status == 2
    assert outcome.err.startswith("out: cannot be written to: ")
    assert outcome.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_ctrl_c_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_report, "draw_pruning", interrupted)
    outcome = command("normal_prune", *write(), *SMALL)
    assert (outcome.status, outcome.err) == (130, "")
    assert_nothing(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_told_first(command, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    outcome = command("normal_prune", *write(), *SMALL, "--output", "out")
    assert (outcome.status, outcome.err) == (2, "out: cannot be written to (give --output another folder)\n")


def test_earlier_results_are_written_over_and_told(command, tmp_path):
    flags = (*write(), *SMALL, "--output", "out")
    assert "there already" not in command("normal_prune", *flags).out
    outcome = command("normal_prune", *flags)
    assert outcome.out.startswith("there already, and will be written over: out/pruned.cfg, out/pruned.weights")


SHARED = CFG.replace(HEAD, conv(24) + conv(24, more="share_index=9") + HEAD)
QUANTISED = CFG.replace("[convolutional]", "[quan_convolutional]", 3).replace("activation=leaky", "activation=relu")
FORMS = {
    "crlf": CFG.replace("\n", "\r\n"),
    "no last newline": CFG.rstrip(),
    "macro": CFG.replace(HEAD, "[se]\nreduction=4\n\n" + HEAD),
    "eca": CFG.replace(HEAD, "[eca]\nkernel_size=3\n\n" + HEAD),
    "cbam": CFG.replace(HEAD, "[ca]\nratio=4\n\n[sa]\nkernelsize=7\n\n" + HEAD),
    "shared": SHARED,
    "quantised": QUANTISED,
    "region": NET
    + BODY
    + HEAD.partition("[yolo]")[0]
    + "[region]\nanchors=1,1, 2,2, 4,4\nnum=3\nclasses=4\nsoftmax=1\n",
    "unknown key": CFG.replace("filters=24", "filters=24\ncolour=red"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_approximate", [False, True])
def test_all_kinds_of_cfgs_are_pruned(form, is_approximate, command, tmp_path):
    flags = (*write(FORMS[form]), *SMALL, "--percent", 0.5, *(["--approximate"] if is_approximate else []))
    outcome = command("normal_prune", *flags, *(["--allow-unknown"] if form == "unknown key" else []))
    assert outcome.status == 0, outcome.err
    figures = report(tmp_path)
    is_gated = form in ("eca", "cbam") and is_approximate
    assert (figures["error_float64"] is None) == is_gated
    assert ("not compared" in Path("report.md").read_text()) == is_gated
    assert figures["cut_groups"] == round(0.5 * figures["free_groups"])
    compact = load_model("pruned.cfg", "weights/pruned.weights", allow_unknown=True)
    assert count_parameters(compact) == figures["networks"][-1]["parameters"] < figures["networks"][0]["parameters"]
    assert outcome.out.count("colour") == (form == "unknown key")
    if form == "crlf":
        lines = Path("pruned.cfg").read_bytes().splitlines(keepends=True)[2:]
        assert all(line.endswith(b"\r\n") for line in lines)


def test_eca_holds_its_channels_unless_approximate(command, tmp_path):
    flags = (*write(FORMS["eca"]), *SMALL, "--percent", 0.5)
    assert command("normal_prune", *flags).status == 0
    assert widths("pruned.cfg")[-2] == 24
    assert command("normal_prune", *flags, "--approximate").status == 0
    assert widths("pruned.cfg")[-2] < 24


def test_a_pt_that_describes_itself(command, scenes, tmp_path):
    flags = write()
    model, described = load_model(*flags[1::2]), {"cfg": CFG, "names": ["a", "b", "c", "d"]}
    recipe = {"distortion": {"keeps_shape": False}}
    save_checkpoint("net.pt", {**described, "recipe": recipe, "model": model.state_dict()})
    outcome = command("normal_prune", "--weights", "net.pt", *SMALL)
    assert outcome.status == 0, outcome.err
    assert "net.pt learned from stretched pictures" in outcome.out
    checkpoint = load_checkpoint("weights/pruned.pt")
    assert (checkpoint["names"], checkpoint["recipe"]) == (described["names"], recipe)
    outcome = command("normal_prune", "--weights", "net.pt", "--data", scenes, *SMALL)
    assert outcome.status == 2
    assert "but net.pt learned a, b, c, d" in outcome.err


@pytest.mark.parametrize("classes", [1, 4])
def test_all_classes_as_one(classes, command, scenes, tmp_path):
    filters = 3 * (5 + classes)
    text = CFG.replace("filters=27", f"filters={filters}").replace("classes=4", f"classes={classes}")
    flags = write(text)
    names = ["object"] if classes == 1 else scenes.with_suffix(".names").read_text().split()
    save_checkpoint("net.pt", {"cfg": text, "names": names, "model": load_model(*flags[1::2]).state_dict()})
    more = ("--data", scenes, *SMALL, "--force", "--criterion", "taylor", "--batches", 1, "--recalibrate", 4)
    outcome = command("normal_prune", "--weights", "net.pt", *more, "--single-cls")
    assert outcome.status == 0, outcome.err
    assert load_checkpoint("weights/pruned.pt")["names"] == names


def test_pictures_without_boxes(command, scenes, tmp_path):
    for split in ("train", "valid"):
        Path(f"images/{split}").mkdir(parents=True)
        for path in sorted((scenes.parent / f"images/{split}").iterdir())[:1]:
            (Path("images") / split / path.name).write_bytes(path.read_bytes())
        Path(f"labels/{split}").mkdir(parents=True)
        (Path("labels") / split / path.name).with_suffix(".txt").touch()
    Path("bare.names").write_text(scenes.with_suffix(".names").read_text())
    Path("bare.data").write_text("names=bare.names\ntrain=images/train\nvalid=images/valid\n")
    outcome = command("normal_prune", *write(), "--data", "bare.data", *SMALL, "--criterion", "taylor")
    assert outcome.status == 0, outcome.err
    assert [row["map50"] for row in report(tmp_path)["networks"]] == [0, 0, 0]
    outcome = command("normal_prune", *write(), "--data", "bare.data", *SMALL, "--img-size", 8)
    assert complaint(outcome).startswith("--recalibrate: the last batch is one picture of one cell")


def test_what_it_writes_is_trained_tested_detected_with_and_pruned_again(command, scenes, tmp_path):
    assert command("normal_prune", *write(), *SMALL, "--percent", 0.3).status == 0
    pruned = ("--cfg", "pruned.cfg", "--weights", "weights/pruned.weights")
    run = command("train", *pruned, "--data", scenes, *SMALL, "--epochs", 1, "--name", "tuned")
    assert run.status == 0, run.err
    assert command("test", *pruned, "--data", scenes, *SMALL, "--noplots").status == 0
    assert command("test", "--weights", "weights/pruned.pt", "--data", scenes, *SMALL, "--noplots").status == 0
    picture = min((scenes.parent / "images/valid").iterdir())
    assert command("detect", *pruned, "--data", scenes, "--source", picture, "--device", "cpu").status == 0
    outcome = command("normal_prune", "--weights", "runs/tuned/last.pt", *SMALL, "--percent", 0.5, "--output", "second")
    assert outcome.status == 0, outcome.err
    notes = [line for line in Path("second/pruned.cfg").read_text().splitlines() if line.startswith("# pruned by")]
    assert len(notes) == 2
    assert sum(widths("second/pruned.cfg")) < sum(widths("pruned.cfg")) < sum(widths("net.cfg"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [FIXTURES / "tiny.cfg", *sorted(FIXTURES.glob("valid/*.cfg"))], ids=lambda path: path.stem
)
def test_fixtures_are_pruned(path, command, tmp_path):
    text = path.read_text()
    if not Darknet(parse(text), allow_unknown=True).heads:
        pytest.skip("no detector")
    outcome = command("normal_prune", *write(text), *SMALL, "--criterion", "l2", "--percent", 0.3)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_yolov4_takes_seconds(command, tmp_path):
    flags = write((ROOT / "cfg/yolov4.cfg").read_text())
    start = sum(os.times()[:2])
    assert command("normal_prune", *flags, "--criterion", "l2", "--device", "cpu").status == 0
    assert sum(os.times()[:2]) - start < 40  # of all threads, two on an idle machine: under 20 s
