"""What several tests need: the real test data, a small drawn dataset, and the scripts as a user calls them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.real_data import real_data
from models.weights import save_checkpoint
from tests.networks import seeded
from utils import cli
from utils.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """What a command left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator:
    """Let captured output hold file names that are no text, which workers could not hand to the main process."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real weights, pictures and references, or skip."""
    folder = real_data()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set DARKSLIM_DATA)")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw 12 training and 4 test pictures of 96 pixels and give their .data file."""
    return write_dataset(tmp_path_factory.mktemp("scenes"), train=12, valid=4, size=96, seed=0)


@pytest.fixture
def trained(tmp_path: Path, scenes: Path) -> Path:
    """Write demo.pt, a checkpoint of cfg/demo.cfg for the drawn pictures, and give its path."""
    cfg = ROOT / "cfg/demo.cfg"
    names = (scenes.parent / "demo.names").read_text().split()
    described = {"cfg": cfg.read_text(), "cfg_path": "demo.cfg", "names": names, "data": str(scenes)}
    save_checkpoint(tmp_path / "demo.pt", described | {"model": seeded(cfg).state_dict()})
    return tmp_path / "demo.pt"


@pytest.fixture
def command(tmp_path, monkeypatch, capfd) -> Callable[..., Outcome]:
    """Run a script as `command("train", "--cfg", …)`, a module as `command("utils/convert", …)`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *args: object) -> Outcome:
        if "/" in name:
            script = importlib.import_module(name.replace("/", "."))
        else:
            spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
            script = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capfd.readouterr()
        try:
            cli.run(script.main)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return Outcome(status, *capfd.readouterr())

    return call
