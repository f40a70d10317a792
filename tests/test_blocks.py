"""The macros of models/blocks.py: what they expand to, their parameters, and the networks they come from."""

from pathlib import Path

import pytest
import torch
from networks import ROOT, random
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, shufflenet_v2_x1_0

from models import Darknet, dump, load_cfg, load_model, parse, save_weights
from models.darknet import count_parameters
from models.layer import BN_EPS
from models.macros import MACROS

NET = "[net]\nheight=32\nwidth=64\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=8,8\nclasses=1\n"


def describe(model: Darknet) -> list[str]:
    """Write every layer on a line: section, filters, kernel/stride, what is not usual, inputs but for the last one."""
    lines = []
    for index, (section, layer) in enumerate(zip(model.expanded.sections[1:], model.layers, strict=True)):
        values = {key: option.value for key, option in section.options.items()}
        words = [section.name.replace("convolutional", "conv")]
        if "filters" in values:
            words += [values["filters"], f"{values.get('size', 1)}/{values.get('stride', 1)}", values["activation"]]
            words += [] if "batch_normalize" in values else ["bias"]
        words += [
            f"{key}={values[key]}" for key in ("groups", "group_id", "w_bits", "a_bits", "a_range") if key in values
        ]
        words += ["of " + ",".join(map(str, layer.inputs))] if layer.inputs != (index - 1,) else []
        lines.append(" ".join(words))
    return lines


def build(*macros: str, channels: int = 16) -> Darknet:
    """Build macros above a layer 0 of so many channels, and a head."""
    return Darknet(parse(f"{NET}channels={channels}\n[empty]\n" + "\n".join(macros) + f"\n{HEAD}"))


# What a macro stands for above layer 0 of 16 channels, written by hand from the papers and the official cfgs.
EXPANSIONS = {
    "[se]\nhidden=3\nreduction=2": """
        avgpool
        conv 3 1/1 relu bias
        conv 16 1/1 logistic bias
        scale_channels of 3,0""",
    "[se]\nreduction=5\nactivation=hard_sigmoid": """
        avgpool
        conv 3 1/1 relu bias
        conv 16 1/1 hard_sigmoid bias
        scale_channels of 3,0""",
    "[cbam]": """
        ca
        sa""",
    "[residual]\nrepeat=2": """
        conv 8 1/1 leaky
        conv 16 3/1 leaky
        shortcut of 2,0
        conv 8 1/1 leaky
        conv 16 3/1 leaky
        shortcut of 5,3""",
    "[csp]\nfilters=12\ninner=4\nrepeat=2": """
        conv 6 1/1 mish
        route of 0
        conv 6 1/1 mish
        conv 4 1/1 mish
        conv 6 3/1 mish
        shortcut of 5,3
        conv 4 1/1 mish
        conv 6 3/1 mish
        shortcut of 8,6
        conv 6 1/1 mish
        route of 10,1
        conv 12 1/1 mish""",
    "[csp_tiny]\nfilters=12": """
        conv 12 3/1 leaky
        route groups=2 group_id=1
        conv 6 3/1 leaky
        conv 6 3/1 leaky
        route of 4,3
        conv 12 1/1 leaky
        route of 1,6""",
    "[csp_tiny]\nfilters=12\njoin=0": """
        conv 12 3/1 leaky
        route groups=2 group_id=1
        conv 6 3/1 leaky
        conv 6 3/1 leaky
        route of 4,3
        conv 12 1/1 leaky""",
    "[elan]\nfilters=12\nhidden=5\nsize=5": """
        conv 5 1/1 swish
        route of 0
        conv 5 1/1 swish
        conv 5 5/1 swish
        conv 5 5/1 swish
        route of 1,3,4,5
        conv 12 1/1 swish""",
    "[inverted_residual]\nhidden=32\nfilters=16\nse=8\nsize=5": """
        conv 32 1/1 relu6
        conv 32 5/1 relu6 groups=32
        avgpool
        conv 8 1/1 relu bias
        conv 32 1/1 hard_sigmoid bias
        scale_channels of 5,2
        conv 16 1/1 linear
        shortcut of 7,0""",
    "[inverted_residual]\nhidden=16\nfilters=16\nstride=2\nactivation=hard_swish": """
        conv 16 3/2 hard_swish groups=16
        conv 16 1/1 linear""",
    "[inverted_residual]\nhidden=20\nfilters=24": """
        conv 20 1/1 relu6
        conv 20 3/1 relu6 groups=20
        conv 24 1/1 linear""",
    "[ghost_bottleneck]\nhidden=20\nfilters=16\nsize=5": """
        conv 10 1/1 relu
        conv 10 3/1 relu groups=10
        route of 1,2
        conv 8 1/1 linear
        conv 8 3/1 linear groups=8
        route of 4,5
        shortcut of 6,0""",
    "[ghost_bottleneck]\nhidden=20\nfilters=16\nsize=5\nstride=2\nse=5": """
        conv 10 1/1 relu
        conv 10 3/1 relu groups=10
        route of 1,2
        conv 20 5/2 linear groups=20
        avgpool
        conv 5 1/1 relu bias
        conv 20 1/1 logistic bias
        scale_channels of 7,4
        conv 8 1/1 linear
        conv 8 3/1 linear groups=8
        route of 9,10
        route of 0
        conv 16 5/2 linear groups=16
        conv 16 1/1 linear
        shortcut of 14,11""",
    "[ghost_bottleneck]\nhidden=2\nfilters=6": """
        conv 1 1/1 relu
        conv 1 3/1 relu
        route of 1,2
        conv 3 1/1 linear
        conv 3 3/1 linear groups=3
        route of 4,5
        route of 0
        conv 16 3/1 linear groups=16
        conv 6 1/1 linear
        shortcut of 9,6""",
    "[osa]\nfilters=24\nhidden=8\nconvs=3": """
        conv 8 3/1 relu
        conv 8 3/1 relu
        conv 8 3/1 relu
        route of 0,1,2,3
        conv 24 1/1 relu""",
    "[osa]\nfilters=16\nhidden=8\nconvs=1\nese=1\nresidual=1": """
        conv 8 3/1 relu
        route of 0,1
        conv 16 1/1 relu
        avgpool
        conv 16 1/1 hard_sigmoid bias
        scale_channels of 5,3
        shortcut of 6,0""",
    "[shuffle_stage]\nfilters=20\nunits=2": """
        conv 16 3/2 linear groups=16
        conv 10 1/1 relu
        route of 0
        conv 10 1/1 relu
        conv 10 3/2 linear groups=10
        conv 10 1/1 relu
        route of 2,6
        channel_shuffle groups=2
        route groups=2 group_id=0
        route groups=2 group_id=1 of 8
        conv 10 1/1 relu
        conv 10 3/1 linear groups=10
        conv 10 1/1 relu
        route of 9,13
        channel_shuffle groups=2""",
}


@pytest.mark.parametrize("macro", EXPANSIONS)
def test_expansion(macro: str) -> None:
    assert describe(build(macro))[1:-2] == [line.strip() for line in EXPANSIONS[macro].splitlines()[1:]]


def test_every_macro_is_compared() -> None:
    assert MACROS.keys() - {"stage2", "stage3", "stage4"} == {macro[1:].partition("]")[0] for macro in EXPANSIONS}


@pytest.mark.parametrize(("name", "units"), [("stage2", 4), ("stage3", 8), ("stage4", 4)])
def test_stages_are_shuffle_stages(name: str, units: int) -> None:
    stage = build(f"[{name}]\nout_channels=20\nactivation=leaky\nw_bits=4")
    assert describe(stage) == describe(build(f"[shuffle_stage]\nfilters=20\nunits={units}\nactivation=leaky\nw_bits=4"))


@pytest.mark.parametrize("macro", EXPANSIONS)
def test_the_written_expansion_with_its_weights_is_the_same_network(macro: str, tmp_path: Path) -> None:
    model, x = build(macro).eval(), random(1, 16, 32, 64)
    shake(model)
    save_weights(model, tmp_path / "a.weights")
    plain = load_model(parse(dump(model.expanded)), tmp_path / "a.weights")
    assert plain.expanded is plain.cfg
    with torch.inference_mode():
        assert torch.equal(plain(x)[0], model(x)[0])
        torch.testing.assert_close(model.fuse()(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("macro", [macro for macro in EXPANSIONS if not macro.startswith(("[se]", "[cbam]"))])
def test_quantised_blocks(macro: str) -> None:
    """Convolutions with batch normalisation are quantised, those of a gate are not."""
    plain = describe(build(macro))[1:-2]
    for keys, bits in (
        ("w_bits=4\na_range=6", "w_bits=4 a_bits=8 a_range=6.0"),
        ("a_bits=3", "w_bits=8 a_bits=3 a_range=10"),
        ("a_range=0.5", "w_bits=8 a_bits=8 a_range=0.5"),
    ):
        quantised = [
            f"quan_{line} {bits}" if line.startswith("conv") and "bias" not in line else line for line in plain
        ]
        assert describe(build(f"{macro}\n{keys}"))[1:-2] == quantised


def cbn(channels: int, filters: int, size: int = 1) -> int:
    """Count the parameters of a convolution with batch normalisation; a depthwise one has 1 channel."""
    return channels * filters * size**2 + 2 * filters


@pytest.mark.parametrize(
    ("macro", "parameters"),
    [
        ("[se]", 16 * 1 + 1 + 1 * 16 + 16),
        ("[se]\nhidden=3", 16 * 3 + 3 + 3 * 16 + 16),
        ("[cbam]\nratio=4\nkernel_size=3", 2 * 16 * 4 + 2 * 9),
        ("[residual]\nrepeat=2", 2 * (cbn(16, 8) + cbn(8, 16, 3))),
        ("[residual]\nhidden=5", cbn(16, 5) + cbn(5, 16, 3)),
        ("[csp]\nfilters=12\nrepeat=3", 2 * cbn(16, 6) + 3 * (cbn(6, 6) + cbn(6, 6, 3)) + cbn(6, 6) + cbn(12, 12)),
        ("[csp_tiny]\nfilters=12", cbn(16, 12, 3) + 2 * cbn(6, 6, 3) + cbn(12, 12)),
        ("[elan]\nfilters=12", 2 * cbn(16, 6) + 2 * cbn(6, 6, 3) + cbn(24, 12)),
        (
            "[inverted_residual]\nhidden=32\nfilters=24\nse=8",
            cbn(16, 32) + cbn(1, 32, 3) + 32 * 8 + 8 + 8 * 32 + 32 + cbn(32, 24),
        ),
        (
            "[ghost_bottleneck]\nhidden=20\nfilters=24\nsize=5\nstride=2\nse=5",
            cbn(16, 10) + cbn(1, 10, 3) + cbn(1, 20, 5) + 20 * 5 + 5 + 5 * 20 + 20  # one module, its depthwise, SE
            + cbn(20, 12) + cbn(1, 12, 3) + cbn(1, 16, 5) + cbn(16, 24),  # the other, the shortcut
        ),
        ("[osa]\nfilters=24\nhidden=8\nese=1", cbn(16, 8, 3) + 4 * cbn(8, 8, 3) + cbn(56, 24) + 24 * 24 + 24),
        (
            "[shuffle_stage]\nfilters=20\nunits=3",
            cbn(1, 16, 3) + 2 * cbn(16, 10) + 5 * cbn(10, 10) + 3 * cbn(1, 10, 3),
        ),
        (
            "[shuffle_stage]\nfilters=20\nunits=2\nhidden=16",
            2 * cbn(1, 16, 3) + 2 * cbn(16, 10) + cbn(16, 16) + 2 * cbn(10, 10) + cbn(1, 10, 3),
        ),
    ],
)  # fmt: skip
def test_parameters(macro: str, parameters: int) -> None:
    head = 6 * build(macro).layers[-2].module.conv.in_channels + 6
    assert count_parameters(build(macro)) == parameters + head


# (kernel, expansion, output, squeezed, stride) of table 1 of the paper; heads are YOLOv3's for ten classes.
GHOSTNET = (
    (3, 16, 16, 0, 1), (3, 48, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2), (5, 120, 40, 1, 1), (3, 240, 80, 0, 2),
    (3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1), (3, 672, 112, 1, 1),
    (5, 672, 160, 1, 2), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1),
)  # fmt: skip


def conv(filters: int, size: int = 1, stride: int = 1, activation: str = "leaky") -> str:
    return (
        f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\nstride={stride}\npad=1\n"
        f"activation={activation}\n"
    )


def test_ghostnet_with_yolov3_heads_has_its_parameters() -> None:
    backbone = conv(16, 3, 2, "relu") + "".join(
        f"[ghost_bottleneck]\nsize={size}\nhidden={hidden}\nfilters={filters}\nse={se * hidden // 4}\nstride={stride}\n"
        for size, hidden, filters, se, stride in GHOSTNET
    )
    heads = [
        3 * (conv(filters) + conv(2 * filters, 3)) + "[convolutional]\nfilters=45\n[yolo]\nanchors=1,1,2,2,3,3\nnum=3\n"
        + "mask=0,1,2\nclasses=10\n"
        for filters in (512, 256, 128)
    ]  # fmt: skip
    joints = [f"[route]\nlayers=-4\n{conv(C)}[upsample]\n[route]\nlayers=-1,{i}\n" for C, i in ((256, 11), (128, 5))]
    text = f"[net]\n{backbone}{conv(960)}{heads[0]}{joints[0]}{heads[1]}{joints[1]}{heads[2]}"
    with torch.device("meta"):
        assert count_parameters(Darknet(parse(text))) == 23_495_111


def cut(path: Path, layers: int) -> list[str]:
    with torch.device("meta"):
        return describe(Darknet(load_cfg(path)))[:layers]


def test_residual_blocks_are_yolov3s() -> None:
    body = conv(32, 3) + "".join(
        f"{conv(filters, 3, 2)}[residual]\nrepeat={repeat}\n"
        for filters, repeat in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))
    )
    with torch.device("meta"):
        model = Darknet(parse(f"[net]\n{body}{HEAD}"))
    assert describe(model)[:-2] == cut(ROOT / "cfg/yolov3.cfg", 75)


def test_csp_stages_are_yolov4s(shared_data: Path) -> None:
    stages = ((64, 64, 32, 1), (128, 64, 64, 2), (256, 128, 128, 8), (512, 256, 256, 8), (1024, 512, 512, 4))
    body = conv(32, 3, activation="mish") + "".join(
        f"{conv(filters, 3, 2, 'mish')}[csp]\nfilters={filters}\nhidden={hidden}\ninner={inner}\nrepeat={repeat}\n"
        for filters, hidden, inner, repeat in stages
    )
    with torch.device("meta"):
        model = Darknet(parse(f"[net]\n{body}{HEAD}"))
    assert describe(model)[:-2] == cut(shared_data / "darknet/official-cfg/yolov4.cfg", 105)


def test_csp_tiny_stages_are_yolov4_tinys(shared_data: Path) -> None:
    pool = "[maxpool]\nsize=2\nstride=2\n"
    stages = "".join(f"[csp_tiny]\nfilters={filters}\n{pool}" for filters in (64, 128, 256))
    with torch.device("meta"):
        model = Darknet(parse(f"[net]\n{conv(32, 3, 2)}{conv(64, 3, 2)}{stages}{conv(512, 3)}{HEAD}"))
    assert describe(model)[:-2] == cut(shared_data / "darknet/official-cfg/yolov4-tiny.cfg", 27)


def test_elan_is_yolov7_tinys(shared_data: Path) -> None:
    body = "[elan]\nfilters=64\nactivation=leaky\n[maxpool]\nsize=2\nstride=2\n[elan]\nfilters=128\nactivation=leaky\n"
    with torch.device("meta"):
        model = Darknet(parse(f"[net]\n{conv(32, 3, 2)}{conv(64, 3, 2)}{body}{HEAD}"))
    assert describe(model)[:-2] == cut(shared_data / "darknet/official-cfg/yolov7-tiny.cfg", 17)


def shake(model: nn.Module) -> None:
    """Give every batch normalisation random statistics."""
    generator = torch.Generator().manual_seed(0)
    for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (bn.weight.data, bn.running_var, bn.bias.data, bn.running_mean):
            tensor.uniform_(0.5, 1.5, generator=generator)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy convolutions and batch normalisations one after the other.

    Theirs add another eps to the variance; the variance of ours takes up the difference.
    """
    theirs, ours = (
        [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
        for model in (source, target)
    )
    for one, other in zip(theirs, ours, strict=True):
        other.load_state_dict(one.state_dict())
        if isinstance(one, nn.BatchNorm2d):
            other.running_var += one.eps - BN_EPS


def run_blocks(model: Darknet, x: Tensor) -> Tensor:
    """Give what the layers before the head of `build` make of a map."""
    outputs = {-1: x}
    for index, (layer, block) in enumerate(zip(model.layers[:-2], model.blocks[:-2], strict=True)):
        outputs[index] = block(*[outputs[i] for i in layer.inputs])
    return outputs[len(outputs) - 2]


def check_parity(theirs: nn.Module, x: Tensor, *macros: str) -> None:
    """Compare blocks of torchvision with macros that get their weights."""
    shake(theirs.eval())
    ours = build(*macros, channels=x.shape[1]).eval()
    ours.blocks[-2] = nn.Identity()  # the head's convolution has no counterpart
    copy_in_order(theirs, ours)
    with torch.inference_mode():
        expected, found = theirs(x), run_blocks(ours, x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_shufflenet_stages_are_torchvisions() -> None:
    torch.manual_seed(0)
    network, x = shufflenet_v2_x1_0(weights=None), random(2, 24, 32, 64)
    stages = nn.Sequential(network.stage2, network.stage3, network.stage4)
    check_parity(
        stages, x, *(f"[{name}]\nout_channels={C}" for name, C in (("stage2", 116), ("stage3", 232), ("stage4", 464)))
    )
    check_parity(network.stage2, x, "[shuffle_stage]\nfilters=116")


# (kernel, expansion, output, SE's hidden channels, activation, stride) of MobileNetV3-Small, from its table 2
MOBILENET = (
    (3, 16, 16, 8, "relu", 2), (3, 72, 24, 0, "relu", 2), (3, 88, 24, 0, "relu", 1), (5, 96, 40, 24, "hard_swish", 2),
    (5, 240, 40, 64, "hard_swish", 1), (5, 240, 40, 64, "hard_swish", 1), (5, 120, 48, 32, "hard_swish", 1),
    (5, 144, 48, 40, "hard_swish", 1), (5, 288, 96, 72, "hard_swish", 2), (5, 576, 96, 144, "hard_swish", 1),
    (5, 576, 96, 144, "hard_swish", 1),
)  # fmt: skip


def test_inverted_residuals_are_torchvisions() -> None:
    torch.manual_seed(0)
    macros = [
        f"[inverted_residual]\nsize={size}\nhidden={hidden}\nfilters={filters}\nse={se}\nactivation={activation}\n"
        f"stride={stride}"
        for size, hidden, filters, se, activation, stride in MOBILENET
    ]
    check_parity(mobilenet_v3_small(weights=None).features[1:12], random(2, 16, 32, 64), *macros)
