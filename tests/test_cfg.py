"""The cfg language: lossless text, typed reads, edits of one line, and every mistake told once, with its line."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CFGS, INVALID, name

from models import CfgError, Darknet, dump, load_cfg, parse
from models.cfg import Section

TEXTS = {
    "CRLF": "[net]\r\nwidth=32\r\n\r\n[yolo]\r\nclasses=1\r\n",
    "tabs": "\t[net]\t\n\twidth\t=\t32\t\n",
    "BOM": "\ufeff[net]\nwidth=32\n",
    "comments": "# a\n; b\n[net] # c\nwidth=32 # d\n#height=1\nheight=64;e\n",
    "no final newline": "[net]\nwidth=32",
    "blank first lines": "  \n\n[net]\nwidth=32\n",
    "nothing": "",
    "only blanks": " \n\t\r\n",
    "no cfg at all": "lorem = ipsum = dolor\n]sit[\n[[amet]]\n=\n==\n",
    "old Mac": "[net]\rwidth=32\r",
}


def section(line: str) -> Section:
    return parse(f"[net]\n{line}\n").sections[0]


def mistakes(cfg: Path) -> list[str]:
    with pytest.raises(CfgError) as caught:
        Darknet(load_cfg(cfg))
    lines = [f"{cfg}:{mistake.line}: {mistake.message}" for mistake in caught.value.mistakes]
    assert str(caught.value).splitlines() == lines
    return [line.removeprefix(f"{cfg}:") for line in lines]


def network(*lines: str, path: str = "x.cfg") -> Darknet:
    text = "\n".join(("[net]", *lines, "[convolutional]", "filters=6", "[yolo]", "anchors=9,9", "classes=1"))
    return Darknet(parse(text, path))


@pytest.mark.parametrize("path", CFGS + INVALID, ids=name)
def test_dump_gives_back_every_byte_of_a_file(path: Path) -> None:
    assert dump(load_cfg(path)).encode("utf-8", "surrogateescape") == path.read_bytes()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_dump_gives_back_every_character(text: str) -> None:
    assert dump(parse(text)) == text


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["[net]", "[", "]", "key", "=", "1", ",", "#", ";", " ", "\r", "\n", "\x85", "é"])))
def test_dump_gives_back_any_text(parts: list[str]) -> None:
    assert dump(parse("".join(parts))) == "".join(parts)


def test_dump_gives_back_every_byte_of_the_cfgs_in_the_wild(shared_data: Path) -> None:
    paths = sorted(shared_data.glob("darknet/**/*.cfg"))
    assert len(paths) > 80
    for path in paths:
        assert dump(load_cfg(path)).encode("utf-8", "surrogateescape") == path.read_bytes(), path


@pytest.mark.parametrize("text", ["CRLF", "tabs", "BOM", "comments", "no final newline", "blank first lines"])
def test_no_way_of_writing_a_line_changes_its_value(text: str) -> None:
    cfg = parse(TEXTS[text])
    assert cfg.sections[0].int("width") == 32
    assert cfg.mistakes == []


@pytest.mark.parametrize(
    ("line", "read", "value"),
    [
        ("filters=8", lambda s: s.int("filters"), 8),
        ("filters=+8", lambda s: s.int("filters"), 8),
        ("from=-3", lambda s: s.int("from"), -3),
        ("filters=1 6", lambda s: s.int("filters"), 16),  # Darknet takes white space out first
        ("layers = 180 ###P6", lambda s: s.ints("layers"), (180,)),
        ("groups=1152\t\t#960", lambda s: s.int("groups"), 1152),
        ("group=2", lambda s: s.int("groups", 1, alias="group"), 2),
        ("absent=1", lambda s: s.int("filters", 7), 7),
        ("hue=.1", lambda s: s.float("hue"), 0.1),
        ("hue=-1.", lambda s: s.float("hue"), -1.0),
        ("hue=1e-3", lambda s: s.float("hue"), 0.001),
        ("pad=1", lambda s: s.flag("pad"), True),
        ("pad=0", lambda s: s.flag("pad", True), False),
        ("mask = 0,1,  2", lambda s: s.ints("mask"), (0, 1, 2)),
        ("scales=.1,.1,", lambda s: s.floats("scales"), (0.1, 0.1)),
        ("anchors=10,13,  16,30", lambda s: s.floats("anchors"), (10, 13, 16, 30)),
        ("act=leaky;x", lambda s: s.choice("act", {"leaky", "linear"}, "linear"), "leaky"),
        ("a=b=c", lambda s: s.choice("a", {"b=c"}, ""), "b=c"),
    ],
)
def test_typed_reads(line: str, read, value: object) -> None:
    read_from = section(line)
    assert read(read_from) == value
    assert read_from.cfg.mistakes == []


@pytest.mark.parametrize("written", ["", "x", "1.5", "1_000", "0x10", "８", "9" * 19, "1e3", "--1", "nan"])
def test_what_is_no_integer_is_a_mistake(written: str) -> None:
    read_from = section(f"filters={written}")
    assert read_from.int("filters", 5) == 5
    assert [mistake[1:] for mistake in read_from.cfg.mistakes] == [
        (2, f"[net] 'filters' expects an integer, gets {written!r}")
    ]


@pytest.mark.parametrize("written", ["", "nan", "inf", "-inf", "1e999", "-1e999", "1_0.0", "0x1p3", "١", ".", "1e"])
def test_what_is_no_finite_number_is_a_mistake(written: str) -> None:
    read_from = section(f"hue={written}")
    read_from.float("hue", 0.1)
    assert [mistake.line for mistake in read_from.cfg.mistakes] == [2]


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        ("filters=8\n", "filters=12\n"),
        ("filters=8\r\n", "filters=12\r\n"),
        ("filters = 8  # why\n", "filters = 12  # why\n"),
        ("\tfilters\t=\t8;why\r\n", "\tfilters\t=\t12;why\r\n"),
        ("fil ters=1 6 \n", "fil ters=12 \n"),
        ("filters=8", "filters=12"),
        ("filters=\n", "filters=12\n"),
        ("filters= # to come\n", "filters=12 # to come\n"),
        ("filters=8\nfilters=9\n", "filters=12\nfilters=9\n"),
    ],
)
@pytest.mark.parametrize("before", ["[net]\n", "# a\r\n\r\n[net] # b\r\n\t\r\n#filters=7\r\nwidth=32\r\n"])
def test_set_changes_only_its_own_line(before: str, line: str, edited: str) -> None:
    after = "" if line == "filters=8" else "size=3\n\n[yolo]\nfilters=3\n"
    cfg = parse(before + line + after)
    cfg.sections[0].set("filters", 12)
    assert dump(cfg) == before + edited + after
    assert cfg.sections[0].int("filters") == parse(dump(cfg)).sections[0].int("filters") == 12


@pytest.mark.parametrize(
    ("text", "edited"),
    [
        ("[net]\nwidth=8\n[yolo]\n", "[net]\ngroups=2\nheight=4\nwidth=8\n[yolo]\n"),
        ("[net]\r\n#\r\nwidth=8\r\n", "[net]\r\ngroups=2\r\nheight=4\r\n#\r\nwidth=8\r\n"),
        ("[net]", "[net]\ngroups=2\nheight=4\n"),
    ],
)
def test_set_puts_a_new_key_below_the_header(text: str, edited: str) -> None:
    cfg = parse(text)
    for key, value in (("height", 4), ("groups", 1), ("groups", 2)):
        cfg.sections[0].set(key, value)
    if "width" in text:
        cfg.sections[0].set("width", 8)  # its line has moved by two
    assert dump(cfg) == edited


def test_of_two_equal_keys_the_first_holds_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "darkslim")
    assert network("width=64", "height=64", "width=96").size == (64, 64)
    assert caplog.messages == ["x.cfg:4: 'width' is already set to '64' at line 2, which holds"]


def test_a_missing_comma_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert section("anchors=10,13 16,30").floats("anchors") == (10, 1316, 30)
    assert caplog.messages == ["<string>:2: 'anchors' lacks a comma between two numbers: Darknet reads them as one"]


def test_keys_of_darknets_own_trainer_make_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "darkslim")
    network("batch=64", "policy=steps", "burn_in=1000")
    assert caplog.messages == ["x.cfg: keys without a meaning here, set aside: batch, burn_in, policy"]


def test_an_unknown_key_is_an_error_unless_it_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    cfg = parse("[net]\nwidht=32\n[convolutional]\nfilters=6\n[yolo]\nanchors=9,9\nclasses=1\n", "x.cfg")
    message = "x.cfg:2: [net] does not know 'widht' (expected 'width')"
    with pytest.raises(CfgError) as caught:
        Darknet(cfg)
    assert (str(caught.value), caught.value.path, caught.value.line) == (message, "x.cfg", 2)
    Darknet(cfg, allow_unknown=True)
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", f"{message}, ignored")]


def test_building_leaves_the_cfg_as_it_is() -> None:
    cfg = load_cfg(CFGS[0])
    Darknet(cfg)
    assert cfg.mistakes == []
    assert not any(each.known for each in cfg.sections)


def test_five_mistakes_make_five_lines() -> None:
    (path,) = (path for path in INVALID if path.stem == "five_mistakes")
    lines = mistakes(path)
    assert len(lines) == 5
    numbers = [int(line.partition(":")[0]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert all("expect" in line for line in lines)  # each says what would be right


def test_there_are_invalid_cfgs() -> None:
    assert len(INVALID) >= 10


@pytest.mark.parametrize("path", INVALID, ids=name)
def test_an_invalid_cfg_tells_its_mistakes(path: Path) -> None:
    assert mistakes(path) == path.with_suffix(".expected").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ":1: expected a [net] section, the file has none"),
        (b"\x7fELF\0\0\n=[]", ": is not a text file (expected a cfg in UTF-8, is it a weights file?)"),
        ("[net]\n".encode("utf-16"), ": is not a text file (expected a cfg in UTF-8, is it a weights file?)"),
        (b"[\x80\x1b]", ":1: the first section must be [net], not ['\\udc80\\x1b']"),
        (b"\xff\xd8=\n", ":1: '\\udcff\\udcd8' stands before the first section (start the file with [net])"),
    ],
)
def test_a_file_that_is_no_cfg(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.cfg"
    path.write_bytes(data)
    with pytest.raises(CfgError) as caught:
        Darknet(load_cfg(path))
    assert str(caught.value).splitlines()[0] == f"{path}{message}"
    str(caught.value).encode()  # raises when a terminal could not show it


@pytest.mark.parametrize(("name", "why"), [("none.cfg", "No such file or directory"), (".", "Is a directory")])
def test_a_cfg_that_cannot_be_read(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(CfgError) as caught:
        load_cfg(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: cannot read the cfg: {why}"
