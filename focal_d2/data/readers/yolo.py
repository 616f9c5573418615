"""YOLO: a text file an image, a line a box, everything relative to the image's size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from focal_d2.data.pixels import IMAGE_SUFFIXES
from focal_d2.data.readers.common import (
    Box,
    ImageFolder,
    Rows,
    class_names,
    list_files,
    listed,
    read_text,
    short,
)
from focal_d2.data.table import Table
from focal_d2.errors import UserError

# Annotation tools leave the class names beside the labels under this name.
_NAMES = "classes.txt"
# Where nobody named the classes, a larger number is a slip of a column.
_MOST_CLASSES = 10_000


def read_yolo(
    annotations: str,
    images: ImageFolder | str,
    classes: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
) -> Table:
    """Read a folder of YOLO label files.

    A line is "class x y width height", the centre and the size as shares of the image's width and height, or
    "class x1 y1 x2 y2 x3 y3 …", a polygon, of which the extent is taken. The image of a/b.jpg has its labels
    in a/b.txt; without such a file it has no boxes.

    An edge that lies within the text's rounding of a whole pixel is at that pixel, so that boxes of whole
    pixels come back exactly from six digits.

    Args:
        annotations: folder of the label files.
        images: folder of the images; those in folders below it are found, too.
        classes: K names; None: those of classes.txt in `annotations`, else numbers.
        chosen: names of images under `images`; None: all.

    Raises:
        UserError: naming the folder or file, if there is nothing to read.
    """
    images = ImageFolder.of(images)
    if classes is None and os.path.isfile(os.path.join(annotations, _NAMES)):
        classes = class_names(os.path.join(annotations, _NAMES))
    rows = Rows(images, classes, annotations)
    label_files = [x for x in list_files(annotations, (".txt",)) if os.path.basename(x) != _NAMES]
    labels = {os.path.splitext(name)[0]: name for name in label_files}
    there = list_files(images.root, IMAGE_SUFFIXES)
    names = there
    if chosen is not None:
        names = list(dict.fromkeys(_relative(name, images) for name in chosen))
    for name in names:
        label_file = labels.get(os.path.splitext(name)[0])
        path = (
            os.path.join(images.root, name) if label_file is None else os.path.join(annotations, label_file)
        )
        size = rows.add_image(name, path)
        if size is not None and label_file is not None:
            try:
                for box in _boxes(path, size, rows):
                    rows.add_box(name, box)
            except UserError as error:
                rows.problems.append(str(error))
    # Labels in a wrong place would look like images without objects.
    stems = {os.path.splitext(name)[0] for name in (*there, *names)}
    for stem, name in labels.items():
        if stem not in stems:
            rows.problem(os.path.join(annotations, name), f"no image of that name in {images.root}")
    if classes is None:
        # Numbers stand for themselves: that 0 occurs nowhere must not make 1 the first class.
        rows.classes = [str(k) for k in range(1 + max(map(int, rows.names()), default=-1))]
    return rows.table()


def _relative(name: str, images: ImageFolder) -> str:
    path, _ = images.path(name)
    return name if path is None else os.path.relpath(path, images.root)


def _boxes(path: str, size: tuple[int, int], rows: Rows) -> Iterator[Box]:
    for i, line in enumerate(read_text(path).splitlines(), 1):
        item, fields = f"{path}: line {i}", line.split()
        if not fields:
            continue
        try:
            label, numbers = float(fields[0]), [float(x) for x in fields[1:]]
        except ValueError:
            rows.problem(item, f"{short(line)}: it must be a class's number and four numbers")
            continue
        most = _MOST_CLASSES if rows.classes is None else len(rows.classes)
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            rows.problem(item, f"{short(line)}: {len(numbers)} numbers after the class; it must be four")
        elif not all(-0.5 <= x <= 1.5 for x in numbers):
            rows.problem(item, f"{short(line)}: numbers must be shares of the image, from 0 to 1")
        elif label not in range(most):
            names = "" if rows.classes is None else f" ({listed(rows.classes)})"
            rows.problem(item, f"the class {short(fields[0])}; it must be from 0 to {most - 1}{names}")
        else:
            name = str(int(label)) if rows.classes is None else rows.classes[int(label)]
            yield Box(_corners(fields[1:], numbers, size), name, False, item)


def _corners(
    texts: Sequence[str], numbers: Sequence[float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    height, width = size
    # Zeros at the end are often left out: the longest of the line's numbers tells how many digits were kept.
    rounding = 0.5 * 10.0 ** -max(map(_decimals, texts))
    if len(numbers) == 4:
        x, y, w, h = numbers
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        rounding *= 1.5  # of the centre, and half of the size's
    else:
        xs, ys = numbers[::2], numbers[1::2]
        edges = (min(xs), min(ys), max(xs), max(ys))
    left, top, right, bottom = (
        _snap(edge * side, rounding * side)
        for edge, side in zip(edges, (width, height, width, height), strict=True)
    )
    return left, top, right - left, bottom - top


def _decimals(text: str) -> int:
    """Digits after the point, as many as float64 has at most."""
    mantissa, _, exponent = text.lower().partition("e")
    return max(0, min(len(mantissa.partition(".")[2]) - int(exponent[:9] or 0), 15))


def _snap(edge: float, error: float) -> float:
    """Take the whole pixel that the text can mean. With few digits it could mean many: leave the edge."""
    nearest = float(round(edge))
    return nearest if abs(edge - nearest) <= error + 1e-9 and error < 0.25 else edge
