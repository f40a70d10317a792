"""Cutting channels: the compact network, from its own files, equals the one whose channels are masked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CLASSIFIER, FIXTURES, HEAVY_CFGS, ROOT, name, seeded
from torch import nn

from models import CfgError, Darknet, dump, load_cfg, load_model, parse, save_weights
from models.darknet import count_parameters
from models.layers_dense import Connected
from models.quant import QuantConv2d
from utils.plan import make_plan
from utils.prune import Groups, Mask, cut, cut_cfg, find_groups, mask

SHARES = (0.1, 0.5, 0.9)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest value of a map
LARGE = 20_000_000  # parameters


def random_cut(groups: Groups, share: float, model: Darknet) -> Mask:
    """Cut a random share of the free groups, but leave every layer a channel."""
    plan = make_plan(
        model, groups, np.random.default_rng(0).random(len(groups.is_free)), cuts_residual=True, layer_keep=0
    )
    return plan.keep(min(len(plan.order), round(share * groups.is_free.sum())))


def picture(model: Darknet, dtype: torch.dtype) -> torch.Tensor:
    side = max(64, 2 * model.stride)
    is_sized = not model.heads or any(isinstance(module, Connected) for module in model.modules())
    size = model.size if is_sized else (side, side)
    return torch.rand(1, model.channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def lively(path: Path) -> Darknet:
    """Build a network whose maps neither vanish nor explode: statistics are those of two random pictures."""
    model = seeded(path).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1
        if isinstance(module, nn.Dropout):
            module.p = 0
    with torch.inference_mode():
        model(torch.cat((picture(model, torch.float32), 1 - picture(model, torch.float32))))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_var.clamp_min_(0.05)  # on maps of a few cells two pictures differ by less: gains explode
    return model.eval()


def assert_exact(path: Path, folder: Path) -> None:
    model = lively(path)
    groups = find_groups(model)
    before = count_parameters(model)
    for share in SHARES:
        keep = random_cut(groups, share, model)
        compact = cut(model, groups, keep, path=str(folder / "pruned.cfg"))
        (folder / "pruned.cfg").write_text(dump(compact.cfg), errors="surrogateescape")
        save_weights(compact, folder / "pruned.weights")
        reloaded = load_model(folder / "pruned.cfg", folder / "pruned.weights", allow_unknown=True)
        assert count_parameters(reloaded) < before or keep.all()
        for dtype, tolerance in TOLERANCE.items():
            if dtype == torch.float32 and any(isinstance(module, QuantConv2d) for module in model.modules()):
                continue  # a rounding error of FP32 moves a value to the next level, and what follows with it
            x = picture(model, dtype)
            with torch.inference_mode():
                expected, maps = mask(model, groups, keep).to(dtype)(x), reloaded.to(dtype)(x)
            for ours, theirs in zip(maps, expected, strict=True):
                assert ours.shape == theirs.shape
                assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert (
        not np.array_equal(random_cut(groups, 0.1, model), random_cut(groups, 0.9, model)) or not groups.is_free.any()
    )


def is_large(path: Path) -> bool:
    with torch.device("meta"):
        return count_parameters(Darknet(load_cfg(path))) > LARGE


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(*param.values, marks=[*param.marks, *[pytest.mark.slow] * is_large(param.values[0])])
        for param in HEAVY_CFGS
    ],
    ids=name,
)
def test_compact_equals_masked(path: Path, tmp_path: Path) -> None:
    assert_exact(path, tmp_path)


@pytest.mark.slow
def test_compact_equals_masked_on_stock_cfgs(shared_data: Path, tmp_path: Path) -> None:
    count = 0
    for path in sorted((shared_data / "darknet/official-cfg").glob("*.cfg")):
        try:
            with torch.device("meta"):
                Darknet(load_cfg(path))
        except CfgError:
            continue  # what Darkslim does not build is tested elsewhere
        try:
            assert_exact(path, tmp_path)
        except AssertionError as error:
            error.add_note(str(path))
            raise
        count += 1
    assert count >= 44


def test_the_output_depends_on_the_picture_after_the_cut() -> None:
    model = lively(ROOT / "cfg/yolov4-tiny.cfg")
    groups = find_groups(model)
    compact = cut(model, groups, random_cut(groups, 0.5, model), path="pruned.cfg")
    with torch.inference_mode():
        one, other = compact(torch.zeros(1, 3, 64, 64)), compact(torch.ones(1, 3, 64, 64))
    assert all((a - b).abs().max() > 0.01 * a.abs().max() for a, b in zip(one, other, strict=True))


def test_the_written_cfg_differs_in_widths_alone() -> None:
    model = seeded(ROOT / "cfg/ghostnet-yolov3.cfg")
    groups = find_groups(model)
    cfg = cut_cfg(model, groups, random_cut(groups, 0.5, model), path="pruned.cfg")
    before, after = dump(model.expanded).splitlines(), dump(cfg).splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed
    for a, b in changed:
        (key, old), (same_key, new) = a.split("="), b.split("=")
        assert key == same_key
        assert key in ("filters", "groups")
        assert int(new) < int(old)


def test_a_pruned_network_can_be_pruned_again(tmp_path: Path) -> None:
    model = seeded(ROOT / "cfg/shufflenetv2-1x.cfg")
    for _ in range(3):
        groups = find_groups(model)
        keep = random_cut(groups, 0.3, model)
        compact = cut(model, groups, keep, path="pruned.cfg")
        x = picture(model, torch.float64)
        with torch.inference_mode():
            expected, maps = mask(model, groups, keep).double()(x), compact.double()(x)
        assert all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(maps, expected, strict=True))
        assert count_parameters(compact) < count_parameters(model)
        model = compact.float()


def test_channels_that_feed_a_head_are_fixed() -> None:
    model = seeded(ROOT / "cfg/yolov3-tiny.cfg")
    groups = find_groups(model)
    for head in model.heads:
        assert not groups.is_free[groups.group[groups.lines[head.layer]]].any()
    assert not groups.is_free[groups.group[groups.image]].any()


def test_gates_that_mix_channels_hold_them_unless_approximate() -> None:
    for gate in ("eca", "cbam"):
        model = seeded(ROOT / f"cfg/yolov3-tiny-{gate}.cfg")
        exact, approximate = (find_groups(model, is_approximate=each) for each in (False, True))
        assert exact.is_free.sum() + 1024 == approximate.is_free.sum()


def test_1_bit_weights_share_a_scale_and_stay() -> None:
    text = (FIXTURES / "valid/quantised.cfg").read_text()
    free = {}
    for bits in (1, 2):
        section = (
            f"[net]\nwidth=32\nheight=32\n[convolutional]\nfilters=8\nactivation=relu\n"
            f"[quan_convolutional]\nfilters=8\nw_bits={bits}\nactivation=relu\n"
            "[convolutional]\nfilters=18\nactivation=linear\n"
            "[yolo]\nclasses=1\nnum=3\nmask=0,1,2\nanchors=1,1,2,2,3,3\n"
        )
        free[bits] = int(find_groups(Darknet(parse(section))).is_free.sum())
    assert "w_bits" in text
    assert free == {1: 0, 2: 16}


def test_shared_weights_are_cut_alike() -> None:
    layers = "[convolutional]\nfilters=8\nsize=3\npad=1\nbatch_normalize=1\nactivation=relu\n"
    text = (
        f"[net]\nwidth=32\nheight=32\n{layers}{layers}{layers}share_index=1\n"
        "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nclasses=1\nnum=3\nmask=0,1,2\nanchors=1,1,2,2,3,3\n"
    )
    model = Darknet(parse(text)).eval()
    groups = find_groups(model)
    assert groups.is_free.sum() == 8  # of three layers together
    keep = np.ones(len(groups.is_free), bool)
    keep[np.flatnonzero(groups.is_free)[:3]] = False
    compact = cut(model, groups, keep, path="pruned.cfg")
    assert [layer.channels for layer in compact.layers[:3]] == [5, 5, 5]
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(mask(model, groups, keep)(x)[0], compact(x)[0], rtol=1e-4, atol=1e-6)


def test_a_classifier_keeps_its_classes() -> None:
    model = seeded(CLASSIFIER)
    groups = find_groups(model)
    compact = cut(model, groups, random_cut(groups, 0.9, model), path="pruned.cfg")
    assert compact.classes == model.classes
    assert count_parameters(compact) < count_parameters(model)


def test_groups_of_all_channels_are_found_in_no_time() -> None:
    """The join of some 34,000 ids of YOLOv4 is a few rounds of numpy: milliseconds, here bounded by a second."""
    program = (
        "import time, torch\nfrom models import Darknet, load_cfg\nfrom utils.prune import find_groups\n"
        "with torch.device('meta'): model = Darknet(load_cfg('cfg/yolov4.cfg'))\n"
        "start = time.process_time(); find_groups(model); print(time.process_time() - start)"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert float(printed.stdout) < 1
