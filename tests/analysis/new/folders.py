"""Small folders of images and annotations of different kinds, as tools leave them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

Boxes = list[tuple[int, int, int, int, str]]  # left, top, width, height, class


def picture(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    sides: tuple[int, int],
    boxes: int,
    classes: list[str],
) -> tuple[np.ndarray, Boxes]:
    """Noise with bright rectangles."""
    pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    found: Boxes = []
    for k in range(boxes):
        w, h = rng.integers(sides[0], sides[1] + 1, 2).tolist()
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        label = k % len(classes)
        pixels[y : y + h, x : x + w, label % 3] = 250
        found.append((x, y, w, h, classes[label]))
    return pixels, found


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def yolo(folder: Path) -> Path:
    """A data.yaml with train and val; tiny objects."""
    rng, classes = np.random.default_rng(0), ["ant", "bee", "fly"]
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            pixels, boxes = picture(rng, 96, 96, sides=(6, 9), boxes=6, classes=classes)
            save(folder / f"images/{split}/{split}{chr(97 + i)}.png", pixels)
            lines = [
                f"{classes.index(c)} {(x + w / 2) / 96:.6f} {(y + h / 2) / 96:.6f} {w / 96:.6f} {h / 96:.6f}"
                for x, y, w, h, c in boxes
            ]
            target = folder / f"labels/{split}/{split}{chr(97 + i)}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [ant, bee, fly]\n")
    return folder


def voc(folder: Path) -> Path:
    """Annotations and JPEGImages, each with subfolders; no split; one large object in an image."""
    rng = np.random.default_rng(1)
    for i in range(10):
        name = f"{'north' if i % 2 else 'south'}/p{chr(97 + i)}"
        pixels, boxes = picture(rng, 120, 160, sides=(50, 90), boxes=1, classes=["car"])
        save(folder / f"JPEGImages/{name}.jpg", pixels)
        (x, y, w, h, label) = boxes[0]
        target = folder / f"Annotations/{name}.xml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            f"<annotation><filename>{Path(name).name}.jpg</filename><size><width>160</width>"
            f"<height>120</height></size><object><name>{label}</name><bndbox><xmin>{x + 1}</xmin>"
            f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object></annotation>"
        )
    return folder


def coco(folder: Path) -> Path:
    """train.json and test.json; images of different sizes with many boxes."""
    rng, classes = np.random.default_rng(2), ["cup", "left_hand"]
    for split, count in (("train", 8), ("test", 3)):
        content: dict[str, list[object]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k + 1, "name": x} for k, x in enumerate(classes)],
        }
        for i in range(count):
            height, width = (90, 120) if i % 2 else (150, 100)
            pixels, boxes = picture(rng, height, width, sides=(17, 24), boxes=12, classes=classes)
            name = f"{split}_{'abcdefgh'[i]}.png"
            save(folder / "photos" / name, pixels)
            content["images"].append({"id": i, "file_name": name, "height": height, "width": width})
            content["annotations"] += [
                {"image_id": i, "category_id": classes.index(c) + 1, "bbox": [x, y, w, h]}
                for x, y, w, h, c in boxes
            ]
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def csv_table(folder: Path) -> Path:
    """One table with DeepForest's columns, images without boxes, and a fixed size of 100 pixels."""
    rng, lines = np.random.default_rng(3), ["image_path,xmin,ymin,xmax,ymax,label"]
    for i in range(12):
        name = f"scene{chr(97 + i)}.png"
        pixels, boxes = picture(rng, 100, 100, sides=(20, 40), boxes=i % 3, classes=["3", "7"])
        save(folder / name, pixels)
        lines += [f"{name},{x},{y},{x + w},{y + h},{c}" for x, y, w, h, c in boxes]
        lines += [] if boxes else [f"{name},0,0,0,0,3"]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder


def tiles(folder: Path) -> Path:
    """Two pictures cut into overlapping tiles that are named by their place; labels beside the images."""
    rng, side, step = np.random.default_rng(4), 64, 48
    for picture_name in ("park", "wood"):
        pixels, boxes = picture(rng, 208, 208, sides=(16, 30), boxes=40, classes=["tree"])
        for y in range(0, 208 - side + 1, step):
            for x in range(0, 208 - side + 1, step):
                stem = folder / f"{picture_name}_{y}_{x}"
                save(stem.with_suffix(".png"), pixels[y : y + side, x : x + side])
                lines = []
                for left, top, w, h, _ in boxes:
                    x0, y0 = max(left - x, 0), max(top - y, 0)
                    x1, y1 = min(left + w - x, side), min(top + h - y, side)
                    if min(x1 - x0, y1 - y0) > 5:
                        row = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
                        lines.append(" ".join(["0", *(f"{value / side:.6f}" for value in row)]))
                stem.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("tree\n")
    return folder


KINDS = {"yolo": yolo, "voc": voc, "coco": coco, "csv": csv_table, "tiles": tiles}
