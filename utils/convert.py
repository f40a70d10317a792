"""Bring a published dataset into Darknet's form: linked images, labels, lists, a .names and a .data file.

    python -m utils.convert visdrone ~/VisDrone data/visdrone

prints what was dropped and why, and the train.py command. SRC is the dataset as its publisher packs it, DST by default
the folder that data/FORMAT.data names. Run again after a break it goes on; 118,000 pictures take minutes.
"""

import argparse
import contextlib
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from . import cli
from .annotations import OBJECT, Choice, Part, Record, Shape, Source, check_picture, to_fractions
from .annotations_bdd100k import read_bdd100k
from .annotations_coco import read_coco
from .annotations_hand import read_hand
from .annotations_visdrone import read_visdrone
from .annotations_voc import read_dior, read_voc
from .download import download
from .lists import label_path, load_data, load_names
from .log import DataError, log

READERS: dict[str, Callable[[Path, Choice], Source]] = {
    "visdrone": read_visdrone,
    "bdd100k": read_bdd100k,
    "dior": read_dior,
    "oxfordhand": read_hand,
    "coco": read_coco,
    "voc": read_voc,
}
OURS = Path(__file__).resolve().parent.parent / "data"
REPORTED = 20  # mistakes told in full
NO_AREA = "without an area in the picture"


@dataclass
class Writer:
    """Writes the converted dataset below `target`; files that are right already stay as they are."""

    target: Path
    names: tuple[str, ...]
    aliases: dict[str, str]
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    _origins: dict[Path, Path] = field(default_factory=dict)

    def write(self, part: Part) -> str:
        """Write the images, labels and ignore files of a part and give the text of its list.

        Raises DataError with the mistakes of all annotations and pictures, or at once where nothing can be written.
        """
        count = self.counts[part.name] = Counter()
        lines, mistakes = [], []
        own = {name.casefold(): index for index, name in enumerate(self.names)}
        classes = {other: own[name] for other, name in self.aliases.items() if name in own} | own
        for item in tqdm(part.items, desc=part.name, unit="img"):
            try:
                record = part.read(item)
                shape = check_picture(record)
                labels, ignored = self._lines(record, shape, classes, count)
                label = self._place(record)
            except DataError as error:
                mistakes.append(str(error))
                continue
            self._link(record.image, self.target / "images" / record.name)
            self.write_text(self.target / "labels" / label, labels)
            self._write_ignored(self.target / "ignore" / label, ignored)
            lines.append(f"images/{record.name}\n")
            count["images"] += 1
        if mistakes:
            more = [f"… and {len(mistakes) - REPORTED} more mistakes"] if len(mistakes) > REPORTED else []
            raise DataError("\n".join(mistakes[:REPORTED] + more))
        return "".join(lines)

    def write_text(self, path: Path, text: str) -> None:
        """Write a file whole or not at all. Raises DataError."""
        with _writing(path):
            if path.is_file():
                if path.read_bytes() == text.encode():
                    return
                self.notes["files of an earlier run, which said otherwise, were replaced"] += 1
            _put(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def _lines(self, record: Record, shape: Shape, classes: dict[str, int], count: Counter[str]) -> tuple[str, str]:
        labels, ignored = [], []
        dropped = Counter(record.dropped)
        if shape.orientation > 1:
            self.notes["pictures are turned by their EXIF data, and their boxes with them"] += 1
        for box in record.boxes:
            label = classes.get(box.label.strip().casefold()) if box.label else -1
            if label is None:
                raise DataError(f"{record.source}: {box.label!r} is no class (expected one of {', '.join(self.names)})")
            xywh_n = to_fractions(box, shape)
            if xywh_n is None:
                dropped[NO_AREA] += 1
            elif box.kind == OBJECT:
                labels.append(f"{label} {xywh_n}\n")
            else:
                ignored.append(f"{label} {xywh_n} {box.kind}\n")
        count.update({f"dropped: {reason}": number for reason, number in dropped.items()})
        count.update(boxes=len(labels), ignored=len(ignored))
        return "".join(labels), "".join(ignored)

    def _place(self, record: Record) -> Path:
        """Give the label file's place below labels/. Raises DataError where another picture has it, or no list can."""
        if record.name.splitlines() != [record.name.strip()]:
            raise DataError(f"{record.source}: {record.name!r} cannot stand in a list (rename the picture)")
        image = self.target / "images" / record.name
        label = label_path(str(image)).relative_to(self.target / "labels")
        other = self._origins.setdefault(label, record.image)
        if other != record.image:
            raise DataError(f"{record.image}: and {other} would share the label file {label} (rename one)")
        return label

    def _link(self, image: Path, place: Path) -> None:
        image = image.resolve()
        with _writing(place):
            if place.is_symlink() and os.readlink(place) == str(image):
                return
            if place.exists() and not place.is_symlink():
                if place.samefile(image) or place.stat().st_size == image.stat().st_size:
                    return  # a copy, or the image itself
                raise DataError(f"{place}: is another picture than {image} (remove it, or give another DST)")
            try:
                _put(place, lambda partial: partial.symlink_to(image))
            except OSError:
                _put(place, lambda partial: shutil.copyfile(image, partial))
                self.notes["images were copied, as no links can be made here"] += 1

    def _write_ignored(self, path: Path, text: str) -> None:
        if text:
            self.write_text(path, text)
        else:
            with _writing(path):
                path.unlink(missing_ok=True)


def convert(
    source: Source, target: Path, *, name: str, names: tuple[str, ...], max_det: int = 100
) -> tuple[Path, Writer]:
    """Write the dataset below `target` with its lists, NAME.names and NAME.data, which comes last. Raises DataError."""
    if len({label.casefold() for label in names}) < len(names):
        raise DataError(f"classes {', '.join(names)}: two differ in case only (--names FILE gives one of them)")
    writer = Writer(target, names, source.aliases or {})
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
    lists = {part.name: writer.write(part) for part in source.parts}
    for part, text in lists.items():
        writer.write_text(target / f"{part}.txt", text)
    writer.write_text(target / f"{name}.names", "".join(f"{label}\n" for label in names))
    text = f"classes={len(names)}\n" + "".join(f"{part}={part}.txt\n" for part in lists) + f"names={name}.names\n"
    data = target / f"{name}.data"
    writer.write_text(data, text + (f"max_det={max_det}\n" if max_det != 100 else ""))
    return data, writer


def report(writer: Writer) -> str:
    """Lay out what was written and dropped as a table, a column a part."""
    parts = list(writer.counts)
    reasons = sorted({key for count in writer.counts.values() for key in count if key.startswith("dropped")})
    keys = ("images", "boxes", "ignored", *reasons)
    rows = [("", *parts), *((key, *(f"{writer.counts[part][key]:,}" for part in parts)) for key in keys)]
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    return "\n".join([*lines, *(f"{number:,} {note}" for note, number in writer.notes.items())])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("format", choices=READERS, help="whose layout it is")
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the original dataset")
    parser.add_argument("target", metavar="DST", type=Path, nargs="?", help="folder to write (default: data/FORMAT)")
    parser.add_argument("--train", default="", help="split or file to train on (default: as the publisher splits)")
    parser.add_argument("--valid", default="", help="split or file to test on (default: as the publisher splits)")
    parser.add_argument("--names", default="", help="file of class names that fixes their order (default: ours)")
    parser.add_argument("--name", default="", help="stem of the .data and .names files (default: DST's)")
    parser.add_argument(
        "--download", action="store_true", help="fetch the dataset into SRC first: coco, voc, oxfordhand"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Download where asked to, convert, report."""
    args = parse_args(argv)
    target = args.target or Path("data") / args.format
    if args.source.resolve() in (target.resolve(), *target.resolve().parents):
        raise DataError(f"{target}: lies in {args.source}, which stays as it is (give a DST outside)")
    if args.download:
        download(args.format, args.source)
    if not args.source.is_dir():
        raise DataError(f"{args.source}: no such folder (expected the original dataset; docs/datasets.md says where)")
    source = READERS[args.format](args.source, Choice(args.train, args.valid))
    names = load_names(args.names) if args.names else _choose_names(source, args.format)
    max_det = load_data(OURS / f"{args.format}.data").max_det
    data, writer = convert(source, target, name=args.name or target.resolve().name, names=names, max_det=max_det)
    log.info(report(writer))
    known, cfg = str(_known_data(data, names)), f"{data.stem}.cfg"
    compose = "python -m utils.compose --backbone slim-m --head pan-lite --data".split()
    log.info(shlex.join([*compose, known, "-o", cfg]))
    log.info(shlex.join(["python", "train.py", "--data", known, "--cfg", cfg]))


def _choose_names(source: Source, kind: str) -> tuple[str, ...]:
    """Give our order of the classes where they are the published ones, else the dataset's own."""
    ours = load_names(OURS / f"{kind}.names")
    spelled = {(source.aliases or {}).get(name, name).casefold() for name in source.names}
    if not spelled or spelled == {name.casefold() for name in ours}:
        return ours
    log.info("classes, in this order: %s (--names FILE fixes another)", ", ".join(source.names))
    return source.names


def _known_data(data: Path, names: tuple[str, ...]) -> Path:
    """Give the .data file beside the folder with the same lists and classes, as data/visdrone.data, else its own."""
    beside = data.parent.parent / f"{data.parent.name}.data"
    if beside.is_file():
        spec = load_data(beside)
        if spec.names == names and spec.train and spec.train.resolve() == (data.parent / "train.txt").resolve():
            return beside
    return data


def _put(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file under another name and rename it, so that a break leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        make(partial)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror} (run again to go on from here)") from None


if __name__ == "__main__":
    cli.run(main)
