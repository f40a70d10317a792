"""Draw the picture of docs/distillation.md: what a teacher, and its student without and with it, find in one photo.

    OMP_WAIT_POLICY=PASSIVE python -m docs.draw_distillation

trains slim-m on drawn scenes, and cfg/demo.cfg a third as long, alone and with `distill.py`; then detects in a scene
that none of them has seen. Trainings that are done stay in runs/taught. `--photo` and `--weights` draw other networks
in a picture of your own instead.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.charts import save_figure
from utils.cli import make_parser, run
from utils.log import DataError
from utils.pictures import read_picture

WORK = Path("runs/taught")
SIDE, TEACHER_EPOCHS, STUDENT_EPOCHS = 256, 36, 12
PHOTO = Path("data/samples/picnic-among-the-leaves.jpg")


def main(argv: Sequence[str] | None = None) -> None:
    """Train where no weights are given, detect, draw."""
    parser = make_parser(__doc__)
    parser.add_argument("--photo", type=Path, default=PHOTO, help="picture to detect in (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, nargs=3, metavar=("TEACHER", "BEFORE", "AFTER"), help="networks trained elsewhere"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/distillation.jpg"))
    args = parser.parse_args(argv)
    for path in (args.photo, *(args.weights or ())):
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
    weights = args.weights or train_all()
    titles = ("teacher", "student before", "student after")
    draw(args.photo, dict(zip(titles, weights, strict=True)), args.output)
    print(f"wrote {args.output}")


def train_all() -> list[Path]:
    """Train teacher, student alone and student taught on drawn scenes, unless that is done, and give their weights."""
    WORK.mkdir(parents=True, exist_ok=True)
    data, teacher = WORK / "data/demo.data", WORK / "teacher.cfg"
    if not data.exists():
        call("-m", "utils.scenes", "--output", data.parent)
    if not teacher.exists():
        call("-m", "utils.compose", "--backbone slim-m --head pan-lite --img-size", SIDE, "--data", data, "-o", teacher)
    taught = train("train.py", "teacher", teacher, data, TEACHER_EPOCHS)
    alone = train("train.py", "alone", "cfg/demo.cfg", data, STUDENT_EPOCHS)
    return [taught, alone, train("distill.py", "taught", "cfg/demo.cfg", data, STUDENT_EPOCHS, "--t_weights", taught)]


def train(script: str, name: str, cfg: str | Path, data: Path, epochs: int, *flags: object) -> Path:
    """Train, unless that is done, and give the weights."""
    weights = Path("runs", WORK.name, name, "last.pt")
    if not weights.exists():
        shutil.rmtree(weights.parent, ignore_errors=True)  # what an interrupted call left
        length = f"--img-size {SIDE} --epochs {epochs} --notest --nosave --workers 0 --cache-images"
        call(script, "--cfg", cfg, "--data", data, length, "--name", f"{WORK.name}/{name}", *flags)
    return weights


def draw(photo: Path, networks: Mapping[str, Path], path: Path) -> None:
    """Detect in a photo with several networks and draw what they find side by side."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    for axes, (title, weights) in zip(figure.subplots(1, len(networks)), networks.items(), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            call("detect.py", "--weights", weights, "--source", photo, "--output", folder, "--device cpu")
            axes.imshow(read_picture(str(Path(folder, photo.name))))
        axes.set_title(title)
        axes.set_axis_off()
    save_figure(figure, path)


def call(*words: object) -> None:
    """Run one of our scripts; a text may hold several flags."""
    parts = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    if status := subprocess.run([sys.executable, *parts]).returncode:
        raise SystemExit(status)


if __name__ == "__main__":
    run(main)
