"""Integers on real data: speed of INT8 beside FP32, and what post-training quantisation and DoReFa cost in mAP.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.int8

GhostNet-YOLOv3 and slim-m of the zoo (benchmarks/zoo.py) on BCCD: quantised after training, and trained on with DoReFa
at 8, 4 and 2 bits by the short protocol (protocol.py) from the float weights; then the speed of GhostNet-YOLOv3 and of
its pruned form (benchmarks/slimming.py) at 416x416. Writes benchmarks/int8.md and .json; its six trainings are about a
third of those of benchmarks/zoo.py. What is done stays in runs/int8, and a second call goes on from there. `--only
light` does slim-m alone, `--only speed` the speed, and neither writes a report; `--rounds` and `--calibrate` make a
quick check of it.
"""

import argparse
import importlib.util
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bccd import write_bccd
from benchmarks.protocol import PROTOCOLS, run_all, run_protocol
from benchmarks.report import make_table, write_report
from benchmarks.zoo import LIGHT, NETWORKS
from utils.benchmark import Entry, make_entries, measure
from utils.cli import positive
from utils.compose import compose, make_compose_parser
from utils.device import CPU
from utils.evaluate import Settings, evaluate
from utils.labels import check_labels
from utils.lists import load_data
from utils.runtime import OnnxNetwork

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.int8"
WORK = Path("runs/int8")
GHOST, PRUNED = "ghostnet-yolov3", Path("runs/slimming/ghostnet-yolov3-tuned/last.pt")
BITS = (8, 4, 2)  # of weights and activations
EPOCHS = {LIGHT: 30, GHOST: 10}
SIDE, ROUNDS = 416, 40  # of the comparison of speed
BRIGHTNESSES = [(1000 - i) / 1000 for i in range(20)]  # of pictures in the comparison with the simulated form
MAX_DROP = 0.003  # of mAP@.5 by the form that the summary is of


def main(argv: Sequence[str] | None = None) -> None:
    """Quantise, train, export, test, time, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("light", "speed"), help="one part, without a report")
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument("--calibrate", type=positive, default=292)
    args = parser.parse_args(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    names = {"light": [LIGHT], "speed": [], None: [GHOST, LIGHT]}[args.only]
    train(names, data)
    rows = [row for name in names for row in compare_forms(name, data, args)]
    speeds = [] if args.only == "light" else compare_speed(data, args)
    if args.only:
        print(make_table(rows + speeds))
        return
    write(rows, speeds)


def train(names: Sequence[str], data: Path) -> None:
    """Train networks on with quantised convolutions, unless that is done, one training a core."""
    tasks = {}
    for name, bits in itertools.product(names, BITS):
        cfg, flags = write_quantised(name, bits, data), ["--weights", f"runs/zoo/{name}/last.pt"]
        run = f"int8/{name}-{bits}"
        tasks[run] = partial(run_protocol, run, "short", cfg, data, flags=flags, epochs=EPOCHS[name])
    run_all(tasks)


def compare_forms(name: str, data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Give a row for every form of a network: mAP, size and latency at the size it was trained at."""
    weights = Path(f"runs/zoo/{name}/last.pt")
    files = {"float": export(weights, f"{name}-float"), "PTQ": quantise(weights, f"{name}-ptq", data, args)}
    for bits in BITS:
        trained = Path(f"runs/int8/{name}-{bits}/last.pt")
        files[f"DoReFa {bits}/{bits}"] = quantise(trained, f"{name}-{bits}", data, args)
    entries = make_entries([str(file) for file in files.values()], ["onnx"], side=None, batch=1)
    timed = measure(entries, args.rounds)
    rows = []
    for (form, file), speed in zip(files.items(), timed, strict=True):
        figures = test(file, data)
        rows.append(row(name, form, speed) | {"mAP@.5": figures["map50"], "mAP@.5:.95": figures["map50_95"]})
        rows[-1]["MB"] = file.stat().st_size / 1e6
    for bits, each in zip(BITS, rows[2:], strict=True):
        simulated = export(Path(f"runs/int8/{name}-{bits}/last.pt"), f"{name}-{bits}-simulated")
        each["to simulated"] = differ(simulated, files[each["form"]], data)
    return rows


def differ(simulated: Path, integers: Path, data: Path) -> str:
    """Say by how much mAP@.5 of a network in integers differs from its simulated form: mean, and its standard error.

    One rounding error decides over the levels of all layers behind it, so that a single comparison says little.
    """
    spec = load_data(data)
    labelled = check_labels(spec.valid, len(spec.names))
    networks = Dimmed(simulated), Dimmed(integers)

    def map50(network: Dimmed, brightness: float) -> float:
        network.brightness = brightness
        return evaluate(network, labelled, spec.names, Settings(network.size), device=CPU)[0].map50

    figures = integers.with_suffix(".difference.json")
    is_done = figures.exists() and figures.stat().st_mtime > integers.stat().st_mtime
    pairs = json.loads(figures.read_text()) if is_done else {}
    for brightness in BRIGHTNESSES:
        if str(brightness) not in pairs:
            pairs[str(brightness)] = [map50(network, brightness) for network in networks]
            figures.write_text(json.dumps(pairs))
    apart = [theirs - ours for ours, theirs in map(pairs.__getitem__, map(str, BRIGHTNESSES))]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    return f"{statistics.mean(apart):+.4f} ± {error:.4f}"


class Dimmed(OnnxNetwork):
    """An .onnx that sees pictures darker."""

    brightness = 1.0

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return super().__call__(x * self.brightness)


def compare_speed(data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time GhostNet-YOLOv3 and its pruned form, FP32 and INT8, all in turn."""
    weights = Path(f"runs/zoo/{GHOST}/last.pt")
    runtimes = ["onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    trained = Path(f"runs/int8/{GHOST}-8/last.pt")
    dorefa = {"DoReFa 8/8": quantise(trained, f"{GHOST}-8", data, args)} if trained.exists() else {}
    plan: list[tuple[str, str, Path, list[str]]] = [
        (GHOST, "float", weights, ["eager", "fused", *runtimes]),
        (GHOST, "PTQ", quantise(weights, f"{GHOST}-ptq", data, args), runtimes),
        *((GHOST, form, file, runtimes) for form, file in dorefa.items()),
        ("pruned", "float", PRUNED, ["eager", *runtimes]),
        ("pruned", "PTQ", quantise(PRUNED, "pruned-ptq", data, args), runtimes),
    ]
    named: list[tuple[str, str]] = []
    entries: list[Entry] = []
    for network, form, file, backends in plan:
        entries += make_entries([str(file)], backends, side=SIDE, batch=1)
        named += [(network, form)] * len(backends)
    return [row(*name, speed) for name, speed in zip(named, measure(entries, args.rounds), strict=True)]


def row(network: str, form: str, speed: dict[str, Any]) -> dict[str, Any]:
    """Give what all rows have in common, from a row of utils.benchmark."""
    described = {"network": network, "form": form, "backend": speed["backend"], "side": speed["size"][0]}
    return described | {"ms": speed["median_ms"], "± ms": speed["spread_ms"]}


def write(rows: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> None:
    """Write the report."""
    ms = {(each["network"], each["form"], each["backend"]): each["ms"] for each in speeds}
    forms = {each["form"]: each for each in rows if each["network"] == GHOST}
    plain = forms["float"]
    fit = [form for form in ("PTQ", "DoReFa 8/8") if plain["mAP@.5"] - forms[form]["mAP@.5"] <= MAX_DROP]
    best = min(fit or ["PTQ"], key=lambda form: ms[GHOST, form, "onnx"])
    fastest = min(("PTQ", "DoReFa 8/8"), key=lambda form: ms[GHOST, form, "onnx"])
    summary = {
        "fastest": fastest,
        "speedup_vs_ort_fp32": ms[GHOST, "float", "onnx"] / ms[GHOST, fastest, "onnx"],
        "speedup_vs_eager": ms[GHOST, "float", "eager"] / ms[GHOST, fastest, "onnx"],
        "pruned_speedup_vs_eager": ms[GHOST, "float", "eager"] / ms["pruned", "PTQ", "onnx"],
        "form": best,  # of what follows
        "size_ratio": forms[best]["MB"] / plain["MB"],
        "map50_drop": plain["mAP@.5"] - forms[best]["mAP@.5"],
    }
    epochs = ", ".join(f"{name} {count}" for name, count in EPOCHS.items())
    side = PROTOCOLS["short"].side
    text = f"""PTQ: python -m utils.export --int8 on the trained network. DoReFa b/b: its convolutions but the first
and those before heads as [quan_convolutional] with w_bits=b and a_bits=b (a_range=3 at 2 bits, else 10), trained on
from the float weights by the short protocol (epochs: {epochs}; one seed), and exported as integers; the float rows had
no further training. mAP is the .onnx file's, on 72 test pictures of BCCD at {side}x{side}; its standard error is about
0.017, of a difference 0.003. "to simulated" is the mAP@.5 of the integers less that of the network as it was trained
(map_bits=8), mean and standard error over {len(BRIGHTNESSES)} tests on the same pictures, darker by up to
{1 - BRIGHTNESSES[-1]:.1%}: one form alone moves by as much from test to test, for rounding errors decide over whole
levels. Rows with mAP are timed at that size, a network in one run; those without at {SIDE}x{SIDE}, all in one run.
Batch 1, medians and quartile spreads of timings in turn. pruned: {GHOST} of benchmarks/slimming.md, 5.9 M
parameters."""
    measured = ("mAP@.5", "mAP@.5:.95", "to simulated", "MB", "ms", "± ms")
    keys = ("network", "form", "backend", "side", *measured)
    ordered = [{key: each[key] for key in keys if key in each} for each in rows + speeds]
    write_report("int8", "Integers: speed and accuracy", text, COMMAND, ordered, summary)


def write_quantised(name: str, bits: int, data: Path) -> Path:
    """Compose a network of the zoo with quantised convolutions."""
    target = WORK / f"{name}-{bits}.cfg"
    flags = f"{NETWORKS[name]} --img-size {PROTOCOLS['short'].side} --quantize {bits} -o {target}"
    args = make_compose_parser().parse_args([*shlex.split(flags), "--data", str(data)])
    target.write_text(compose(args))
    return target


def export(weights: Path, name: str, *flags: object) -> Path:
    """Export weights as runs/int8/`name`.onnx, unless that is done since they were written."""
    file = WORK / f"{name}.onnx"
    if not file.exists() or file.stat().st_mtime < weights.stat().st_mtime:
        run("utils.export", "--weights", weights, "--output", file, *flags)
    return file


def quantise(weights: Path, name: str, data: Path, args: argparse.Namespace) -> Path:
    """Export weights as integers."""
    return export(weights, f"{name}-int8-{args.calibrate}", "--int8", "--data", data, "--calibrate", args.calibrate)


def test(file: Path, data: Path) -> dict[str, Any]:
    """Give the figures of test.py on a network."""
    figures = file.with_suffix(".json")
    run("test", "--weights", file, "--data", data, "--workers", 0, "--noplots", "--device", "cpu", "--json", figures)
    return json.loads(figures.read_text())


def run(module: str, *words: object) -> None:
    command = ["test.py"] if module == "test" else ["-m", module]
    subprocess.run([sys.executable, *command, *map(str, words)], check=True)


if __name__ == "__main__":
    main()
