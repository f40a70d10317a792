"""Weights in and out: exact to the byte, partial files that say what they fill, and every bad file refused by name."""

import pickle
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CFGS, HEAVY_CFGS, seeded

from models import Darknet, WeightsError, dump, load_cfg, load_model, load_weights, save_weights
from models.weights import checkpoint_cfg, describe, load_checkpoint, save_checkpoint

(CFG,) = (path for path in CFGS if path.stem == "every_section")
LONG = struct.pack("<3iq", 0, 2, 5, 32_013_312)
SHORT = struct.pack("<4i", 0, 1, 0, 32_013_312)


def sizes(model: Darknet) -> list[int]:
    """Count the values of every layer in a .weights file."""
    state = model.state_dict()
    return [sum(state[f"blocks.{i}.{n}"].numel() for n in layer.tensors) for i, layer in enumerate(model.layers)]


def random_values(model: Darknet) -> bytes:
    return np.random.default_rng(0).random(sum(sizes(model)), np.float32).tobytes()


def empty(cfg: Path) -> Darknet:
    """Build a network whose values are whatever the memory held: whatever must be loaded."""
    with torch.device("meta"):
        model = Darknet(load_cfg(cfg))
    return model.to_empty(device="cpu").eval()


def refusal(model: Darknet, path: Path) -> str:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), "a refused file changed the network"
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("path", "header"),
    [pytest.param(*param.values, LONG, id=param.values[0].stem, marks=param.marks) for param in HEAVY_CFGS]
    + [pytest.param(CFG, SHORT, id="32-bit seen")],
)
def test_a_weights_file_comes_back_byte_for_byte(path: Path, header: bytes, tmp_path: Path) -> None:
    model, first, second = empty(path), tmp_path / "first.weights", tmp_path / "second.weights"
    data = header + random_values(model)
    first.write_bytes(data)
    assert load_weights(model, first) == list(range(len(model.layers)))
    save_weights(model, second)
    assert second.read_bytes() == data
    first.unlink()  # up to 250 MB each
    second.unlink()


def test_real_weights_come_back_byte_for_byte(shared_data: Path, tmp_path: Path) -> None:
    headers = set()
    paths = sorted({*shared_data.glob("darknet/**/*.weights")} - {*shared_data.glob("darknet/bad-files/*")})
    for path in paths:
        (cfg,) = shared_data.glob(f"darknet/**/{path.stem}.cfg")
        model = load_model(cfg, path)
        headers.add(model.header[:3])
        save_weights(model, tmp_path / "again.weights")
        assert (tmp_path / "again.weights").read_bytes() == path.read_bytes(), path
    assert len(paths) >= 7
    assert headers == {(0, 1, 0), (0, 2, 5)}


def test_the_order_of_the_values_is_darknets(tmp_path: Path) -> None:
    model = seeded(CFG)
    bn, conv, bias = model.blocks[0].bn, model.blocks[0].conv, model.blocks[19].conv.bias
    save_weights(model, tmp_path / "x.weights")
    data = (tmp_path / "x.weights").read_bytes()
    assert data[:20] == struct.pack("<3iq", 0, 2, 5, 0)
    written = torch.from_numpy(np.frombuffer(data, "<f4", offset=20).copy())
    parts = (bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight.flatten())
    assert torch.equal(written[: 4 * 8 + conv.weight.numel()], torch.cat(parts))
    start = sum(sizes(model)[:19])
    assert torch.equal(written[start : start + 16], bias)


@pytest.mark.parametrize("header", [LONG, SHORT], ids=["64-bit seen", "32-bit seen"])
def test_a_file_that_ends_on_a_layer_fills_the_layers_before(header: bytes, tmp_path: Path) -> None:
    path, values = tmp_path / "x.weights", random_values(empty(CFG))
    ends = list(accumulate(sizes(empty(CFG))))
    boundaries = sorted(set(ends))
    assert len(boundaries) == 10
    for boundary in boundaries:
        model = seeded(CFG)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        path.write_bytes(header + values[: 4 * boundary])
        filled = load_weights(model, path)
        count = sum(end <= boundary for end in ends)
        assert filled == list(range(count))
        assert describe(model, filled) == (f"0-{count - 1}" if count > 1 else "0") + " of 27"
        changed = {
            int(key.split(".")[1]) for key, tensor in model.state_dict().items() if not tensor.equal(before[key])
        }
        assert changed == {index for index in filled if model.layers[index].tensors}
        if boundary == ends[-1]:
            load_model(CFG, path)
            continue
        with pytest.raises(WeightsError) as caught:
            load_model(CFG, path)
        assert f"is partial: it fills {describe(model, filled)} layers of {CFG}, layer {count} is" in str(caught.value)


def test_a_file_that_ends_inside_a_layer_is_refused(tmp_path: Path) -> None:
    model, path = seeded(CFG), tmp_path / "x.weights"
    values, ends = random_values(model), list(accumulate(sizes(model)))
    for layer, (start, end) in enumerate(pairwise([0, *ends])):
        for count in {start + 1, end - 1} if start < end else ():
            path.write_bytes(LONG + values[: 4 * count])
            assert refusal(model, path) == (
                f"ends inside layer {layer}: the file holds {count} values, {CFG} takes {ends[-1]}"
                " (cut off, or the weights of another cfg?)"
            )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds 0 bytes, less than a header (an empty or failed download?)"),
        (LONG[:15], "holds 15 bytes, less than a header (an empty or failed download?)"),
        (LONG, "ends inside layer 0: the file holds 0 values, CFG takes ALL (cut off, or the weights of another cfg?)"),
        (LONG + b"123", "its 3 bytes of values are no multiple of 4 (damaged or cut off)"),
        (b"<!DOCTYPE html><html>Not found</html>", "is not a Darknet weights file (its version reads 1329865020."),
        (b"PK\3\4" + bytes(40), "is not a Darknet weights file (its version reads 67324752.0.0)"),
        (struct.pack("<3iq", 0, -1, 0, 0), "is not a Darknet weights file (its version reads 0.-1.0)"),
        (
            "whole",
            "is too long: the file holds MORE values, CFG takes ALL (another cfg's? those of method=",
        ),
        ("nan", "holds NaN or infinity in layer 2 (a failed training?)"),
        ("inf", "holds NaN or infinity in layer 25 (a failed training?)"),
    ],
)
def test_a_file_that_holds_no_weights_of_the_network_is_refused(
    data: bytes | str, message: str, tmp_path: Path
) -> None:
    model, path = seeded(CFG), tmp_path / "x.weights"
    values, ends = np.frombuffer(random_values(model), np.float32).copy(), list(accumulate(sizes(model)))
    if data == "whole":
        data = LONG + values.tobytes() + bytes(4)
    elif isinstance(data, str):
        values[ends[1] if data == "nan" else ends[-1] - 1] = float(data)
        data = LONG + values.tobytes()
    path.write_bytes(data)
    wanted = message.replace("CFG", str(CFG)).replace("ALL", str(ends[-1])).replace("MORE", str(ends[-1] + 1))
    assert refusal(model, path).startswith(wanted)


@pytest.mark.parametrize(("name", "why"), [("none.weights", "No such file"), (".", "Is a dir"), ("none.pt", "No such")])
def test_weights_that_cannot_be_read(name: str, why: str, tmp_path: Path) -> None:
    assert refusal(seeded(CFG), tmp_path / name).startswith(f"cannot read the weights: {why}")


def test_bad_files_from_the_wild_are_refused(shared_data: Path) -> None:
    folder, model = shared_data / "darknet/bad-files", seeded(CFG)
    assert refusal(model, folder / "nikela_yolov3-tiny.weights").startswith("is not a Darknet weights file")
    assert refusal(model, folder / "truncated_yolov4-tiny.conv.29").endswith("no multiple of 4 (damaged or cut off)")


@pytest.mark.parametrize("part", ["MobileNetV2-YOLO-Fastest.conv.57", "MobileNetV2-Nano.57"])
def test_real_partial_files_fill_57_layers(part: str, shared_data: Path) -> None:
    (path,) = shared_data.glob(f"darknet/**/{part}")
    (cfg,) = shared_data.glob(f"darknet/**/{'*-Nano-voc' if 'Nano' in part else '*-Fastest-voc'}.cfg")
    model = Darknet(load_cfg(cfg))
    filled = load_weights(model, path)
    assert filled == list(range(len(filled)))
    assert filled[-1] >= 56
    with pytest.raises(WeightsError, match="is partial"):
        load_model(cfg, path)


def test_the_weights_of_another_cfg_are_refused(shared_data: Path) -> None:
    (path,) = shared_data.glob("darknet/**/yoloface-500k.weights")
    (cfg,) = (cfg for cfg in CFGS if cfg.stem == "yolov3-tiny")
    message = refusal(seeded(cfg), path)
    assert message.startswith("ends inside layer ")
    assert message.endswith("(cut off, or the weights of another cfg?)")


def checkpoint(model: Darknet) -> dict[str, object]:
    return {"cfg": dump(model.cfg), "cfg_path": model.cfg.path, "model": model.state_dict(), "epoch": 3}


def test_a_checkpoint_carries_its_network(tmp_path: Path) -> None:
    model, path = seeded(CFG, seed=1), tmp_path / "x.pt"
    save_checkpoint(path, checkpoint(model))
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 3
    cfg = checkpoint_cfg(loaded, path)
    assert (dump(cfg), cfg.path) == (CFG.read_text(), str(CFG))
    state = load_model(cfg, path).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if "num_batch" not in key)


def test_a_checkpoint_of_other_classes_fills_the_layers_that_fit(tmp_path: Path) -> None:
    path, cfg = tmp_path / "x.pt", load_cfg(CFG)
    save_checkpoint(path, checkpoint(seeded(CFG, seed=1)))
    cfg.sections[1 + 19].set("filters", 18)
    cfg.sections[1 + 20].set("classes", 4)
    model = Darknet(cfg)
    assert describe(model, load_weights(model, path)) == "0-18, 22-26 of 27"
    with pytest.raises(WeightsError, match=r"fills 0-18, 22-26 of 27 layers of .*, layer 19 is missing"):
        load_model(cfg, path)


class Foreign:
    """What unpickling must never run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("truncated", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("begun", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("empty", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("text", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("pickle", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("pickled module", "is not a readable checkpoint (cut short, or not written by train.py)"),
        ("state", "is not a Darkslim checkpoint (expected the keys 'cfg' and 'model')"),
        ("list", "is not a Darkslim checkpoint (expected the keys 'cfg' and 'model')"),
        ("names", "its class names are no list of texts (damaged?)"),
        ("numbers", "no layer of it fits CFG (was it made with another cfg?)"),
        ("other network", "no layer of it fits CFG (was it made with another cfg?)"),
        ("variance", "holds a negative variance in layer 0 (damaged?)"),
        ("nan", "holds NaN or infinity in layer 19 (a failed training?)"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, path = seeded(CFG), tmp_path / "x.pt"
    whole = checkpoint(seeded(CFG, seed=1))
    broken = whole["model"] | {"blocks.19.conv.bias": torch.full((16,), torch.nan)}
    torch.save(whole, path)
    match content:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "begun":
            path.write_bytes(path.read_bytes()[:5000])
        case "names":
            torch.save(whole | {"names": [1, 2]}, path)
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no weights here\n")
        case "pickle":
            path.write_bytes(pickle.dumps(whole | {"epoch": Foreign()}))
        case "pickled module":
            torch.save(whole | {"epoch": Foreign()}, path)
        case "state":
            torch.save(whole["model"], path)
        case "list":
            torch.save([whole], path)
        case "numbers":
            torch.save(whole | {"model": dict.fromkeys(broken, 1)}, path)
        case "other network":
            torch.save(whole | {"model": {"blocks.0.conv.weight": torch.zeros(3)}}, path)
        case "variance":
            name = "blocks.0.bn.running_var"
            torch.save(whole | {"model": whole["model"] | {name: -whole["model"][name]}}, path)
        case "nan":
            torch.save(whole | {"model": broken}, path)
    assert refusal(model, path) == message.replace("CFG", str(CFG))
    assert not Path("ran").exists()


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    model, link = seeded(CFG), tmp_path / "link.weights"
    link.symlink_to(tmp_path / "real.weights")
    save_weights(model, link)
    assert link.is_symlink()
    assert (tmp_path / "real.weights").stat().st_size > 1000
    with pytest.raises(WeightsError, match=r"^/dev/null: cannot write: it is a device or the like, and no file$"):
        save_weights(model, "/dev/null")


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Let no file grow beyond `free` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".weights", ".pt"])
def test_a_full_disk_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    model, path = seeded(CFG), tmp_path / f"x{suffix}"
    path.write_bytes(b"the old file")
    save = save_weights if suffix == ".weights" else lambda model, path: save_checkpoint(path, checkpoint(model))
    with full_disk(20_000), pytest.raises(WeightsError) as caught:
        save(model, path)
    assert str(caught.value).startswith(f"{path}: cannot write: ")
    assert str(caught.value).endswith("; the file that was there is unharmed")
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_cannot_be_written_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot write"):
        save_weights(seeded(CFG), tmp_path / "file/x.weights")


def test_saving_makes_the_folder(tmp_path: Path) -> None:
    save_weights(seeded(CFG), tmp_path / "a/b/x.weights")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["x.weights"]
