"""ultralytics' smallest model, from scratch. It runs as a program of its own (`yolo`); nothing is imported.

Settings: its defaults (batch 16, mosaic, flips, colours, optimizer "auto", moving average of the weights),
with images of 416 pixels, the multiple of 32 that holds a tile. It ends by its own option "time". There is no
validation during training, and the last weights are taken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml
from common import LIMIT, LOWEST_SCORE, annotations, parse, write_detections

SIZE = 416


def write_data(args: argparse.Namespace) -> Path:
    """Write the data as ultralytics reads them: links to the images, and a text file for each."""
    folder = args.output / "data"
    for split in {"train", "val", *args.splits}:
        content = annotations(args.data, split)
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for image in content["images"]:
            (folder / "images" / split / image["file_name"]).symlink_to(image["path"])
            lines = []
            for x in content["annotations"] if split in ("train", "val") else ():
                if x["image_id"] == image["id"]:
                    left, top, width, height = x["bbox"]
                    numbers = left + width / 2, top + height / 2, width, height
                    sides = (image["width"], image["height"]) * 2
                    shares = (a / b for a, b in zip(numbers, sides, strict=True))
                    lines.append(" ".join(["0", *(f"{share:.8f}" for share in shares)]))
            label = (folder / "labels" / split / image["file_name"]).with_suffix(".txt")
            label.write_text("\n".join(lines))
    path = folder / "data.yaml"
    content = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": ["tree"]}
    path.write_text(yaml.safe_dump(content))
    return path


def run(args: argparse.Namespace, mode: str, **options: object) -> None:
    folder = args.output.resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "YOLO_CONFIG_DIR": str(folder)}
    values = {"project": folder, "exist_ok": True, "device": "cpu", "imgsz": SIZE, **options}
    program = str(Path(sys.executable).parent / "yolo")
    command = [program, "detect", mode, *(f"{key}={value}" for key, value in values.items())]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    args = parse(__doc__)
    data = write_data(args)
    run(
        args,
        "train",
        name="train",
        data=data,
        model=args.model,
        pretrained=False,
        time=args.minutes / 60,
        batch=args.batch or 16,
        seed=args.seed,
        workers=1,
        val=False,
        plots=False,
    )
    weights = args.output / "train/weights/last.pt"
    for split in args.splits:
        limits = {"conf": LOWEST_SCORE, "max_det": LIMIT}
        texts = {"save": False, "save_txt": True, "save_conf": True}
        source = args.output / "data/images" / split
        run(args, "predict", name=split, model=weights, source=source, **limits, **texts)
    sizes = {
        image["path"]: (split, image["width"], image["height"])
        for split in args.splits
        for image in annotations(args.data, split)["images"]
    }

    def detect(path: str) -> list[tuple[list[float], float]]:
        split, width, height = sizes[path]
        text = args.output / split / "labels" / Path(path).with_suffix(".txt").name
        found = []
        for line in text.read_text().splitlines() if text.exists() else ():
            _, x, y, w, h, score = map(float, line.split())
            box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            found.append((box, score))
        return found

    write_detections(args, detect)


if __name__ == "__main__":
    main()
