"""docs/slimming.md tells what is: its commands run, its flags are there, and what it quotes is said."""

import re
import shutil
from pathlib import Path

from documents import code_blocks, commands, run_python

from utils import prune_flags
from utils.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/slimming.md").read_text(encoding="utf-8")
SOURCES = [ROOT / "normal_prune.py", *(ROOT / f"utils/{name}.py" for name in ("guard", "plan", "slimming"))]


def test_its_commands_run(command, tmp_path):
    shutil.copytree(ROOT / "cfg", tmp_path / "cfg")
    write_dataset(tmp_path / "data/demo", train=4, valid=2, size=64, seed=0)
    run_python("python train.py --cfg cfg/demo.cfg --data data/demo/demo.data --img-size 64 --epochs 1", command)
    lines = [line for kind, code in code_blocks(PAGE) if kind == "bash" for line in commands(code)]
    assert len(lines) == 3
    for line in lines:
        run_python(line, command)
    assert (tmp_path / "runs/tuned/last.pt").is_file()


def test_its_flags_are_there():
    page = PAGE[PAGE.index("## Pruning") : PAGE.index("## Fine-tuning")]
    flags = set(re.findall(r"`(--[a-z-]+)", page))
    assert len(flags) > 15
    known = (ROOT / "utils/prune_flags.py").read_text() + (ROOT / "utils/cli.py").read_text()
    assert {flag for flag in flags if f'"{flag.replace("--no-", "--")}"' not in known} == set()
    defaults = vars(prune_flags.parse_args("", []))
    assert (defaults["percent"], defaults["layer_keep"], defaults["recalibrate"]) == (0.5, 0.05, 256)


def test_what_it_quotes_is_said():
    said = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in SOURCES))
    quoted = re.findall(r"^\| `([^`]+)` \|", PAGE[PAGE.index("## What to do") :], flags=re.MULTILINE)
    assert len(quoted) == 5
    for text in quoted:
        for part in re.split(r" ?…:? ?|\d[.\d]*|--divisor", text):
            assert part.strip(" :") in said, text
