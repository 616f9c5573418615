"""CSV: a line a box."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder
from focal_d2.data.readers.rows import Box, Rows
from focal_d2.data.readers.texts import is_number, read_text, short
from focal_d2.errors import UserError, first_few

# What columns are called, of which the first is ours.
COLUMNS = {
    "image": ("image", "image_path", "filename", "file_name", "path"),
    "xmin": ("xmin", "x1", "left"),
    "ymin": ("ymin", "y1", "top"),
    "xmax": ("xmax", "x2", "right"),
    "ymax": ("ymax", "y2", "bottom"),
    "label": ("label", "class", "class_name", "category"),
    "ignored": ("ignored", "ignore", "iscrowd", "difficult"),
    "height": ("height", "image_height"),
    "width": ("width", "image_width"),
}
_NEEDED = ("image", "xmin", "ymin", "xmax", "ymax", "label")
_CORNERS = _NEEDED[1:5]
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# As programs write them.
_FLAGS = {"": False, "0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def read_csv(
    annotations: str,
    images: ImageFolder | str,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Table:
    """Read a CSV file with a line a box.

    Columns, in any order under a header, or the first six in this order without one: image, xmin, ymin, xmax,
    ymax, label; besides, under a header, ignored (0 or 1) and the image's height and width. Other columns are
    left alone. Corners are edges in pixels from 0, the right and lower ones not included: xmax - xmin is the
    width. An image without boxes has a line whose corners and label are empty, or whose corners are all 0, as
    DeepForest writes it; the label of such a line does not count.

    Args:
        annotations: the file, UTF-8, separated by commas, semicolons or tabs, whichever part its first line
            into most fields. Between semicolons or tabs, numbers may have a decimal comma.
        images: folder of the images.
        classes: K names in the order of labels; None: those that occur, sorted.
        columns: what the header calls the columns above, where it calls them otherwise.

    Raises:
        UserError: naming the file, if there is nothing to read.
    """
    rows = Rows(ImageFolder.of(images), classes, annotations)
    text = read_text(annotations)
    separator = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    positions: dict[str, int] | None = None
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if positions is None:
                positions, is_header = _column_positions(annotations, fields, columns or {}, separator)
                if is_header:
                    continue
            row = [field.strip() for field in fields]
            _add(
                rows, positions, row, f"{annotations}: line {reader.line_num}", decimal_comma=separator != ","
            )
    except csv.Error as error:
        raise UserError(f"{annotations}: line {reader.line_num}: {error}") from error
    return rows.table()


def image_names(annotations: str) -> list[str]:
    """Return the names of a file's images, each once, as they are written.

    Returns:
        []: if the file is no table, or lacks a column that `read_csv` needs, under the names that it knows.
    """
    try:
        text = read_text(annotations)
        separator = _separator(text)
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        rows = [fields for fields in lines if any(field.strip() for field in fields)]
        columns, is_header = _column_positions(annotations, rows[0] if rows else [], {}, separator)
    except (UserError, csv.Error):
        return []
    position = columns["image"]
    return list(dict.fromkeys(x[position].strip() for x in rows[is_header:] if len(x) > position))


def _separator(text: str) -> str:
    """Return what parts the first line that is not blank into most fields."""
    line = next((x for x in text.splitlines() if x.strip()), "")
    return max(_SEPARATORS, key=line.count)


def _column_positions(
    path: str, first: Sequence[str], renamed: Mapping[str, str], separator: str
) -> tuple[dict[str, int], bool]:
    """Return the position of each column, and whether the first line names them."""
    corners = [x.strip().replace(",", ".") for x in first[1:5]]
    if not renamed and len(first) >= len(_NEEDED) and all(is_number(x) or not x for x in corners):
        return dict(zip(_NEEDED, range(len(_NEEDED)), strict=True)), False
    names = [name.strip().lower() for name in first]
    aliases = {column: (renamed[column],) if column in renamed else COLUMNS[column] for column in COLUMNS}
    positions = {
        column: names.index(alias.strip().lower())
        for column in COLUMNS
        for alias in reversed(aliases[column])
        if alias.strip().lower() in names
    }
    missing = [column for column in COLUMNS if column not in positions and column in (*_NEEDED, *renamed)]
    if missing:
        accepted = "; ".join(" or ".join(aliases[column]) for column in missing)
        header = first_few([short(x)[1:-1] for x in first])
        if len(first) == 1:
            raise UserError(
                f"{path}: the first line, {header}, is one field; fields are separated by "
                f"{', '.join(_SEPARATORS.values())}"
            )
        raise UserError(
            f"{path}: the header {header} (separated by {_SEPARATORS[separator]}) has no column "
            f"{', '.join(missing)}, which may be called "
            f"{accepted}, or as COLUMNS of the entry says"
        )
    return positions, True


def _add(
    rows: Rows, columns: dict[str, int], fields: Sequence[str], item: str, *, decimal_comma: bool
) -> None:
    if len(fields) <= max(columns.values()):
        rows.problem(item, f"{len(fields)} fields; at least {max(columns.values()) + 1} are needed")
        return
    row = {column: fields[position] for column, position in columns.items()}
    size = None
    if row.get("height") and row.get("width"):
        try:
            size = (_whole(row["height"]), _whole(row["width"]))
        except ValueError:
            rows.problem(
                item, f"height and width are {short([row['height'], row['width']])}; not whole numbers"
            )
            return
    known = rows.add_image(row["image"], item, size)
    if known is None:
        return
    if size is not None and size != known:
        rows.problem(item, f"the image's height and width are {size}, in an earlier line {known}")
        return
    corners = [row[column].replace(",", ".") if decimal_comma else row[column] for column in _CORNERS]
    if not any(corners) and not row["label"]:
        return
    if not all(map(is_number, corners)):
        rows.problem(item, f"the corners are {short(corners)}; they must be numbers, or all empty")
        return
    left, top, right, bottom = map(float, corners)
    if left == top == right == bottom == 0:
        return
    ignored = _FLAGS.get(row.get("ignored", "").lower())
    if ignored is None:
        rows.problem(item, f"ignored is {short(row['ignored'])}; it must be 0 or 1")
        return
    box = Box((left, top, right - left, bottom - top), row["label"], ignored, item)
    rows.add_box(row["image"], box)


def _whole(text: str) -> int:
    """A whole number, also if written as 48.0, as tables with gaps are."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)
