"""`python -m utils.lint`: figures of networks, mistakes with their lines, the JSON and the reference of the keys."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import CFGS, HEAVY_CFGS, INVALID, ROOT, name
from torch import nn

from models import Darknet, load_cfg, parse, save_weights
from utils import cfg_keys, lint

KEYS = ["file", "sections", "parameters", "weights_bytes", "bflops", "strides", "errors"]

WINDOWS = """[net]
height=128
width=160
[convolutional]
filters=2
size=5
stride=2
pad=1
activation=linear
[maxpool]
size=2
stride=2
[convolutional]
filters=2
size=3
stride=2
pad=1
activation=linear
[convolutional]
filters=2
size=1
activation=linear
[upsample]
stride=2
[route]
layers=-1,1
[convolutional]
filters=6
size=3
pad=1
activation=linear
[yolo]
classes=1
mask=0
anchors=8,8
"""


@pytest.fixture
def call(capsys):
    """Run the command and give its exit status and standard output."""

    def run(*args: object) -> tuple[int, str]:
        try:
            lint.main([str(arg) for arg in args])
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            logging.getLogger("darkslim").handlers.clear()
        return status, capsys.readouterr().out

    return run


def test_figures_are_darknets() -> None:
    # Darknet prints "Total BFLOPS 65.879" for this cfg, and its weights file of 248,007,048 bytes is well known
    assert lint.figures(lint.judge(str(ROOT / "cfg/yolov3.cfg"))) == {
        "file": str(ROOT / "cfg/yolov3.cfg"),
        "sections": 108,
        "parameters": 61_949_149,
        "weights_bytes": 248_007_048,
        "bflops": pytest.approx(65.879, abs=0.0005),
        "strides": [32, 16, 8],
        "errors": [],
    }


# What Darknet prints for these cfgs as "Total BFLOPS"; convolutions of one bit count a 32nd.
@pytest.mark.parametrize(("cfg", "bflops"), [("yolov3", 65.879), ("yolov3-tiny", 5.571), ("yolov4", 128.459)])
def test_bflops_are_darknets(cfg: str, bflops: float, shared_data: Path) -> None:
    verdict = lint.judge(str(shared_data / f"darknet/official-cfg/{cfg}.cfg"))
    assert lint.figures(verdict)["bflops"] == pytest.approx(bflops, abs=0.0005)


@pytest.mark.parametrize("path", HEAVY_CFGS, ids=name)
def test_weights_bytes_are_those_of_the_file(path: Path, tmp_path: Path) -> None:
    model = Darknet(load_cfg(path))
    save_weights(model, tmp_path / "a.weights")
    verdict = lint.judge(str(path))
    assert lint.weights_bytes(verdict.model) == (tmp_path / "a.weights").stat().st_size
    assert {tensor.device.type for tensor in verdict.model.parameters()} == {"meta"}


def test_weights_bytes_of_the_official_cfgs(shared_data: Path) -> None:
    lines = (shared_data / "reference/official_cfg_sizes.tsv").read_text().splitlines()[1:]
    wanted = {cells[0]: int(cells[3]) for cells in (line.split("\t") for line in lines)}
    verdicts = [lint.judge(str(shared_data / "darknet/official-cfg" / file)) for file in wanted]
    found = {Path(each.file).name: lint.weights_bytes(each.model) for each in verdicts if each.model}
    assert len(found) > 35
    assert found == {file: wanted[file] for file in found}


def test_receptive_fields_are_what_the_gradient_reaches() -> None:
    model = Darknet(parse(WINDOWS)).double()
    fields = lint.receptive_fields(model)
    assert fields == [(5, 5), (7, 7), (15, 15), (15, 15), (15, 15), (15, 15), (23, 23), (23, 23)]
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    reached = torch.zeros(128, 160)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):  # a maximum passes its gradient to one cell alone, another one each time
        x = torch.rand(1, 3, 128, 160, generator=generator, dtype=torch.float64, requires_grad=True)
        (head,) = model(x)
        head[0, 0, 9, 11].backward()
        reached += x.grad[0].abs().sum(0)
    rows, columns = reached.nonzero(as_tuple=True)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == fields[-1]


def test_receptive_fields_of_every_kind_of_window() -> None:
    text = """[net]
height=96
width=96
[convolutional]
filters=4
size=3
stride=2
pad=1
antialiasing=1
[convolutional]
filters=4
size=3
pad=1
dilation=2
[convolutional]
filters=4
size=3
pad=1
share_index=1
[reorg3d]
stride=2
[local_avgpool]
size=3
stride=1
[crnn]
hidden=4
output=6
pad=1
[yolo]
classes=1
anchors=8,8
"""
    fields = lint.receptive_fields(Darknet(parse(text)))
    # 3+2; +4 cells of 2; +2 cells of 2; the other cell of 2; +2 cells of 4; the input's and output's +2 cells of 4 each
    assert fields == [(5, 5), (13, 13), (17, 17), (19, 19), (27, 27), (43, 43), (43, 43)]


def test_receptive_field_of_a_global_mean_is_the_picture() -> None:
    text = "[net]\nheight=32\nwidth=64\n[maxpool]\nsize=2\nstride=2\n[avgpool]\n[convolutional]\nfilters=6\n"
    model = Darknet(parse(text + "[yolo]\nclasses=1\nanchors=8,8\n"))
    assert lint.receptive_fields(model) == [(2, 2), (32, 64), (32, 64), (32, 64)]


# Table 1 of the YOLOv4 paper (https://arxiv.org/abs/2004.10934): CSPDarknet53 725×725, CSPResNeXt50 425×425
@pytest.mark.parametrize(("cfg", "layer", "pixels"), [("yolov4", 104, 725), ("csresnext50-panet-spp", 78, 425)])
def test_receptive_fields_of_backbones_are_the_papers(cfg: str, layer: int, pixels: int, shared_data: Path) -> None:
    verdict = lint.judge(str(shared_data / f"darknet/official-cfg/{cfg}.cfg"))
    assert lint.receptive_fields(verdict.model)[layer] == (pixels, pixels)


def test_table_of_several_files(call) -> None:
    status, out = call(ROOT / "cfg/yolov3-tiny.cfg", ROOT / "tests/fixtures/tiny.cfg")
    header, first, second = out.splitlines()
    assert status == 0
    assert header.split()[:5] == ["file", "sections", "parameters", "weights", "BFLOPs"]
    assert first.split()[1:] == "25 8,852,366 35,434,956 5.571 416x416 32 16 318 286".split()
    assert second.split()[1:4] == ["14", "16,732", "67,780"]


def test_single_file_shows_its_layers(call) -> None:
    status, out = call(ROOT / "tests/fixtures/tiny.cfg")
    assert status == 0
    assert Darknet(load_cfg(ROOT / "tests/fixtures/tiny.cfg")).summary() in out


@pytest.mark.parametrize("path", INVALID, ids=name)
def test_every_mistake_is_told_with_its_line(path: Path, call) -> None:
    wanted = path.with_suffix(".expected").read_text(encoding="utf-8").splitlines()
    status, out = call(path)
    assert status == 2
    assert [line.removeprefix(f"{path}:") for line in out.splitlines()[2:]] == wanted
    status, out = call("--json", path)
    assert status == 2
    (entry,) = json.loads(out)
    assert list(entry) == KEYS
    assert [line.removeprefix(f"{path}:") for line in entry["errors"]] == wanted
    assert entry["parameters"] is entry["weights_bytes"] is entry["bflops"] is entry["strides"] is None


def test_missing_file_is_a_mistake_among_others(call) -> None:
    status, out = call("--json", "nowhere.cfg", ROOT / "tests/fixtures/tiny.cfg")
    missing, good = json.loads(out)
    assert status == 2
    assert missing["errors"] == ["nowhere.cfg: cannot read the cfg: No such file or directory"]
    assert (missing["sections"], good["sections"], good["errors"]) == (0, 14, [])


def test_strides_may_differ_along_the_axes(call, tmp_path: Path) -> None:
    text = "[net]\nheight=32\nwidth=64\n[convolutional]\nfilters=6\nstride_x=2\n[yolo]\nclasses=1\nanchors=8,8\n"
    (tmp_path / "a.cfg").write_text(text)
    status, out = call("--json", tmp_path / "a.cfg")
    assert (status, json.loads(out)[0]["strides"]) == (0, [[1, 2]])


def test_json_stands_alone_on_standard_output() -> None:
    command = [sys.executable, "-m", "utils.lint", "--json", "cfg/yolov3-tiny.cfg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [entry["file"] for entry in json.loads(done.stdout)] == ["cfg/yolov3-tiny.cfg"]
    assert "set aside" in done.stderr


@pytest.mark.parametrize("args", [[], ["--keys", "a.cfg"], ["--json"], ["--expand", "a", "b"], ["--keys", "--json"]])
def test_usage(args: list[str], call) -> None:
    assert call(*args)[0] == 2


def test_the_written_reference_is_current(call) -> None:
    status, out = call("--keys")
    assert status == 0
    assert (ROOT / "docs/cfg-reference.md").read_text(encoding="utf-8") == out, (
        "python -m utils.lint --keys > docs/cfg-reference.md"
    )


def test_every_key_has_a_meaning_and_no_meaning_is_stale() -> None:
    read = {
        section: {key.name for key in keys.values() if not key.kind.startswith("as ")}  # aliases
        for section, keys in cfg_keys.read_keys().items()
    }
    assert read == {section: set(meanings) for section, meanings in cfg_keys.MEANINGS.items()}


def test_no_section_reads_a_key_that_the_reference_lacks(shared_data: Path) -> None:
    listed = {section: set(keys) for section, keys in cfg_keys.read_keys().items()}
    first = {each: name for name, names in cfg_keys.section_names().items() for each in names}
    for path in [*CFGS, *shared_data.glob("darknet/**/*.cfg")]:
        verdict = lint.judge(str(path))
        for section in verdict.model.cfg.sections[1:] if verdict.model else ():
            assert section.known <= listed[first[section.name]] | listed[cfg_keys.COMMON], f"{path}:{section.line}"


def test_reference_says_kind_and_default() -> None:
    read = cfg_keys.read_keys()
    assert read["convolutional"]["filters"] == cfg_keys.Key("filters", "integer", 1)
    assert read["convolutional"]["batch_normalize"] == cfg_keys.Key("batch_normalize", "0 or 1", False)
    assert read["convolutional"]["activation"] == cfg_keys.Key("activation", "activation", "logistic")
    assert read["convolutional"]["group"] == cfg_keys.Key("group", "as `groups`", "")
    assert read["maxpool"]["padding"].default == ""  # follows `size`
    assert read["residual"]["hidden"].default == ""  # follows the channels before it
    assert read["csp"]["inner"].default == ""  # follows `hidden`
    assert read["route"]["layers"].default is None
    assert read["net"]["width"] == cfg_keys.Key("width", "integer", 416)
