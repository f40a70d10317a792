"""Every command of the README runs as it is written, on a small dataset and with one epoch."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from utils import lint
from utils.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SMALLER = {"--epochs": "1", "--img-size": "64", "--batch-size": "4"}


def shrink(words: list[str]) -> list[str]:
    """Replace the numbers that make a command long."""
    return [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def write_hands(folder: Path) -> None:
    """Lay a drawn dataset of one class where data/oxfordhand.data looks for the real one."""
    write_dataset(folder, train=6, valid=2, size=64, seed=1)
    for file in folder.glob("labels/*/*.txt"):
        file.write_text(re.sub(r"^\d", "0", file.read_text(), flags=re.MULTILINE))


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
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("oxfordhand"))
    write_hands(tmp_path / "data/oxfordhand")
    for line in (line for line in COMMANDS if line.startswith("python")):
        words = shlex.split(line)[1:]
        if words[:2] == ["-m", "utils.lint"]:
            lint.main(words[2:])
            continue
        if words[:2] == ["-m", "utils.check"]:
            outcome = command("utils/check", *words[2:])
            assert outcome.status == 0, outcome.out
            continue
        if words[0] == "-m":
            small = ("--train", 8, "--valid", 4, "--size", 64)
            outcome = command(words[1].replace(".", "/"), *words[2:], *small)
            assert outcome.status == 0, outcome.err
            continue
        if "--resume" in words:
            continue  # its run is finished here; tests/test_train.py kills one and resumes it
        flags = [] if words[0] == "detect.py" else ["--workers", "0"]
        outcome = command(words[0].removesuffix(".py"), *shrink(words[1:]), "--device", "cpu", *flags)
        assert outcome.status == 0, f"{line}\n{outcome.err}"
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
