"""Networks of the zoo from scratch on BCCD: what each costs and what it reaches.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.zoo

Composes every network for BCCD with anchors from its boxes, trains it on the short protocol (protocol.py) and the
recommended one on the full protocol too, times their fused forward passes in turn, and writes benchmarks/zoo.md and
.json. Takes about an hour and a half on 2 cores; trainings that are done stay in runs/zoo, and a second call goes on
from there.
"""

import shlex
from functools import partial
from pathlib import Path

from benchmarks.bccd import write_bccd
from benchmarks.protocol import PROTOCOLS, run_all, run_protocol
from benchmarks.report import write_report
from benchmarks.speed import ROUNDS
from models import Darknet, load_cfg
from models.darknet import count_parameters
from utils.compose import compose, make_compose_parser
from utils.timing import paired_ms

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.zoo"
WORK = Path("runs/zoo")
LIGHT = "slim-m"  # the network that we recommend
NETWORKS = {
    "yolov3-tiny": "--backbone darknet-tiny --head yolov3-tiny",
    "yolov3-tiny + SE": "--backbone darknet-tiny --head yolov3-tiny --attention se",
    "yolov3-tiny + CBAM": "--backbone darknet-tiny --head yolov3-tiny --attention cbam",
    "yolov3-tiny + ECA": "--backbone darknet-tiny --head yolov3-tiny --attention eca",
    "yolov4-tiny": "--backbone cspdarknet53-tiny --head yolov4-tiny",
    "shufflenetv2-1x + ECA": "--backbone shufflenetv2-1x --head yolov3-tiny --attention eca",
    "mobilenetv3-small, tiny head": "--backbone mobilenetv3-small --head yolov3-tiny",
    "ghostnet-yolov3": "--backbone ghostnet --head yolov3",
    "slim-s": "--backbone slim-s --head pan-lite",
    "slim-m": "--backbone slim-m --head pan-lite",
}


def write_cfg(name: str, protocol: str, data: Path, *, folder: Path = WORK) -> Path:
    """Compose a network at the protocol's size in `folder`."""
    side = PROTOCOLS[protocol].side
    target = folder / f"{slug(name)}-{side}.cfg"
    flags = [*shlex.split(NETWORKS[name]), "--data", str(data), "--img-size", str(side), "-o", str(target)]
    target.write_text(compose(make_compose_parser().parse_args(flags)))
    return target


def slug(name: str) -> str:
    """Make a file's name of a network's."""
    return name.replace(" + ", "-").replace(", ", "-").replace(" ", "-").lower()


def main() -> None:
    """Compose, train, time, report."""
    WORK.mkdir(parents=True, exist_ok=True)
    data = write_bccd(Path("runs/bccd"))
    cfgs = {name: write_cfg(name, "short", data) for name in NETWORKS}
    full = write_cfg(LIGHT, "full", data)
    tasks = {"full": partial(run_protocol, f"zoo/{LIGHT}-full", "full", full, data)}
    tasks |= {name: partial(run_protocol, f"zoo/{slug(name)}", "short", cfg, data) for name, cfg in cfgs.items()}
    scores = run_all(tasks)
    models = {name: Darknet(load_cfg(cfg)) for name, cfg in cfgs.items()}
    times = paired_ms(list(models.values()), (PROTOCOLS["short"].side,) * 2, ROUNDS)
    rows = [
        {
            "network": name,
            "compose": NETWORKS[name],
            "parameters": count_parameters(model),
            "BFLOPs": bflops(model),
            "mAP@.5": scores[name]["map50"],
            "mAP@.5:.95": scores[name]["map50_95"],
            "ms": timing.ms,
        }
        for (name, model), timing in zip(models.items(), times, strict=True)
    ]
    light = Darknet(load_cfg(full))
    summary = {
        "light_params": count_parameters(light),
        "light_bflops_320": bflops(light),
        "light_map50": scores["full"]["map50"],
        "light_map50_95": scores["full"]["map50_95"],
    }
    text = (
        "Short protocol: from scratch on the 292 training pictures of BCCD, 256x256, 30 epochs, batch 16, one seed,"
        " train.py's recipe with class_gain=2; the moving average after the last epoch, judged by pycocotools on the"
        " 72 test pictures. The standard error of mAP"
        " on so few is about 0.015: small differences mean nothing. BFLOPs at 256; ms: the fused forward pass in"
        " channels_last, batch 1, at 256, medians of all networks called in turn.\n\n"
        f"`{LIGHT}`, which we recommend, on the full protocol (320x320, 60 epochs, one seed):"
        f" {summary['light_params']:,} parameters, {summary['light_bflops_320']:.2f} BFLOPs at 320,"
        f" mAP@.5 {summary['light_map50']:.3f}, mAP@.5:.95 {summary['light_map50_95']:.3f}."
    )
    write_report("zoo", "The zoo on BCCD", text, COMMAND, rows, summary)


def bflops(model: Darknet) -> float:
    """Give the billions of operations of a forward pass at the cfg's own size, a multiply-add as two."""
    return sum(layer.flops for layer in model.layers) / 1e9


if __name__ == "__main__":
    main()
