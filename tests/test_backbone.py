"""ImageNet state dicts on composed cfgs: the features of the release, what is refused, and training from them."""

import io
import itertools
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import releases
import torch
import torchvision
from conftest import Outcome
from torch import Tensor, nn

from models import Darknet, load_cfg, load_weights, parse
from models.layer import Layer
from models.weights import save_checkpoint
from utils import backbone, cli, compose

SIDE = 128
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (backbone.MEAN, backbone.STD))
SHUFFLE_OUTPUTS, LARGE_OUTPUTS, SMALL_OUTPUTS = ("stage2", "stage3", "conv5"), (6, 12, 16), (3, 8, 12)


@pytest.fixture
def convert(monkeypatch, capfd, tmp_path) -> Callable[..., Outcome]:
    """Run `python -m utils.backbone` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(cfg: str | Path, source: str | Path, output: str | Path, *flags: str) -> Outcome:
        words = ["backbone", "--cfg", cfg, "--from", source, "-o", output, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capfd.readouterr()
        try:
            cli.run(backbone.main)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return Outcome(status, *capfd.readouterr())

    return call


def make_cfg(path: Path, name: str, *flags: str) -> Path:
    """Compose a detector on a backbone, small in its pictures alone."""
    compose.main(
        ["--backbone", name, "--head", "yolov3", "--classes", "4", "--img-size", str(SIDE), "-o", str(path), *flags]
    )
    return path


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give it statistics unlike those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.01, 1.5),
            ):
                tensor.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            module.weight.data.normal_(0, fan**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def picture(side: int = SIDE) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def features_of_cfg(model: Darknet, x: Tensor) -> list[Tensor]:
    """Run it and give the maps that the composed cfg marks as C3, C4 and C5."""
    text = [line for section in model.cfg.sections for line in section.lines]
    places = [int(match[1]) for line in text if (match := re.match(r"# C[345]: \d+x\d+, layer (\d+)", line))]
    lines = [section.line for section in model.expanded.sections[1:]]
    ends = [len(lines) - 1 - lines[::-1].index(model.cfg.sections[1 + place].line) for place in places]
    outputs = {}
    for end in ends:
        model.blocks[end].register_forward_hook(lambda module, x, y, end=end: outputs.update({end: y}))
    with torch.inference_mode():
        model.eval()(x)
    assert len(ends) == 3
    return [outputs[end] for end in ends]


def features_of(model: nn.Module, names: tuple[str | int, ...], x: Tensor) -> list[Tensor]:
    """Run a release and give C3, C4 and the last convolution."""
    with torch.inference_mode():
        if not names:
            return model.features(x)
        outputs, parts = {}, dict((model if isinstance(names[0], str) else model.features).named_children())
        for name, part in parts.items():
            x = outputs[name] = part(x)
            if name == str(names[-1]):
                break
    return [outputs[str(name)] for name in names]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Give the largest difference, relative to the largest value of its map."""
    assert len(ours) == len(theirs) == 3
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


RELEASES = {
    "shufflenetv2-1x-imagenet": (torchvision.models.shufflenet_v2_x1_0, SHUFFLE_OUTPUTS),
    "shufflenetv2-1.5x-imagenet": (torchvision.models.shufflenet_v2_x1_5, SHUFFLE_OUTPUTS),
    "shufflenetv2-0.5x-imagenet": (torchvision.models.shufflenet_v2_x0_5, SHUFFLE_OUTPUTS),
    "mobilenetv3-large": (torchvision.models.mobilenet_v3_large, LARGE_OUTPUTS),
    "mobilenetv3-small": (torchvision.models.mobilenet_v3_small, SMALL_OUTPUTS),
    "ghostnet-imagenet": (releases.GhostNet, ()),
    "vovnet39": (releases.VoVNet39, ()),
}


@pytest.mark.parametrize("name", RELEASES)
def test_features_are_those_of_the_release(name: str, convert, tmp_path: Path) -> None:
    make, outputs = RELEASES[name]
    release, cfg = randomised(make()), make_cfg(tmp_path / "x.cfg", name)
    torch.save(release.state_dict(), "release.pth")
    outcome = convert(cfg, "release.pth", "x.weights", "--no-normalize")
    assert outcome.status == 0, outcome.err
    model = Darknet(load_cfg(cfg))
    filled = load_weights(model, "x.weights")
    assert f"release.pth fills layers 0-{filled[-1]} of {len(model.layers)} of {cfg}" in outcome.out
    assert difference(features_of_cfg(model, picture()), features_of(release, outputs, picture())) < 1e-5


def test_levels_of_maps_ask_for_no_weights(convert, tmp_path: Path) -> None:
    release = randomised(releases.GhostNet())
    torch.save(release.state_dict(), "release.pth")
    filled = []
    for name, flags in {"float": (), "quantised": ("--quantize", "8")}.items():
        cfg = make_cfg(tmp_path / f"{name}.cfg", "ghostnet-imagenet", *flags)
        outcome = convert(cfg, "release.pth", f"{name}.pt")
        assert outcome.status == 0, outcome.err
        filled.append(load_weights(Darknet(load_cfg(cfg)), f"{name}.pt"))
    assert filled[0] == filled[1]


def padded_before(conv: nn.Conv2d, features: Callable[[Tensor], list[Tensor]], x: Tensor) -> list[Tensor]:
    """Run a release on a normalised picture whose padding is black too, as our networks pad."""
    (padding,) = set(conv.padding)
    conv.padding = (0, 0)
    try:
        return features((nn.functional.pad(x, [padding] * 4) - MEAN) / STD)
    finally:
        conv.padding = (padding, padding)


@pytest.mark.parametrize(
    ("name", "stem"), [("shufflenetv2-1x-imagenet", "conv1.0"), ("mobilenetv3-small", "features.0.0")]
)
def test_normalisation_is_folded_into_the_first_layer(name: str, stem: str, convert, tmp_path: Path) -> None:
    make, outputs = RELEASES[name]
    release, cfg = randomised(make()), make_cfg(tmp_path / "x.cfg", name)
    torch.save(release.state_dict(), "release.pth")
    assert convert(cfg, "release.pth", "x.weights").status == 0
    model = Darknet(load_cfg(cfg))
    load_weights(model, "x.weights")

    def features(x: Tensor) -> list[Tensor]:
        return features_of(release, outputs, x)

    assert (
        difference(features_of_cfg(model, picture()), padded_before(release.get_submodule(stem), features, picture()))
        < 1e-5
    )

    ours, theirs = model.blocks[0](picture()), release.get_submodule(stem.rpartition(".")[0])((picture() - MEAN) / STD)
    assert (ours - theirs)[..., 1:, 1:].abs().max() < 1e-5 * theirs.abs().max()  # only the first row and column
    assert (ours - theirs)[..., 0, :].abs().max() > 1e-2 * theirs.abs().max()  # see the padding


def shuffle_first_cfg() -> str:
    """Write releases.ShuffleFirst in sections: channel_shuffle by half of the channels puts the even ones first."""

    def conv(filters: int, *, size: int = 1, stride: int = 1, groups: int = 1, activation: str = "relu") -> str:
        shape = f"filters={filters}\nsize={size}\nstride={stride}\npad=1\ngroups={groups}\nactivation={activation}"
        return f"[convolutional]\nbatch_normalize=1\n{shape}\n"

    parts = [f"[net]\nwidth={SIDE}\nheight={SIDE}\n", conv(24, size=3, stride=2), "[maxpool]\nsize=3\nstride=2\n"]
    channels = 24
    for stage, (filters, units) in enumerate(((48, 4), (96, 8), (192, 4)), 3):
        half = filters // 2
        parts += [conv(half), conv(half, size=3, stride=2, groups=half, activation="linear"), conv(filters - channels)]
        parts += ["[route]\nlayers=-4\n", conv(channels, size=3, stride=2, groups=channels, activation="linear")]
        parts += [conv(channels), "[route]\nlayers=-1,-4\n"]
        for _ in range(units - 1):
            parts += [f"[channel_shuffle]\ngroups={half}\n", "[route]\nlayers=-1\ngroups=2\ngroup_id=0\n"]
            parts += ["[route]\nlayers=-2\ngroups=2\ngroup_id=1\n", conv(half)]
            parts += [conv(half, size=3, groups=half, activation="linear"), conv(half), "[route]\nlayers=-5,-1\n"]
        parts[-1] = f"# C{stage}: {SIDE >> stage}x{SIDE >> stage}, layer {len(parts) - 2}\n{parts[-1]}"
        channels = filters
    head = "[convolutional]\nfilters=18\n\n[yolo]\nmask=0,1,2\nanchors=4,5, 6,7, 8,9\nnum=3\nclasses=1\n"
    return "\n".join([*parts, head])


def test_a_real_backbone(convert, shared_data: Path, tmp_path: Path) -> None:
    (source,) = shared_data.glob("backbones/**/backbone.pth")
    release = releases.ShuffleFirst()
    release.load_state_dict(torch.load(source, map_location="cpu", weights_only=True))
    (tmp_path / "x.cfg").write_text(shuffle_first_cfg())
    outcome = convert("x.cfg", source, "x.weights", "--no-normalize")
    assert outcome.status == 0, outcome.err
    model = Darknet(load_cfg("x.cfg"))
    load_weights(model, "x.weights")
    assert difference(features_of_cfg(model, picture()), features_of(release.eval(), (), picture())) < 1e-5

    # torchvision's 0.5x has the same shapes in another order, and shuffles other channels
    outcome = convert(make_cfg(tmp_path / "y.cfg", "shufflenetv2-0.5x-imagenet"), source, "y.weights")
    assert outcome.status == 2
    assert (
        f"{source}: stage2.0.branch_main.0.weight (24, 24, 1, 1) with batch normalisation does not fit" in outcome.err
    )
    assert "takes (24, 1, 3, 3) with batch normalisation" in outcome.err
    assert not (tmp_path / "y.weights").exists()


TINY = """[net]
width=64
height=64

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=relu

[{gate}]

[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=relu

[maxpool]
size=2
stride=2

[convolutional]
filters=18
size=1
activation=linear

[yolo]
mask=0,1,2
anchors=4,5, 6,7, 8,9
num=3
classes=1
"""


class Tiny(nn.Module):
    """A classifier of two convolutions."""

    def __init__(self, *, widths: tuple[int, int] = (8, 16), has_bias: bool = False) -> None:
        super().__init__()
        first, second = widths
        self.one, self.bn1 = nn.Conv2d(3, first, 3, 2, 1, bias=has_bias), nn.BatchNorm2d(first)
        self.two, self.bn2 = nn.Conv2d(first, second, 3, 2, 1, bias=has_bias), nn.BatchNorm2d(second)
        self.fc = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.two(torch.relu(self.bn1(self.one(x))))).relu()


def write_tiny(path: Path, gate: str = "empty") -> Path:
    path.write_text(TINY.format(gate=gate))
    return path


def last_map(model: Darknet, x: Tensor) -> Tensor:
    """Give the output of the convolution before the pooling."""
    place = next(i for i, layer in enumerate(model.layers) if layer.channels == 16)
    found = []
    model.blocks[place].register_forward_hook(lambda module, x, y: found.append(y))
    with torch.inference_mode():
        model.eval()(x)
    return found[0]


@pytest.mark.parametrize("kind", ["bare", "nested", "parallel", "old format", "half", "bias"])
def test_state_dicts_as_they_come(kind: str, convert, tmp_path: Path) -> None:
    release = randomised(Tiny(has_bias=kind == "bias"))
    state = release.state_dict()
    if kind == "half":
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        release.load_state_dict(state)
    if kind == "parallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if kind in ("nested", "parallel"):
        state = {"epoch": 3, "best": torch.tensor([0.7]), "model": {"state_dict": state}}
    torch.save(state, "x.pth", _use_new_zipfile_serialization=kind != "old format")
    outcome = convert(write_tiny(tmp_path / "x.cfg"), "x.pth", "x.weights", "--no-normalize")
    assert outcome.status == 0, outcome.err
    assert "x.pth fills layers 0-3 of 6 of " in outcome.out
    prefix = "module." if kind == "parallel" else ""
    assert f"set aside, as its classifier: {prefix}fc.weight (10, 16)" in outcome.out
    model = Darknet(load_cfg("x.cfg"))
    assert load_weights(model, "x.weights") == [0, 1, 2, 3]
    with torch.inference_mode():
        torch.testing.assert_close(last_map(model, picture(64)), release(picture(64)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["eca", "se", "ca", "sa", "cbam"])
def test_a_gate_of_ours_starts_fresh(gate: str, convert, tmp_path: Path) -> None:
    torch.save(randomised(Tiny()).state_dict(), "x.pth")
    cfg = write_tiny(tmp_path / "x.cfg", gate)
    outcome = convert(cfg, "x.pth", "x.weights")
    assert outcome.status == 2
    assert re.fullmatch(
        r"x\.weights: a \.weights file has no gaps, but the state dict lacks "
        rf"(layer \d \(\[{gate}\] at line 13\)(, )?)+"
        r" \(write a \.pt\)\n",
        outcome.err,
    )
    assert not Path("x.weights").exists()
    outcome = convert(cfg, "x.pth", "x.pt")
    assert outcome.status == 0, outcome.err
    model = Darknet(load_cfg(cfg))
    gates = [
        i for i, section in enumerate(model.expanded.sections[1:]) if section.line == 13 and model.layers[i].tensors
    ]
    assert all(f"layer {index} ([{gate}] at line 13)" in outcome.out for index in gates)
    filled = load_weights(model, "x.pt")
    assert gates
    assert not {*gates} & {*filled}
    assert [i for i in filled if model.layers[i].tensors] == [0, len(model.layers) - 4]


@pytest.mark.parametrize("attention", ["se", "cbam", "eca"])
@pytest.mark.parametrize("name", ["shufflenetv2-1x-imagenet", "mobilenetv3-small"])
def test_composed_attention_starts_fresh(name: str, attention: str, convert, tmp_path: Path) -> None:
    release = RELEASES[name][0]()
    torch.save(release.state_dict(), "x.pth")
    outcome = convert(make_cfg(tmp_path / "x.cfg", name, "--attention", attention), "x.pth", "x.pt")
    assert outcome.status == 0, outcome.err
    (fresh,) = [line for line in outcome.out.splitlines() if line.startswith("not in it, these start fresh: ")]
    assert len({*re.findall(rf"\[{attention}\] at line \d+", fresh)}) == 2
    model = Darknet(load_cfg(tmp_path / "x.cfg"))
    counted = sum(
        model.layers[i].module.bn.num_features for i in load_weights(model, "x.pt") if has_bn(model.layers[i])
    )
    assert counted == sum(part.num_features for part in release.modules() if isinstance(part, nn.BatchNorm2d))


def has_bn(layer: Layer) -> bool:
    return "bn.weight" in layer.tensors


def mixed_up() -> dict[str, Tensor]:
    names = ("two", "bn2", "one", "bn1", "fc")
    return {name: tensor for part in names for name, tensor in Tiny().state_dict().items() if name.startswith(part)}


def tiny_with(name: str, value: float) -> dict[str, Tensor]:
    state = Tiny().state_dict()
    state[name].view(-1)[1] = value
    return state


def endless() -> dict[str, object]:
    nested = {"epoch": 1}
    nested["model"] = nested
    return nested


def cut_off(size: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(Tiny().state_dict(), buffer)
    return buffer.getvalue()[:size]


BN = " with batch normalisation"
ADVICE = "(give the cfg of the same network and width: utils.compose has backbones as released, …-imagenet)"
THIRD = f"x.cfg:15: layer 2, [convolutional], takes (16, 8, 3, 3){BN}"
REFUSED = {
    "missing": (None, "cannot read the state dict: No such file or directory"),
    "empty": (b"", "is not a readable state dict (empty, cut short or damaged: get it again)"),
    "text": (b"not a state dict\n", "is not a readable state dict (empty, "),
    "cut short": (cut_off(3000), "is not a readable state dict (empty, "),
    "module": (Tiny(), "holds Python objects (a whole module?): save its state_dict()"),
    "number": (3, "holds no tensors by name (expected a state dict, alone or under 'state_dict')"),
    "endless": (endless(), "holds no tensors by name"),
    "sparse": ({"one.weight": torch.eye(3).to_sparse()}, "holds no tensors by name"),
    "no tensors": ({"state_dict": {}}, "holds no tensors by name"),
    "ours": ({"cfg": "[net]\n", "model": {}}, "is a Darkslim checkpoint (give it to train.py --weights as it is)"),
    "nan": (tiny_with("two.weight", float("nan")), "two.weight or what normalises it holds NaN or infinity"),
    "infinite": (tiny_with("bn2.running_var", float("inf")), "two.weight or what normalises it holds NaN"),
    "variance": (
        tiny_with("bn1.running_var", -1),
        "the variance behind one.weight is negative (a damaged file?)",
    ),
    "width": (
        Tiny(widths=(8, 24)).state_dict(),
        f"two.weight (24, 8, 3, 3){BN} does not fit {THIRD} {ADVICE}",
    ),
    "order": (
        mixed_up(),
        f"two.weight (16, 8, 3, 3){BN} does not fit x.cfg:5: layer 0, [convolutional], takes",
    ),
    "no statistics": (
        {name: tensor for name, tensor in Tiny().state_dict().items() if "bn2" not in name},
        f"two.weight (16, 8, 3, 3) does not fit {THIRD}",
    ),
    "statistics": (
        {name: tensor[:, None] if "bn2.r" in name else tensor for name, tensor in Tiny().state_dict().items()},
        f"two.weight (16, 8, 3, 3) does not fit {THIRD}",
    ),
    "other": (torchvision.models.squeezenet1_1().state_dict(), "features.0.weight (64, 3, 3, 3) does not fit x.cfg:5:"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, convert, tmp_path: Path) -> None:
    content, complaint = REFUSED[case]
    write_tiny(tmp_path / "x.cfg")
    if isinstance(content, bytes):
        Path("x.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "x.pth")
    before = sorted(tmp_path.iterdir())
    outcome = convert("x.cfg", "x.pth", "y.weights")
    assert outcome.status == 2
    assert outcome.err.startswith(f"x.pth: {complaint}"), outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_pickle_runs_no_code(convert, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    write_tiny(tmp_path / "x.cfg")
    for save in (torch.save, lambda harm, path: Path(path).write_bytes(pickle.dumps(harm))):
        save({"state_dict": Harm()}, "x.pth")
        assert convert("x.cfg", "x.pth", "y.weights").status == 2
        assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "other", "theirs", "wish"),
    [
        (
            "shufflenetv2-1x-imagenet",
            "shufflenet_v2_x1_5",
            "stage2.0.branch1.2.weight (88, 24, 1, 1)",
            "(58, 24, 1, 1)",
        ),
        ("shufflenetv2-1x-imagenet", "mobilenet_v3_small", "features.0.0.weight (16, 3, 3, 3)", "(24, 3, 3, 3)"),
        ("mobilenetv3-small", "mobilenet_v3_large", "features.1.block.1.0.weight (16, 16, 1, 1)", "(8, 16, 1, 1)"),
    ],
)
def test_other_networks_are_refused(name: str, other: str, theirs: str, wish: str, convert, tmp_path: Path) -> None:
    torch.save(getattr(torchvision.models, other)().state_dict(), "x.pth")
    outcome = convert(make_cfg(tmp_path / "x.cfg", name), "x.pth", "y.pt")
    assert outcome.status == 2
    assert re.match(
        rf"x\.pth: {re.escape(theirs)}[ a-z]* does not fit {tmp_path}/x\.cfg:\d+: layer \d+, \[", outcome.err
    )
    assert f"takes {wish}" in outcome.err
    assert not Path("y.pt").exists()


def test_a_state_dict_that_ends_inside_a_macro_is_refused(convert, tmp_path: Path) -> None:
    state = torchvision.models.shufflenet_v2_x1_0().state_dict()
    part = dict(itertools.takewhile(lambda item: item[0] != "stage2.3.branch2.3.weight", state.items()))
    torch.save(part, "x.pth")
    outcome = convert(make_cfg(tmp_path / "x.cfg", "shufflenetv2-1x-imagenet"), "x.pth", "y.pt")
    assert outcome.status == 2
    assert outcome.err.startswith(f"x.pth: ends with stage2.3.branch2.0.weight (58, 58, 1, 1){BN}, which does not fit ")
    assert "[shuffle_stage]" in outcome.err


def test_the_constant_of_batch_normalisation(convert, tmp_path: Path) -> None:
    cfg = write_tiny(tmp_path / "x.cfg")
    release = randomised(Tiny())
    torch.save(release.state_dict(), "x.pth")
    for flags, eps, why in (((), 1e-5, "PyTorch's default"), (("--bn-eps", "0.1"), 0.1, "--bn-eps")):
        outcome = convert(cfg, "x.pth", "x.weights", "--no-normalize", *flags)
        assert f"its batch normalisation adds {eps:g} to the variance ({why}; --bn-eps sets it)" in outcome.out
        for bn in (release.bn1, release.bn2):
            bn.eps = eps
        model = Darknet(load_cfg(cfg))
        load_weights(model, "x.weights")
        with torch.inference_mode():
            torch.testing.assert_close(last_map(model, picture(64)), release(picture(64)), rtol=1e-5, atol=1e-5)


def test_flags_are_checked(convert, tmp_path: Path) -> None:
    cfg = write_tiny(tmp_path / "x.cfg")
    torch.save(Tiny().state_dict(), "x.pth")
    outcome = convert(cfg, "x.pth", "x.onnx")
    assert outcome.status == 2
    assert "-o/--output: expected a name that ends in .weights or .pt, gets 'x.onnx'" in outcome.err
    Path("x.pth").rename("x.pt")
    outcome = convert(cfg, "x.pt", tmp_path / "x.pt")
    assert outcome.status == 2
    assert "-o/--output: expected another file than --from" in outcome.err
    cfg.write_text(cfg.read_text().replace("width", "channels=1\nwidth"))
    grey = Tiny().state_dict()
    grey["one.weight"] = grey["one.weight"][:, :1]
    torch.save(grey, "x.pth")
    outcome = convert(cfg, "x.pth", "x.pt")
    assert outcome.status == 2
    assert "x.cfg: its first convolution reads no RGB picture" in outcome.err
    assert convert(cfg, "x.pth", "x.pt", "--no-normalize").status == 0
    assert convert(cfg, "x.pth", "x.pt", "--no-normalize").out.endswith("overwrote x.pt\n")


def test_what_dontload_leaves_out_needs_a_checkpoint(convert, tmp_path: Path) -> None:
    cfg = write_tiny(tmp_path / "x.cfg")
    cfg.write_text(cfg.read_text().replace("size=3", "size=3\ndontload=1", 1))
    torch.save(Tiny().state_dict(), "x.pth")
    outcome = convert(cfg, "x.pth", "x.weights")
    assert outcome.status == 2
    assert outcome.err.startswith("x.weights: a .weights file leaves out what dontload and dontloadscales say")
    assert convert(cfg, "x.pth", "x.pt").status == 0
    assert load_weights(Darknet(load_cfg(cfg)), "x.pt") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("gate", "output", "layers"), [("empty", "x.weights", "0-3 of 6"), ("eca", "x.pt", "0, 2-3 of 6")]
)
def test_training_starts_from_it(gate, output, layers, convert, command, scenes, tmp_path: Path) -> None:
    cfg = write_tiny(tmp_path / "x.cfg", gate)
    text = cfg.read_text().replace("filters=18", "filters=27").replace("classes=1", "classes=4")
    cfg.write_text(text)
    torch.save(randomised(Tiny()).state_dict(), "x.pth")
    outcome = convert(cfg, "x.pth", output)
    assert f"x.pth fills layers {layers} of {cfg}" in outcome.out
    flags = ("--cfg", cfg, "--data", scenes, "--weights", output, "--epochs", 1, "--batch-size", 4, "--workers", 0)
    outcome = command("train", *flags, "--device", "cpu", "--precision", "fp32", "--notest", "--nosave")
    assert outcome.status == 0, outcome.err
    assert f"{output} fills layers {layers}, the others start fresh" in outcome.out


def test_a_partial_checkpoint_is_no_whole_one(tmp_path: Path, convert, command) -> None:
    cfg = write_tiny(tmp_path / "x.cfg")
    torch.save(Tiny().state_dict(), "x.pth")
    convert(cfg, "x.pth", "x.pt")
    outcome = command("detect", "--weights", "x.pt")
    assert outcome.status == 2
    assert "x.pt: is partial: it fills 0-3 of 6 layers" in outcome.err


def test_a_finished_checkpoint_fills_what_has_no_parameters(tmp_path: Path) -> None:
    model = Darknet(parse(TINY.format(gate="empty")))
    save_checkpoint(tmp_path / "x.pt", {"cfg": TINY, "model": model.state_dict()})
    assert load_weights(model, tmp_path / "x.pt") == list(range(6))
