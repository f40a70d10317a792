"""Every command of the README runs as it is written, on a small dataset and with one epoch."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from documents import code_blocks, commands, run_python

from tests.layouts import visdrone, voc
from utils import lint
from utils.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = code_blocks(README)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in commands(block)]


def write_hands(folder: Path) -> None:
    """Lay a drawn dataset of one class where data/oxfordhand.data looks for the real one."""
    write_dataset(folder, train=6, valid=2, size=64, seed=1)
    for file in folder.glob("labels/*/*.txt"):
        file.write_text(re.sub(r"^\d", "0", file.read_text(), flags=re.MULTILINE))


def zoo_rows() -> list[str]:
    """Give the README's row of every shipped cfg: its title without papers, and the figures of utils.lint."""
    rows = []
    for path in sorted(ROOT.glob("cfg/*.cfg"), key=lambda path: path.stem):
        title = re.split(r", https?:", path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "))[0]
        each = lint.figures(lint.judge(str(path)), lint.TABLE_SIZE)
        strides = " ".join(map(str, each["strides"]))
        size = f"{each['weights_bytes'] / 1e6:.1f} MB"
        cells = (f"`cfg/{path.name}`", title, f"{each['parameters']:,}", size, f"{each['bflops']:.2f}", strides)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_table_of_the_zoo_has_lints_figures():
    assert [line for line in README.splitlines() if line.startswith("| `cfg/")] == zoo_rows()


def write_originals(folder: Path) -> None:
    """Lay out the datasets that the README converts."""
    visdrone(folder / "VisDrone", {"train": "0,0,100,50,1,1,0,0\n", "val": "0,0,100,50,1,1,0,0\n"})
    voc(folder / "raccoon", {"a": [("raccoon", 1, 1, 9, 9)], "b": []}, {})
    (folder / "raccoon/train.txt").write_text("a\n")
    (folder / "raccoon/test.csv").write_text("filename,class\nb.jpg,raccoon\n")


def test_there_are_commands():
    assert len(COMMANDS) > 10
    assert {line.split()[0] for line in COMMANDS} == {"make", "pip", "python"}


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("target", [line.split()[1] for line in COMMANDS if line.startswith("make")])
def test_make_knows_its_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_python_commands_run(command, tmp_path):
    for name in ("cfg", "data"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("oxfordhand", "visdrone", "raccoon")
        )
    write_hands(tmp_path / "data/oxfordhand")
    write_originals(tmp_path / "downloads")
    for line in (line for line in COMMANDS if line.startswith("python")):
        if "--resume" in line:
            continue  # its run is finished here; tests/test_train.py kills one and resumes it
        run_python(line, command)
    assert list((tmp_path / "output").glob("*.jpg"))
    assert list((tmp_path / "found").glob("*.txt"))
    assert (tmp_path / "found/detections.json").exists()
    assert (tmp_path / "judged/rates.png").exists()


def test_python_code_runs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "cfg", tmp_path / "cfg")
    monkeypatch.chdir(tmp_path)
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    names = {"images": torch.rand(1, 3, 64, 64)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["boxes"].shape == (1, 3 * (8 * 8 + 4 * 4), 4)
