"""Detect objects in images with an exported model. Needs NumPy, OpenCV and ONNX Runtime, and nothing else.

    pip install numpy opencv-python onnxruntime
    python run.py IMAGE_OR_FOLDER … --csv boxes.csv --json boxes.json --draw pictures

Without --csv, --json and --draw the boxes are printed as CSV. Boxes are xmin, ymin, xmax, ymax in pixels of
the image. A file that can't be read is reported and skipped; the exit status is then 1. In Python:

    from run import load, read_image

    detect = load("model.onnx")
    ((boxes, scores, classes),) = detect([read_image("field.png")])

The model's metadata say how its images are prepared: resizing is done here, all else is inside the model.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax", "label", "score")
# Colours that colour-blind people can tell apart (Okabe and Ito), in BGR order.
COLOURS = ((0, 159, 230), (233, 180, 86), (115, 158, 0), (66, 228, 240), (178, 114, 0), (0, 94, 213))


class Detections(NamedTuple):
    """The objects of one image, best first."""

    boxes: np.ndarray  # (D, 4) float32, XYXY in pixels of the image
    scores: np.ndarray  # (D,) float32
    classes: np.ndarray  # (D,) int64


class Detector:
    """A model and its metadata.

    Attributes:
        metadata: key -> value; see docs/export.md of focal_d2.
        classes: names.
        threshold: the lowest score that is returned.
    """

    def __init__(self, model: Callable[[np.ndarray], Sequence[np.ndarray]], metadata: dict[str, Any]) -> None:
        """Take a function: images (N, H, W, channels) uint8 -> boxes, scores, classes, numbers of boxes."""
        self.model, self.metadata = model, metadata
        self.classes: list[str] = metadata["classes"]
        self.threshold: float = metadata["threshold"]

    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect objects in images (H, W, 3) uint8 BGR. Those of equal size are computed together."""
        prepared = [self.prepare(image) for image in images]
        results: list[Any] = [None] * len(images)
        for shape in dict.fromkeys(x.shape for x in prepared):
            members = [i for i, x in enumerate(prepared) if x.shape == shape]
            outputs = self.model(np.stack([prepared[i] for i in members]))
            for i, boxes, scores, labels, count in zip(members, *outputs, strict=True):
                results[i] = self._finish(
                    boxes[:count], scores[:count], labels[:count], shape, images[i].shape
                )
        return results

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return the model's input, (H', W', channels), of an image (H, W, 3) BGR."""
        image = to_format(image, self.metadata["image_format"])
        height, width = self._size(*image.shape[:2])
        if (height, width) == image.shape[:2]:
            return np.ascontiguousarray(image)
        if self.metadata["resize"] == "opencv":
            if height >= image.shape[0] and width >= image.shape[1]:
                return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            return resize(image, height, width, bits=15)
        return resize(image, height, width, bits=None)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size after resizing: the shorter side decides, unless the longer one is too long."""
        wanted, most = self.metadata["min_size"], self.metadata["max_size"]
        if not wanted:
            return height, width
        scale = wanted / min(height, width)
        sides = (float(wanted), scale * width) if height < width else (scale * height, float(wanted))
        if max(sides) > most:
            scale = most / max(sides)
            sides = (sides[0] * scale, sides[1] * scale)
        return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))

    def _finish(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        shape: tuple[int, ...],
        wanted: tuple[int, ...],
    ) -> Detections:
        """Scale boxes (D, 4) to the image's own size, and drop what is below the threshold or has no area."""
        scale = np.array([wanted[1] / shape[1], wanted[0] / shape[0]] * 2, np.float32)
        boxes = np.clip(boxes * scale, 0, np.array([wanted[1], wanted[0]] * 2, np.float32))
        kept = (scores >= self.threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(boxes[kept], scores[kept], labels[kept])


def load(path: str | Path, *, threads: int = 0) -> Detector:
    """Load an ONNX file; `threads` 0: as many as ONNX Runtime chooses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    name = session.get_inputs()[0].name
    return Detector(
        lambda images: session.run(None, {name: images}), {key: json.loads(x) for key, x in texts.items()}
    )


def read_image(path: str | Path) -> np.ndarray:
    """Read an image: (H, W, 3) uint8 BGR, turned as EXIF says.

    Raises:
        ValueError: if it is not an image.
        OSError: if it can't be read.
    """
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise ValueError("not an image, or damaged")
    return image


def to_format(image: np.ndarray, image_format: str) -> np.ndarray:
    """Turn an image (H, W, 3) BGR into RGB or L (H, W, 1), as Pillow does."""
    if image_format == "L":
        blue, green, red = (image[..., i].astype(np.int32) for i in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]
    return image[..., ::-1] if image_format == "RGB" else image


def resize(image: np.ndarray, height: int, width: int, bits: int | None) -> np.ndarray:
    """Resize an image (H, W, C) uint8 bilinearly, and smooth it where it shrinks.

    Args:
        image: (H, W, C) uint8.
        height: of the result.
        width: of the result.
        bits: None: the same integers as Pillow's `resize(…, BILINEAR)`; 15: the same as PyTorch's
            `interpolate(mode="bilinear", antialias=True)`, whose weights have 15 bits.
    """
    for axis, size in ((1, width), (0, height)):
        if size != image.shape[axis]:
            image = _resize_axis(image, axis, size, bits)
    return np.ascontiguousarray(image)


def _resize_axis(image: np.ndarray, axis: int, size: int, bits: int | None) -> np.ndarray:
    length = image.shape[axis]
    scale = length / size
    support = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    last = np.minimum((centre + support + 0.5).astype(int), length)
    place = first[:, None] + np.arange((last - first).max())  # (size, taps)
    weights = np.maximum(1 - np.abs((place - centre[:, None] + 0.5) / support), 0)
    weights[place >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    precision = 22
    if bits is not None:
        precision = 0
        while precision < 22 and int(0.5 + weights.max() * 2 ** (precision + 1)) < 2**bits:
            precision += 1
    fixed = (weights * 2**precision + 0.5).astype(np.int32)
    shape = [1, 1, 1]
    shape[axis] = size
    total: Any = np.int32(1 << (precision - 1))
    for tap in range(place.shape[1]):
        pixels = image.take(np.minimum(place[:, tap], length - 1), axis).astype(np.int32)
        total = total + pixels * fixed[:, tap].reshape(shape)
    return np.clip(total >> precision, 0, 255).astype(np.uint8)


def draw(image: np.ndarray, detections: Detections, classes: Sequence[str]) -> np.ndarray:
    """Return a copy of an image (H, W, 3) BGR with the boxes, their classes and scores."""
    canvas = np.ascontiguousarray(image).copy()
    side = min(image.shape[:2])
    line, size = max(1, round(side / 400)), max(0.35, side / 1600)
    for box, score, label in zip(*detections, strict=True):
        x0, y0, x1, y1 = (int(x) for x in np.rint(box))
        colour = COLOURS[int(label) % len(COLOURS)]
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, line, cv2.LINE_AA)
        text = f"{classes[int(label)]} {score:.2f}"
        place = (x0, max(y0 - 2 * line, round(25 * size)))
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 3 * line, cv2.LINE_AA)
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, line, cv2.LINE_AA)
    return canvas


def list_images(inputs: Sequence[Path]) -> dict[Path, Path]:
    """Return image file -> its path in an output folder; folders are searched with their subfolders."""
    files = {}
    for source in inputs:
        if not source.is_dir():
            files[source] = Path(source.name)
            continue
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                files[path] = path.relative_to(source)
    return files


def detect_files(
    detect: Detector, files: Sequence[Path], size: int, failed: list[Path]
) -> Iterator[tuple[Path, np.ndarray, Detections]]:
    """Yield each file, its image and what is detected, `size` files together.

    Files that can't be read are reported, and added to `failed`.
    """
    for start in range(0, len(files), size):
        images = {}
        for path in files[start : start + size]:
            try:
                images[path] = read_image(path)
            except (OSError, ValueError, cv2.error) as error:
                print(f"{path}: {error}", file=sys.stderr)
                failed.append(path)
        yield from zip(images, images.values(), detect(list(images.values())), strict=True)


def as_record(
    path: Path, image: np.ndarray, detections: Detections, classes: Sequence[str]
) -> dict[str, Any]:
    """Return the entry of an image in the JSON file."""
    return {
        "image": str(path),
        "height": image.shape[0],
        "width": image.shape[1],
        "boxes": detections.boxes.astype(float).tolist(),
        "scores": detections.scores.astype(float).tolist(),
        "labels": [classes[int(x)] for x in detections.classes],
    }


def write_row_maker(file: IO[str]) -> Callable[[Path, Detections, Sequence[str]], None]:
    """Write the head of a CSV file; return a function that writes an image's rows."""
    writer = csv.writer(file)
    writer.writerow(COLUMNS)

    def write(path: Path, detections: Detections, classes: Sequence[str]) -> None:
        for box, score, label in zip(*detections, strict=True):
            writer.writerow([path, *(str(x) for x in box), classes[int(label)], str(score)])

    return write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("inputs", nargs="+", type=Path, help="images, or folders with images")
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model.onnx"))
    parser.add_argument("--threshold", type=float, help="lowest score (default: the model's metadata)")
    parser.add_argument("--csv", type=Path, help="write the boxes to this file")
    parser.add_argument("--json", type=Path, help="write the boxes to this file")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write pictures with the boxes")
    parser.add_argument("--batch", type=int, default=1, help="images that are computed together (1)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all)")
    args = parser.parse_args(arguments)
    missing = [str(path) for path in (args.model, *args.inputs) if not path.exists()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be at least 1")
    detect = load(args.model, threads=args.threads)
    if args.threshold is not None:
        detect.threshold = args.threshold
    files = list_images(args.inputs)
    failed: list[Path] = []
    records = []
    with ExitStack() as stack:
        write = None
        if args.csv:
            write = write_row_maker(stack.enter_context(args.csv.open("w", newline="", encoding="utf-8")))
        elif not (args.json or args.draw):
            write = write_row_maker(sys.stdout)
        for path, image, found in detect_files(detect, list(files), args.batch, failed):
            if write:
                write(path, found, detect.classes)
            if args.draw:
                target = args.draw / files[path].parent / f"{files[path].name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(cv2.imencode(".png", draw(image, found, detect.classes))[1].tobytes())
            if args.json:
                records.append(as_record(path, image, found, detect.classes))
    if args.json:
        args.json.write_text(json.dumps(records), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
