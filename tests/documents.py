"""Commands of Markdown documents, run as a reader copies them, but on a small dataset and with one epoch."""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torchvision
from conftest import Outcome

from docs import draw_blocks
from utils import backbone, benchmark, check, compose, convert, export, lint

SMALLER = {"--epochs": "1", "--img-size": "64", "--batch-size": "4"}
PRUNING = ["--criterion", "l2", "--force"]  # one epoch parts no γ, and detects nothing
MODULES = {
    "utils.backbone": backbone,
    "utils.benchmark": benchmark,
    "utils.check": check,
    "utils.convert": convert,
    "utils.export": export,
    "utils.lint": lint,
    "utils.compose": compose,
    "docs.draw_blocks": draw_blocks,
}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Give (language, code) of every fenced block."""
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


def commands(code: str) -> Iterator[str]:
    """Yield the commands of a block; one goes on in the next line while a quotation is open."""
    command = ""
    for line in code.splitlines():
        command += line
        try:
            shlex.split(command)
        except ValueError:
            command += "\n"
            continue
        yield command
        command = ""
    assert not command, f"open quotation: {command}"


def shrink(words: list[str]) -> list[str]:
    """Replace the numbers that make a command long."""
    return [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def run_python(line: str, command: Callable[..., Outcome]) -> None:
    """Run a command that starts with `python` in the current folder, smaller, in this process."""
    words = shlex.split(line)[1:]
    if "--from" in words:
        torch.save(torchvision.models.mobilenet_v3_large().state_dict(), words[words.index("--from") + 1])
    if words[0] == "-m" and words[1] in MODULES:
        if ">" not in words:
            MODULES[words[1]].main(words[2:])
            return
        *words, _, target = words
        with Path(target).open("w", encoding="utf-8") as out, redirect_stdout(out):
            MODULES[words[1]].main(words[2:])
        return
    if words[0] == "-m":
        outcome = command(words[1].replace(".", "/"), *words[2:], "--train", 8, "--valid", 4, "--size", 64)
    else:
        flags = [] if words[0] == "detect.py" else ["--workers", "0"]
        flags += PRUNING if words[0] == "normal_prune.py" else []
        outcome = command(words[0].removesuffix(".py"), *shrink(words[1:]), "--device", "cpu", *flags)
    assert outcome.status == 0, f"{line}\n{outcome.err}"
