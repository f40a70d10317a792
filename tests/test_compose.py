"""`python -m utils.compose`: the zoo is what it writes, every part goes with every other, and nonsense is refused."""

import logging
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import ROOT, SHIPPED
from torch import nn

from benchmarks.compatibility import expected_bytes
from models import Darknet, load_cfg, parse
from models.quant import QuantConv2d
from utils import compose, lint
from utils.compose_backbones import BACKBONES, divisible
from utils.compose_heads import HEADS
from utils.draft import ATTENTIONS
from utils.log import DataError
from utils.zoo import ZOO

TINY = ("--backbone", "darknet-tiny", "--head", "yolov3-tiny")


def text_of(*words: object) -> str:
    return compose.compose(compose.make_compose_parser().parse_args([str(word) for word in words]))


def built(text: str) -> Darknet:
    with torch.device("meta"):
        return Darknet(parse(text))


def outline(model: Darknet) -> list[tuple]:
    """Give what every layer computes, as far as the cfg says it: equal for networks that are one."""
    rows = []
    for layer, section in zip(model.layers, model.expanded.sections[1:], strict=True):
        keys = "size stride groups group_id activation batch_normalize scale_x_y new_coords".split()
        options = {key: section.options[key].value for key in keys if key in section.options}
        head = layer.head and (layer.head.anchors, layer.head.scale_x_y, layer.head.classes, layer.head.nms_kind)
        rows.append((section.name, layer.inputs, layer.channels, layer.size, options, head))
    return rows


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        status = 0
        try:
            compose.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
        finally:
            logging.getLogger("darkslim").handlers.clear()
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ZOO)
def test_a_shipped_cfg_is_what_its_arguments_make(name: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / f"cfg/{name}.cfg").read_text(encoding="utf-8")
    assert text == compose.compose(compose.zoo_arguments(name)), "python -m utils.compose --all"
    command = next(line for line in text.splitlines() if line.startswith("# python -m utils.compose "))
    words = shlex.split(command.removeprefix("# python -m utils.compose "))
    assert compose.make_compose_parser().parse_args(words) == compose.zoo_arguments(name)


def test_the_zoo_is_shipped_whole() -> None:
    written_out = {"demo", "yolov3", "yolov3-hand", "yolov3-spp", "yolov3-tiny", "yolov3-tiny-hand"}
    assert {path.stem for path in SHIPPED} == ZOO.keys() | written_out


@pytest.mark.parametrize(
    ("words", "cfg"),
    [
        ("--backbone darknet53 --head yolov3 --classes 80", "yolov3"),
        ("--backbone darknet53 --head yolov3 --classes 1", "yolov3-hand"),
        ("--backbone darknet-tiny --head yolov3-tiny --classes 80", "yolov3-tiny"),
        ("--backbone darknet-tiny --head yolov3-tiny --classes 1 --anchors oxfordhand", "yolov3-tiny-hand"),
    ],
)
def test_composed_networks_are_those_written_out(words: str, cfg: str) -> None:
    assert outline(built(text_of(*words.split()))) == outline(built((ROOT / f"cfg/{cfg}.cfg").read_text()))


@pytest.mark.parametrize("cfg", ["yolov4", "yolov4-tiny"])
def test_yolov4_is_the_official_one(cfg: str, shared_data: Path) -> None:
    official = shared_data / f"darknet/official-cfg/{cfg}.cfg"
    ours = built((ROOT / f"cfg/{cfg}.cfg").read_text())
    assert outline(ours) == outline(built(official.read_text()))
    assert ours.size == built(official.read_text()).size
    assert lint.weights_bytes(ours) == expected_bytes()[official.stem]


def variants(backbone: str, head: str) -> list[tuple]:
    """Give words for every attention, each with another width, plain and quantised."""
    words = ("--backbone", backbone, "--head", head, "--classes", 3, "--img-size", 96)
    pairs = [
        (*words, "--attention", attention, "--width", width)
        for attention, width in zip(ATTENTIONS, (0.25, 1.3, 0.05, 0.5), strict=True)
    ]
    return pairs + [(*pair, "--quantize", 4) for pair in pairs]


def check_build(words: tuple) -> None:
    model = built(text_of(*words))
    sides = sorted(96 // int(spec.stride[0]) for spec in model.heads)
    assert (sides, model.stride) == ([3, 6, 12][: len(sides)], 32)
    assert len(sides) == len(HEADS[words[3]].masks)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_goes_with_heads_attentions_and_widths(backbone: str) -> None:
    place = list(BACKBONES).index(backbone)
    for step, head in enumerate(HEADS):
        if (place + step) % 2:
            check_build(variants(backbone, head)[(2 * place + step) % 8])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_goes_with_every_head_attention_and_width(backbone: str) -> None:
    for words in (words for head in HEADS for words in variants(backbone, head)):
        check_build(words)


@pytest.mark.parametrize("attention", ["se", "cbam", "eca"])
@pytest.mark.parametrize(
    ("backbone", "head", "levels"),
    [
        ("darknet53", "yolov3", "C3 C4 C5"),
        ("ghostnet", "yolov3-tiny", "C4 C5"),
        ("cspdarknet53-tiny", "yolov4-tiny", "C4 C5"),
        ("darknet-tiny", "yolov3", "C5"),
        ("shufflenetv2-1x", "yolov3-tiny", "C4 stage4 C5"),
    ],
)
def test_attention_stands_where_the_head_reads(attention: str, backbone: str, head: str, levels: str) -> None:
    plain, text = (
        text_of("--backbone", backbone, "--head", head, "--classes", 1, "--attention", each)
        for each in ("none", attention)
    )
    sections = parse(text).sections
    gates = [place for place, section in enumerate(sections) if section.name == attention]
    assert len(gates) == len(levels.split())
    assert [s.name for s in sections if s.name != attention] == [s.name for s in parse(plain).sections]
    for level in set(levels.split()) - {"stage4"}:
        assert f"[{attention}]" in text.partition(f"# {level}: ")[2].splitlines()[1]


def test_comments_name_the_layers_of_the_maps() -> None:
    text = text_of("--backbone", "ghostnet", "--head", "yolov3", "--classes", 1)
    sections = text.split("\n\n")[2:]  # without the opening comment and [net]
    for level, side, layer in (("C3", 52, 5), ("C4", 26, 11), ("C5", 13, 17)):
        assert sections[layer].startswith(f"# {level}: {side}x{side}, layer {layer}\n[")
    model = built(text)
    assert "layers=-1,11\n" in text
    assert [layer.channels for layer in model.layers if layer.stride == (16, 16)].count(112) >= 2


def test_width_scales_to_multiples_of_8_and_leaves_the_heads() -> None:
    model = built(text_of(*TINY, "--classes", 5, "--width", 0.3))
    wide = [m.out_channels for m in built(text_of(*TINY, "--classes", 5)).modules() if isinstance(m, nn.Conv2d)]
    narrow = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert narrow == [30 if C == 30 else max(8, round(C * 0.3 / 8) * 8) for C in wide]
    assert min(narrow) == 8


@pytest.mark.parametrize("backbone", ["darknet-tiny", "ghostnet", "mobilenetv3-small"])
def test_quantize_spares_the_first_convolution_the_heads_and_gates(backbone: str) -> None:
    model = built(text_of("--backbone", backbone, "--head", "yolov3-tiny", "--classes", 1, "--quantize", 3))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    floats = [m for m in convs if not isinstance(m, QuantConv2d)]
    assert floats[0] is convs[0]
    assert all(m.bias is not None for m in floats[1:])  # heads and gates
    assert {model.layers[spec.layer - 1].module.conv for spec in model.heads} <= {*floats}
    assert {(m.grid.w_bits, m.grid.a_bits) for m in convs if isinstance(m, QuantConv2d)} == {(3, 3)}
    assert len(convs) > 2 * len(floats)


@pytest.mark.parametrize(("bits", "limit"), [(1, 3), (2, 3), (3, 10), (8, 10)])
def test_few_bits_have_a_narrow_range(bits: int, limit: float) -> None:
    model = built(text_of(*TINY, "--classes", 1, "--quantize", bits))
    assert {m.grid.a_range for m in model.modules() if isinstance(m, QuantConv2d)} == {limit}


def test_released_layouts_differ_as_they_should() -> None:
    words = ("--head", "yolov3", "--classes", 10, "--backbone")
    ours, released = text_of(*words, "ghostnet"), text_of(*words, "ghostnet-imagenet")
    assert [line for line in ours.splitlines() if line.startswith("se=")][:2] == ["se=18", "se=30"]
    assert [line for line in released.splitlines() if line.startswith("se=")][:2] == ["se=20", "se=32"]
    assert "gate=hard_sigmoid" in released
    assert "gate=hard_sigmoid" not in ours
    assert "hidden=" not in text_of(*words, "shufflenetv2-1x-imagenet")


@pytest.mark.parametrize(("channels", "wanted"), [(18, 20), (30, 32), (4, 8), (16, 16), (60, 64), (35, 32), (36, 40)])
def test_divisible_is_mobilenets(channels: int, wanted: int) -> None:
    divisor = 4 if channels in (18, 30) else 8
    assert divisible(channels, divisor) == wanted


@pytest.mark.parametrize(
    ("words", "anchors"),
    [
        (("--classes", 3), "10,14, 23,27, 37,58, 81,82, 135,169, 344,319"),
        (("--classes", 3, "--img-size", 832), "20,28, 46,54, 74,116, 162,164, 270,338, 688,638"),
        (("--classes", 3, "--anchors", "visdrone"), "5,6, 9,15, 18,11, 21,32, 38,23, 67,58"),
        (("--classes", 3, "--anchors", "1,2,3,4,5,6,7,8,9,10,11,12.5"), "1,2, 3,4, 5,6, 7,8, 9,10, 11,12.5"),
        (
            ("--classes", 3, "--anchors", "visdrone", "--img-size", 32),
            "0.4,0.5, 0.7,1.2, 1.4,0.8, 1.6,2.5, 2.9,1.8, 5.2,4.5",
        ),
    ],
)
def test_anchors_are_written_for_the_size(words: tuple, anchors: str) -> None:
    assert f"\nanchors={anchors}\n" in text_of(*TINY, *words)


def test_anchors_come_of_the_training_boxes(scenes: Path, call, tmp_path: Path) -> None:
    status, _, err = call(*TINY, "--data", scenes, "--img-size", 96, "-o", "a.cfg")
    assert status == 0
    assert "best possible recall 1.0000, mean IoU 0." in err
    model = Darknet(load_cfg(tmp_path / "a.cfg"))
    sides = np.array([anchor for head in model.heads for anchor in head.anchors])
    assert len(np.unique(sides, axis=0)) == 6
    assert 0 < sides.min() < sides.max() <= 96
    assert model.classes == 4


def test_the_file_is_written_once(call, tmp_path: Path) -> None:
    words = (*TINY, "--classes", 2, "-o", "a.cfg")
    assert call(*words)[0] == 0
    before = (tmp_path / "a.cfg").read_text()
    with pytest.raises(DataError, match=r"a.cfg: is there already \(give --force to overwrite it\)"):
        call(*words, "--attention", "eca")
    assert (tmp_path / "a.cfg").read_text() == before
    assert call(*words, "--attention", "eca", "--force")[0] == 0
    assert "[eca]" in (tmp_path / "a.cfg").read_text()


def test_the_screen_gets_the_cfg_alone(call, tmp_path: Path) -> None:
    status, out, _ = call(*TINY, "--classes", 2)
    assert (status, list(tmp_path.iterdir())) == (0, [])
    assert built(out).classes == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backbone ghostnt --head yolov3 --classes 1", "expected 'ghostnet', gets 'ghostnt'"),
        ("--backbone ghostnet --head yolo3 --classes 1", "expected 'yolov3', gets 'yolo3'"),
        ("--backbone ghostnet --head yolov3 --attention ecca --classes 1", "expected 'eca', gets 'ecca'"),
        ("--backbone ghostnet --classes 1", "are required: --head"),
        ("--backbone ghostnet --head yolov3", "are required: --classes or --data"),
        ("--backbone ghostnet --head yolov3 --classes 0", "expected 1 to 1000000000, gets 0"),
        ("--backbone ghostnet --head yolov3 --classes 1 --data a.data", "not allowed with argument"),
        ("--backbone ghostnet --head yolov3 --classes 1 --width 0", "expected a factor from 0.01 to 8, gets '0'"),
        ("--backbone ghostnet --head yolov3 --classes 1 --width nan", "expected a factor from 0.01 to 8, gets 'nan'"),
        ("--backbone ghostnet --head yolov3 --classes 1 --img-size 400", "expected a multiple of 32 up to 16384"),
        ("--backbone ghostnet --head yolov3 --classes 1 --quantize 32", "expected 1 to 16 bits, gets '32'"),
    ],
)
def test_unfit_flags_are_refused(words: str, message: str, call) -> None:
    status, _, err = call(*words.split())
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--anchors 1,2,3", r"expected 6 pairs of width and height for --head yolov3-tiny, gets 3 numbers"),
        ("--anchors 1,2,3,4,5,6,7,8,9,10,11,0", "expected sizes above 0"),
        ("--anchors 1,2,3,4,5,6,7,8,9,10,11,nan", "expected sizes above 0"),
        ("--anchors 1,2,3,4,5,6,7,8,9,10,11,65537", "expected sizes above 0 and up to 65536"),
        ("--anchors 1,2,3,4,5,6,7,8,9,10,11,1e9999", "expected sizes above 0 and up to 65536"),
        ("--anchors visdron", "expected auto, numbers or 'visdrone', gets 'visdron'"),
        ("--head yolov3 --anchors oxfordhand", r"oxfordhand: has 6 anchors \(expected 9 for --head yolov3\)"),
    ],
)
def test_unfit_anchors_are_refused(words: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_of(*TINY, "--classes", 1, *words.split())


@pytest.mark.parametrize(("head", "most"), [("yolov3-tiny", 21840), ("yolov3", 21840)])
def test_as_many_classes_as_a_head_has_channels_for(head: str, most: int) -> None:
    words = ("--backbone", "darknet-tiny" if head == "yolov3-tiny" else "darknet53", "--head", head, "--classes")
    assert built(text_of(*words, most)).classes == most
    for more in (most + 1, 10**9):
        with pytest.raises(DataError, match=rf"^--classes: expected at most {most} classes for --head {head}$"):
            text_of(*words, more)


def test_anchors_from_data_without_a_training_list(tmp_path: Path) -> None:
    (tmp_path / "a.names").write_text("one\n")
    (tmp_path / "a.data").write_text("names=a.names\n")
    with pytest.raises(DataError, match=r"a.data: has no train= to take anchors from \(give --anchors\)"):
        text_of(*TINY, "--data", tmp_path / "a.data")
