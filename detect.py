"""Detect objects in images, videos, cameras and streams.

    python detect.py --weights weights/best.pt --source data/samples

Writes pictures and videos with boxes to output/, with --save-txt and --save-json the boxes too. A picture takes some
20 ms with YOLOv3-tiny at 416 on 2 cores.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import cli
from utils.augment import letterbox, stretch
from utils.boxes import non_maximum_suppression
from utils.datasets import to_input, to_tensor
from utils.device import select_device
from utils.log import DataError, log
from utils.network import Network
from utils.plots import draw_boxes
from utils.predict import predict
from utils.runtime import open_detector
from utils.sources import Frame, count_frames, list_sources, read_frames
from utils.writer import PictureWriter


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser(__doc__)
    cli.add_model_flags(parser)
    cli.add_runtime_flag(parser)
    cli.add_detection_flags(parser, conf_thres=0.3)
    parser.add_argument("--names", default="", help="file of class names (default: the .data file's or the .pt's)")
    parser.add_argument("--source", default="data/samples", help="file, folder, glob, camera number, URL or list")
    parser.add_argument("--output", default="output", help="folder of the results (default: %(default)s)")
    cli.add_device_flag(parser)
    parser.add_argument("--half", action="store_true", help="compute in fp16 (on a GPU)")
    parser.add_argument("--classes", type=cli.natural, nargs="+", help="keep only these class numbers")
    parser.add_argument(
        "--agnostic-nms", action="store_true", help="boxes of different classes suppress each other too"
    )
    parser.add_argument("--max-det", type=cli.positive, default=300, help="detections per picture (default: 300)")
    parser.add_argument("--fourcc", default="mp4v", help="codec of written videos (default: %(default)s)")
    parser.add_argument("--view-img", action="store_true", help="show every picture in a window too")
    parser.add_argument("--save-txt", action="store_true", help="write class x y w h conf lines beside every picture")
    parser.add_argument("--save-json", action="store_true", help="write detections.json, COCO results with file names")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, detect, draw and write."""
    args = parse_args(argv)
    device = select_device(args.device)
    if args.half and device.type == "cpu":
        raise DataError("--half: needs a GPU")
    if args.view_img and sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        raise DataError("--view-img: needs a screen, and there is none here")
    model, names, *_ = open_detector(args, names=args.names)
    if args.classes and max(args.classes) >= len(names):
        raise DataError(f"--classes {max(args.classes)}: there are {len(names)} classes, 0 to {len(names) - 1}")
    size = cli.network_size(model, args.img_size)
    sources, broken = list_sources(args.source), []
    model = model.fuse().to(device=device, dtype=torch.half if args.half else torch.float)
    model = model.to(memory_format=torch.channels_last)
    writer = PictureWriter(Path(args.output), sources, fourcc=args.fourcc)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    seconds = 0.0
    frames = tqdm(read_frames(sources, broken), total=count_frames(sources), desc="detecting", unit="img")
    try:
        for image_id, frame in enumerate(frames):
            start = time.perf_counter()
            found = detect(model, frame.picture, size, args, device)
            seconds += time.perf_counter() - start
            labels = found[:, 5].int().tolist()
            tags = [f"{names[label]} {score:.2f}" for label, score in zip(labels, found[:, 4].tolist(), strict=True)]
            drawn = draw_boxes(frame.picture, found[:, :4].numpy(), tags, labels)
            writer.write(frame, drawn)
            counts.update(["pictures", *(names[label] for label in labels)])
            if args.save_txt:
                writer.write_text(frame, yolo_lines(found.numpy(), frame.picture.shape))
            if args.save_json:
                rows += coco_rows(found, frame, image_id, names)
            if args.view_img and is_stopped(drawn, frame.source):
                break
    finally:  # a camera is ended by Ctrl-C: what was found until then stays
        writer.close()
        if args.save_json:
            (Path(args.output) / "detections.json").write_text(json.dumps(rows, indent=1) + "\n")
    if pictures := counts.pop("pictures", 0):
        found_text = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        log.info("%d pictures, %.1f ms each: %s", pictures, 1000 * seconds / pictures, found_text)
        log.info("results in %s", args.output)
    if broken:
        raise DataError("\n".join(broken))


@torch.inference_mode()
def detect(
    model: Network, picture: np.ndarray, size: tuple[int, int], args: argparse.Namespace, device: torch.device
) -> Tensor:
    """Detect on one RGB picture; returns [N, 6] on the CPU: xyxy_px of the picture, score, class."""
    fitted, fit = stretch(picture, size) if args.stretch else letterbox(picture, size)
    x = to_input(to_tensor(fitted, model.channels)[None], device)
    boxes, scores = predict(model, x.half() if args.half else x, is_augmented=args.augment)
    found = non_maximum_suppression(
        boxes[0],
        scores[0],
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        max_det=args.max_det,
        is_agnostic=args.agnostic_nms,
        classes=args.classes,
        diou_beta=model.diou_beta,
    )
    return torch.cat((fit.to_picture(found[:, :4]), found[:, 4:]), dim=1).float().cpu()


def is_stopped(picture: np.ndarray, title: str) -> bool:
    """Show an RGB picture in a window and tell whether the user has pressed q."""
    cv2.imshow(title, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(1) == ord("q")


def yolo_lines(found: np.ndarray, shape: tuple[int, ...]) -> str:
    """Write detections [N, 6] as `class x y w h conf` lines, xywh_n."""
    scale = np.array([shape[1], shape[0]])
    centres, sides = (found[:, :2] + found[:, 2:4]) / 2 / scale, (found[:, 2:4] - found[:, :2]) / scale
    return "".join(
        f"{int(row[5])} {x:.6f} {y:.6f} {w:.6f} {h:.6f} {row[4]:.6f}\n"
        for row, (x, y), (w, h) in zip(found, centres, sides, strict=True)
    )


def coco_rows(found: Tensor, frame: Frame, image_id: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Give detections [N, 6] as COCO results with the names of file and category."""
    return [
        {
            "image_id": image_id,
            "file_name": frame.source,
            "frame": frame.number,
            "category_id": int(label),
            "category": names[int(label)],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for x1, y1, x2, y2, score, label in found.tolist()
    ]


if __name__ == "__main__":
    cli.run(main)
