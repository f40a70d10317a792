"""The floor map and the rules of importing, checked on the source text of every file.

A rule is a function of {path: source} that returns what breaks it, one line each. Each rule runs on the repository, and
on small sources that show that it can fail.
"""

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Import only from the same or a lower floor. A new file gets its floor here.
FLOORS = {
    "models/cfg.py": 0,
    "models/activations.py": 1,
    "models/attention.py": 1,
    "models/binary.py": 1,
    "models/channels.py": 1,
    "models/grid.py": 1,
    "models/quantisers.py": 1,
    "models/quant.py": 1,
    "models/packing.py": 1,
    "models/yolo.py": 1,
    "models/layer.py": 1,
    "models/blocks.py": 2,
    "models/layers_attention.py": 2,
    "models/layers_conv.py": 2,
    "models/layers_dense.py": 2,
    "models/layers_head.py": 2,
    "models/layers_merge.py": 2,
    "models/layers_pool.py": 2,
    "models/layers.py": 2,
    "models/macros.py": 2,
    "models/storage.py": 2,
    "models/__init__.py": 3,
    "models/darknet.py": 3,
    "models/weights.py": 3,
    "utils/__init__.py": 4,
    "utils/annotations.py": 4,
    "utils/boxes.py": 4,
    "utils/cli.py": 4,
    "utils/device.py": 4,
    "utils/dist.py": 4,
    "utils/lists.py": 4,
    "utils/log.py": 4,
    "utils/network.py": 4,
    "utils/onnx_graph.py": 4,
    "utils/optional.py": 4,
    "utils/pictures.py": 4,
    "utils/recipe.py": 4,
    "utils/darknet_recipe.py": 4,
    "utils/scenes.py": 4,
    "utils/schedule.py": 4,
    "utils/annotations_bdd100k.py": 5,
    "utils/annotations_coco.py": 5,
    "utils/annotations_hand.py": 5,
    "utils/annotations_visdrone.py": 5,
    "utils/annotations_voc.py": 5,
    "utils/anchors.py": 5,
    "utils/augment.py": 5,
    "utils/darknet_augment.py": 5,
    "utils/darknet_loss.py": 5,
    "utils/datasets.py": 5,
    "utils/download.py": 5,
    "utils/ignored.py": 5,
    "utils/labels.py": 5,
    "utils/assignment.py": 5,
    "utils/loss.py": 5,
    "utils/odds.py": 5,
    "utils/picture_cache.py": 5,
    "utils/onnx_activations.py": 5,
    "utils/onnx_heads.py": 5,
    "utils/onnx_layers.py": 5,
    "utils/onnx_metadata.py": 5,
    "utils/integer_fold.py": 5,
    "utils/integer_plan.py": 5,
    "utils/onnx_integer.py": 5,
    "utils/integer.py": 6,
    "utils/bench.py": 6,
    "utils/compensate.py": 6,
    "utils/guard.py": 6,
    "utils/importance.py": 5,
    "utils/plan.py": 5,
    "utils/predict.py": 5,
    "utils/prune_flags.py": 5,
    "utils/slimming.py": 6,
    "utils/tuning.py": 6,
    "utils/prune.py": 5,
    "utils/protocols.py": 5,
    "utils/residual_blocks.py": 5,
    "utils/scores.py": 5,
    "utils/sparsity.py": 5,
    "utils/draft.py": 5,
    "utils/compose_backbones.py": 5,
    "utils/compose_heads.py": 5,
    "utils/zoo.py": 5,
    "utils/backbone.py": 6,
    "utils/compose.py": 6,
    "utils/convert.py": 6,
    "utils/distillation.py": 5,
    "utils/distillation_flags.py": 5,
    "utils/feature_distillation.py": 5,
    "utils/head_pairs.py": 5,
    "utils/output_distillation.py": 5,
    "utils/teacher.py": 5,
    "utils/train_flags.py": 5,
    "utils/training_data.py": 5,
    "utils/survey.py": 5,
    "utils/confusion.py": 5,
    "utils/album.py": 6,
    "utils/charts.py": 6,
    "utils/gamma_charts.py": 6,
    "utils/check.py": 6,
    "utils/findings.py": 6,
    "utils/engine.py": 6,
    "utils/benchmark.py": 6,
    "utils/cfg_keys.py": 6,
    "utils/evaluate.py": 6,
    "utils/export.py": 6,
    "utils/calibration.py": 6,
    "utils/int8.py": 6,
    "utils/int8_sensitivity.py": 6,
    "utils/ptq.py": 6,
    "utils/lint.py": 6,
    "utils/memory.py": 6,
    "utils/plots.py": 6,
    "utils/prune_report.py": 6,
    "utils/prune_results.py": 6,
    "utils/runs.py": 6,
    "utils/runtime.py": 6,
    "utils/sensitivity.py": 6,
    "utils/sources.py": 6,
    "utils/timing.py": 6,
    "utils/training.py": 6,
    "utils/writer.py": 6,
    "detect.py": 7,
    "normal_prune.py": 7,
    "test.py": 7,
    "train.py": 7,
    "distill.py": 7,
}

Sources = dict[str, str]


def imported_names(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import in the file, also those inside functions."""
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                folders = path.split("/")[:-1]
                package = folders[: len(folders) - level + 1] if level else []
                parts = [*package, *([module] if module else [])]
                yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in names)


def file_of(name: str) -> str | None:
    """Return the file of the map that is the module `name` or, as in `models.cfg.parse`, holds its last part."""
    parts = name.split(".")
    for module in (parts, parts[:-1]):
        stem = "/".join(module)
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in FLOORS:
                return path
    return None


def imported_files(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, path) of every import of a file of the map."""
    for line, name in imported_names(path, source):
        target = file_of(name)
        if target is not None:
            yield line, target


def every_file_has_a_floor(sources: Sources) -> list[str]:
    missing = [f"{path}: not in the floor map" for path in sources if path not in FLOORS]
    stale = [f"{path}: in the floor map, but there is no such file" for path in FLOORS if path not in sources]
    return missing + stale


def imports_never_go_up(sources: Sources) -> list[str]:
    return [
        f"{path}:{line}: F{FLOORS[path]} imports {target} of F{FLOORS[target]}"
        for path, source in sources.items()
        for line, target in imported_files(path, source)
        if FLOORS.get(path, 0) < FLOORS[target]
    ]


def imports_run_in_no_circle(sources: Sources) -> list[str]:
    graph = {path: {target for _, target in imported_files(path, source)} for path, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def models_never_import_utils(sources: Sources) -> list[str]:
    return [
        f"{path}:{line}: imports {name}"
        for path, source in sources.items()
        if path.startswith("models/")
        for line, name in imported_names(path, source)
        if name.split(".")[0] == "utils"
    ]


def nobody_imports_a_script(sources: Sources) -> list[str]:
    return [
        f"{path}:{line}: imports {target}"
        for path, source in sources.items()
        for line, target in imported_files(path, source)
        if "/" not in target
    ]


def cfg_needs_only_the_standard_library(sources: Sources) -> list[str]:
    path = "models/cfg.py"
    return [
        f"{path}:{line}: imports {name}"
        for line, name in imported_names(path, sources.get(path, ""))
        if name.split(".")[0] not in sys.stdlib_module_names
    ]


def no_star_imports(sources: Sources) -> list[str]:
    return [
        f"{path}:{line}: imports {name}"
        for path, source in sources.items()
        for line, name in imported_names(path, source)
        if name.endswith("*")
    ]


def importing_only_defines_names(sources: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for path, source in sources.items()
        for node in working_statements(ast.parse(source, path).body)
    ]


def working_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class body that do more than define names."""
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Pass():
                pass
            case ast.ClassDef():
                yield from working_statements(node.body)
            case ast.Assign(targets=targets) if all(map(is_plain_name, targets)):
                pass
            case ast.AnnAssign(target=ast.Name()):
                pass
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__")), orelse=[]):
                pass
            case _:
                yield node


def is_plain_name(target: ast.expr) -> bool:
    """Tell `a = …` and `a, b = …` from `a.b = …` and `a[b] = …`, which change something that exists."""
    match target:
        case ast.Name():
            return True
        case ast.Tuple(elts=elements):
            return all(map(is_plain_name, elements))
        case _:
            return False


def models_have_no_commands(sources: Sources) -> list[str]:
    named = [path for path in sources if path.startswith("models/") and path.endswith("__main__.py")]
    guarded = [
        f"{path}:{node.lineno}"
        for path, source in sources.items()
        if path.startswith("models/")
        for node in ast.walk(ast.parse(source, path))
        if isinstance(node, ast.Constant) and node.value == "__main__"
    ]
    return [f"{place}: a command" for place in named + guarded]


RULES = {
    rule.__name__: rule
    for rule in (
        every_file_has_a_floor,
        imports_never_go_up,
        imports_run_in_no_circle,
        models_never_import_utils,
        nobody_imports_a_script,
        cfg_needs_only_the_standard_library,
        no_star_imports,
        importing_only_defines_names,
        models_have_no_commands,
    )
}

# (rule, {path: source}, what it must say)
BREAKS = [
    ("every_file_has_a_floor", dict.fromkeys([*FLOORS, "utils/new.py"], ""), ["utils/new.py: not in the floor map"]),
    (
        "every_file_has_a_floor",
        dict.fromkeys(set(FLOORS) - {"utils/log.py"}, ""),
        ["utils/log.py: in the floor map, but there is no such file"],
    ),
    (
        "imports_never_go_up",
        {"models/cfg.py": "import math\nfrom models.layers import SECTIONS"},
        ["models/cfg.py:2: F0 imports models/layers.py of F2"],
    ),
    (
        "imports_never_go_up",
        {"models/yolo.py": "from models import load_cfg"},
        ["models/yolo.py:1: F1 imports models/__init__.py of F3"],
    ),
    (
        "imports_never_go_up",
        {"models/yolo.py": "from . import cfg, layers"},
        ["models/yolo.py:1: F1 imports models/layers.py of F2"],
    ),
    (
        "imports_never_go_up",
        {"utils/log.py": "def f():\n    import utils.plots"},
        ["utils/log.py:2: F4 imports utils/plots.py of F6"],
    ),
    (
        "imports_run_in_no_circle",
        {
            "models/weights.py": "from .darknet import Darknet",
            "models/darknet.py": "def f():\n    from models.weights import load_model",
        },
        ["models/weights.py imports models/darknet.py imports models/weights.py"],
    ),
    (
        "imports_run_in_no_circle",
        {"utils/log.py": "import utils.log"},
        ["utils/log.py imports utils/log.py"],
    ),
    ("models_never_import_utils", {"models/yolo.py": "import utils"}, ["models/yolo.py:1: imports utils"]),
    (
        "models_never_import_utils",
        {"models/yolo.py": "from utils.boxes import iou"},
        ["models/yolo.py:1: imports utils.boxes.iou"],
    ),
    ("nobody_imports_a_script", {"train.py": "import test"}, ["train.py:1: imports test.py"]),
    ("nobody_imports_a_script", {"test.py": "from detect import main"}, ["test.py:1: imports detect.py"]),
    ("cfg_needs_only_the_standard_library", {"models/cfg.py": "import numpy"}, ["models/cfg.py:1: imports numpy"]),
    (
        "cfg_needs_only_the_standard_library",
        {"models/cfg.py": "from . import yolo"},
        ["models/cfg.py:1: imports models.yolo"],
    ),
    ("no_star_imports", {"utils/log.py": "from math import *"}, ["utils/log.py:1: imports math.*"]),
    ("importing_only_defines_names", {"utils/log.py": "print('hello')"}, ["utils/log.py:1: print('hello')"]),
    ("importing_only_defines_names", {"utils/log.py": "X = 1\nX += 1"}, ["utils/log.py:2: X += 1"]),
    ("importing_only_defines_names", {"utils/log.py": "for i in []:\n    pass"}, ["utils/log.py:1: for i in []:"]),
    ("importing_only_defines_names", {"utils/log.py": "if DEBUG:\n    X = 1"}, ["utils/log.py:1: if DEBUG:"]),
    (
        "importing_only_defines_names",
        {"utils/device.py": "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '3'"},
        ["utils/device.py:2: os.environ['CUDA_VISIBLE_DEVICES'] = '3'"],
    ),
    (
        "importing_only_defines_names",
        {"utils/plots.py": "class A:\n    cv2.x, b = 1, 2"},
        ["utils/plots.py:2: cv2.x, b = (1, 2)"],
    ),
    (
        "models_have_no_commands",
        {"models/cfg.py": "if __name__ == '__main__':\n    main()"},
        ["models/cfg.py:1: a command"],
    ),
    ("models_have_no_commands", {"models/__main__.py": "main()"}, ["models/__main__.py: a command"]),
]

# What no rule may object to (but for the first: these are not all the files).
LAWFUL = {
    "models/cfg.py": "from __future__ import annotations\nimport re\nfrom os import path",
    "models/layers.py": '"""Doc."""\nimport torch\nfrom models.cfg import Section\nfrom . import yolo\nSECTIONS = {}',
    "models/__init__.py": "from .cfg import load_cfg\nfrom models.darknet import Darknet\n__all__ = ['load_cfg']",
    "utils/scenes.py": "A: int = 1\nB, C = 2, 3\n\ndef main(): ...\n\nif __name__ == '__main__':\n    main()",
    "utils/boxes.py": 'class Box:\n    """Doc."""\n    x: float\n    N = 4\n\nclass BoxError(Exception):\n    pass',
    "train.py": "from models import load_cfg\nfrom utils.engine import train_one_epoch\nimport utils.cli",
}


def repository() -> Sources:
    """Read every Python file of the root, models/ and utils/."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py"), *(ROOT / "utils").rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps_the_rule(rule: str) -> None:
    assert RULES[rule](repository()) == []


@pytest.mark.parametrize(("rule", "sources", "complaints"), BREAKS)
def test_the_rule_can_fail(rule: str, sources: Sources, complaints: list[str]) -> None:
    assert RULES[rule](sources) == complaints


@pytest.mark.parametrize("rule", list(RULES)[1:])
def test_the_rule_lets_lawful_sources_pass(rule: str) -> None:
    assert RULES[rule](LAWFUL) == []


def test_every_rule_has_a_source_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(RULES)
