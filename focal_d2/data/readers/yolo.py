"""YOLO: a text file an image, a line a box, everything relative to the image's size."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder
from focal_d2.data.readers.rows import Box, Rows
from focal_d2.data.readers.texts import (
    class_names,
    is_label_row,
    is_yaml,
    read_bytes,
    read_text,
    short,
)
from focal_d2.data.readers.yolo_files import YoloFiles, about_classes, files_of_folder, files_of_split
from focal_d2.errors import UserError, first_few

# Where nobody named the classes, a larger number is a slip of a column.
_MOST_CLASSES = 10_000
# How many times more lines must speak against one reading than against the other. In two real sets
# of keypoints 1 and 21 % of the lines speak against keypoints, and all against polygons.
_CLEAR = 4
ROWS = ("polygons", "keypoints")


class _Row(NamedTuple):
    """A line of a label file."""

    image: str
    item: str  # the line, for messages
    name: str  # of the class
    texts: list[str]  # of the numbers after the class
    numbers: list[float]


def read_yolo(
    annotations: str,
    images: ImageFolder | str,
    classes: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    *,
    split: str | None = None,
    rows: str | None = None,
) -> Table:
    """Read YOLO label files: those of a folder, or of a data.yaml.

    A line is "class x y width height", the centre and the size as shares of the image's width and height;
    or "class x1 y1 x2 y2 x3 y3 …", a polygon, of which the extent is taken; or a box followed by keypoints,
    which are left out. The image of a/b.jpg has its labels in a/b.txt; without such a file it has no boxes.
    Other text files beside the labels are passed over.

    An edge that lies within the text's rounding of a whole pixel is at that pixel, so that boxes of whole
    pixels come back exactly from six digits.

    Args:
        annotations: folder of the label files; or a YAML file as ultralytics has it, with `names`, optional
            `path` and `kpt_shape`, and for each split a folder, a text file that lists images, or several.
            Its labels are where ultralytics looks for them: the last folder `images` of a path becomes
            `labels`.
        images: folder of the images; those in folders below it are found, too. With a YAML file, only its
            options count.
        classes: K names; None: those of a file that annotation tools leave (classes.txt, obj.names,
            data.yaml, …) in `annotations` or up to three folders above, else numbers.
        chosen: names of images under `images`, or relative to a folder above it; None: all.
        split: which images of the YAML file: train, val or test.
        rows: what lines of more than four numbers are, "polygons" or "keypoints"; None: as `kpt_shape` says,
            else as the numbers say.

    Raises:
        UserError: naming the folder or file, if there is nothing to read, or lines may be polygons as well as
            boxes with keypoints.
    """
    images = ImageFolder.of(images)
    names = _names(annotations, classes)
    if is_yaml(annotations):
        files = files_of_split(annotations, split, images)
    else:
        files = files_of_folder(annotations, images, chosen)
        if not files.labels:
            raise UserError(f"{annotations}: no images in {images.root}")
    table = _rows_of_files(annotations, files, rows, names)
    # Labels in a wrong place would look like images without objects.
    for path in files.without_image:
        if _has_labels(path, table):
            table.problem(path, f"no image of that name in {files.images.root}")
    if not table.problems and not files.any_labels:
        name, label_file = next(iter(files.labels.items()))
        raise UserError(
            f"{annotations}: none of the {len(files.labels)} images has a label file; that of {name} would "
            f"be {label_file}"
        )
    if names.classes is None:
        # Numbers stand for themselves: that 0 occurs nowhere must not make 1 the first class.
        table.classes = [str(k) for k in range(1 + max(map(int, table.names()), default=-1))]
    return dataclasses.replace(table.table(), notes=names.notes, warnings=names.warnings)


class _Names(NamedTuple):
    """What is known of the classes before a label is read."""

    classes: Sequence[str] | None  # None: numbers
    keypoint_shape: Any  # `kpt_shape` of a data.yaml; None: not given
    notes: list[str]
    warnings: list[str]


def _names(annotations: str, classes: Sequence[str] | None) -> _Names:
    names_file, class_count, keypoint_shape = about_classes(annotations)
    names = _Names(classes, keypoint_shape, [], [])
    if classes is not None:
        return names
    if not names_file:
        names.notes.append(
            f"{annotations}: no class names found; the classes are numbers (CLASSES names them)"
        )
        return names
    classes = class_names(names_file)
    names.notes.append(f"{annotations}: the class names are those of {names_file}")
    if class_count is not None and class_count != len(classes):
        names.warnings.append(
            f"{names_file}: nc is {short(class_count)}, but names has {len(classes)} classes, which are taken"
        )
    return names._replace(classes=classes)


def _rows_of_files(source: str, files: YoloFiles, rows: str | None, names: _Names) -> Rows:
    """Return the images and the boxes of their label files; see `read_yolo`."""
    table = Rows(files.images, names.classes, source)
    lines: list[_Row] = []
    sizes: dict[str, tuple[int, int]] = {}
    for name, label_file in files.labels.items():
        has_labels = os.path.exists(label_file)
        size = table.add_image(name, label_file if has_labels else os.path.join(files.images.root, name))
        if size is not None and has_labels:
            sizes[name] = size
            try:
                lines += _read_lines(label_file, name, table)
            except UserError as error:
                table.problems.append(str(error))
    _add_boxes(table, lines, sizes, rows, names.keypoint_shape, names.notes)
    return table


def _has_labels(path: str, table: Rows) -> bool:
    """Tell whether a text file without an image begins as labels do; lists and READMEs do not."""
    try:
        text = read_bytes(path).decode("utf-8", errors="replace")
    except UserError as error:
        table.problems.append(str(error))
        return False
    return is_label_row(next((line for line in text.splitlines() if line.strip()), ""))


def _read_lines(path: str, image: str, table: Rows) -> Iterator[_Row]:
    for i, line in enumerate(read_text(path).splitlines(), 1):
        item, fields = f"{path}: line {i}", line.split()
        if not fields:
            continue
        try:
            label, numbers = float(fields[0]), [float(x) for x in fields[1:]]
        except ValueError:
            table.problem(item, f"{short(line)}: it must be a class's number and four numbers")
            continue
        most = _MOST_CLASSES if table.classes is None else len(table.classes)
        if len(numbers) < 4:
            table.problem(item, f"{short(line)}: {len(numbers)} numbers after the class; it must be four")
        elif not (label.is_integer() and 0 <= label < most):
            names = "" if table.classes is None else f" ({first_few(table.classes)})"
            table.problem(item, f"the class {short(fields[0])}; it must be from 0 to {most - 1}{names}")
        else:
            name = str(int(label)) if table.classes is None else table.classes[int(label)]
            yield _Row(image, item, name, fields[1:], numbers)


def _add_boxes(
    table: Rows,
    lines: Sequence[_Row],
    sizes: dict[str, tuple[int, int]],
    rows: str | None,
    keypoint_shape: Any,
    notes: list[str],
) -> None:
    """Add the lines' boxes to the table; see `read_yolo`."""
    long_lines = [line.numbers for line in lines if len(line.numbers) != 4]
    length = None  # of lines with keypoints, where it is known
    if rows is None and keypoint_shape is not None:
        length = _keypoint_length(table.source, keypoint_shape)
    elif rows is None and long_lines:
        rows = _tell_rows(long_lines, len(lines))
        count = statistics.mode(map(len, long_lines))
        if rows is None:
            others = [line for line in lines if len(line.numbers) != count]
            other = f"; {others[0].item} has {len(others[0].numbers)}" if others else ""
            raise UserError(
                f"{table.source}: lines with {count} numbers after the class may be polygons, or boxes with "
                f"keypoints: set ROWS to {' or '.join(ROWS)}{other}"
            )
        if rows == "keypoints":
            notes.append(
                f"{table.source}: lines have {count} numbers after the class: they are read as a box and "
                "keypoints, which are left out (ROWS: polygons reads them as polygons)"
            )
    for line in lines:
        count, numbers, texts = len(line.numbers), line.numbers, line.texts
        if length is not None and count not in (4, length):
            table.problem(line.item, f"{count} numbers after the class; by kpt_shape they must be {length}")
            continue
        if length is not None or rows == "keypoints":
            numbers, texts = numbers[:4], texts[:4]
        elif count != 4 and (count < 6 or count % 2):
            table.problem(
                line.item, f"{count} numbers after the class; they must be four, or pairs of a polygon"
            )
            continue
        if not _are_shares(np.array(numbers)).all():
            shown = short(" ".join(texts))
            table.problem(line.item, f"{shown}: numbers must be shares of the image, from 0 to 1")
            continue
        table.add_box(
            line.image, Box(_corners(texts, numbers, sizes[line.image]), line.name, False, line.item)
        )


def _keypoint_length(source: str, shape: Any) -> int:
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(x) is int and x > 0 for x in shape)):
        raise UserError(f"{source}: kpt_shape is {short(shape)}; it must be [keypoints, numbers of each]")
    return 4 + shape[0] * shape[1]


def _tell_rows(long_lines: Sequence[Sequence[float]], count: int) -> str | None:
    """Tell polygons from boxes with keypoints.

    Keypoints are all of one number, follow every box, and lie in it; as a polygon, the size of the box would
    be a point near the others. A polygon near the middle of its image can pass as a box with keypoints: all
    lines are looked at. Lines of each length are looked at alone, since one line of another length may be a
    mistake in a set of keypoints.

    Args:
        long_lines: numbers of each line that has more or fewer than four.
        count: of all lines.

    Returns:
        "polygons", "keypoints" or None if it may be either.
    """
    by_length: dict[int, list[Sequence[float]]] = {}
    for numbers in long_lines:
        by_length.setdefault(len(numbers), []).append(numbers)
    with_keypoints = of_polygons = 0.0  # numbers of lines
    for group in by_length.values():
        values = np.array(group)
        with_keypoints += len(group) * max(_share_with_keypoints(values, size) for size in (2, 3))
        of_polygons += len(group) * _share_of_polygons(values)
    against_keypoints = 1 - with_keypoints / len(long_lines)
    against_polygons = 1 - of_polygons / len(long_lines)
    if with_keypoints == 0 or (0 < against_keypoints >= _CLEAR * against_polygons):
        return "polygons"
    if len(by_length) > 1:
        # No line is against polygons, and keypoints would be of one number.
        return "polygons" if against_polygons == 0 else None
    if count > len(long_lines):
        return None
    return "keypoints" if 0 < against_polygons >= _CLEAR * against_keypoints else None


def _share_with_keypoints(values: np.ndarray, size: int) -> float:
    """Return the share of lines (M, length) whose first four numbers are a box that holds the other points.

    A keypoint has `size` numbers, of which the third says whether it is seen. (0, 0) is none.
    """
    if (values.shape[1] - 4) % size:
        return 0.0
    boxes, points = values[:, None, :4], values[:, 4:].reshape(len(values), -1, size)
    half = boxes[..., 2:] / 2
    margin = 0.01  # points on the edge, and their rounding
    in_image = (half > 0) & (boxes[..., :2] - half >= -margin) & (boxes[..., :2] + half <= 1 + margin)
    seen = (points[..., :2] != 0).any(axis=-1)
    held = (np.abs(points[..., :2] - boxes[..., :2]) <= half + margin).all(axis=-1) | ~seen
    flags = np.isin(points[..., 2], (0, 1, 2)) if size == 3 else np.ones_like(held)
    return float((in_image.all(axis=(1, 2)) & (held & flags).all(axis=1)).mean())


def _share_of_polygons(values: np.ndarray) -> float:
    """Return the share of lines (M, length) whose second point is as near to the others as these are wide."""
    if values.shape[1] % 2:
        return 0.0
    points = values.reshape(len(values), -1, 2)
    second, others = points[:, 1], np.delete(points, 1, axis=1)
    # A keypoint that is not seen is (0, 0), which would be near to everything.
    nowhere = (others == 0).all(axis=-1, keepdims=True)
    low = np.where(nowhere, np.inf, others).min(axis=1)
    high = np.where(nowhere, -np.inf, others).max(axis=1)
    near = (second >= 2 * low - high) & (second <= 2 * high - low) & _are_shares(points).all(axis=1)
    return float(near.all(axis=1).mean())


def _are_shares(values: np.ndarray) -> np.ndarray:
    """Tell which numbers can be shares of an image; objects may reach beyond its edge."""
    return (values >= -0.5) & (values <= 1.5)


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
