"""Pascal VOC: an XML file an image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder, image_size, list_files, path_under
from focal_d2.data.readers.rows import Box, Rows
from focal_d2.data.readers.texts import read_bytes, short
from focal_d2.errors import UserError, first_few

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    annotations: str,
    images: ImageFolder | str,
    classes: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
) -> Table:
    """Read a folder of VOC files.

    VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) is the box from xmin - 1 to
    xmax. Difficult objects are ignored regions.

    Args:
        annotations: folder of the XML files; those in folders below it are found, too.
        images: folder of the images. An XML file's image is the one in the same subfolder that has the XML
            file's stem and a known ending; without such an image, the one that its `filename` names, in the
            same subfolder or in `images` itself. Files that were renamed keep an old `filename`, which may
            meanwhile be the name of another image. Where the two are different images, and only the second
            one has the size that the file gives, it is the second one.
        classes: K names in the order of labels; None: those that occur, sorted.
        chosen: names of XML files without ending, as in VOC's ImageSets/Main; None: all.

    Raises:
        UserError: naming the folder or file, if there is nothing to read.
    """
    rows = Rows(ImageFolder.of(images), classes, annotations)
    names = list_files(annotations, (".xml",)) if chosen is None else [f"{name}.xml" for name in chosen]
    renamed = []
    for name in names:
        try:
            path = path_under(annotations, name)
            if path is None:
                raise UserError(f"LIST: {short(name)} is not a path under {annotations}")
            if _read_file(path, os.path.splitext(name)[0], rows):
                renamed.append(name)
        except UserError as error:
            rows.problems.append(str(error))
    notes, warnings = [], []
    if renamed:
        warnings.append(
            f"{annotations}: in {len(renamed)} of {len(names)} files <filename> is the name of another image "
            "than the one with the file's own name, which is taken unless only the other one has the file's "
            f"<size>; the first is {renamed[0]}"
        )
    table = rows.table()
    from_zero = (table.boxes[:, :2] == -1).any(axis=1) | (table.boxes % 1 != 0).any(axis=1)
    if from_zero.any():
        notes.append(
            f"{annotations}: {from_zero.sum()} of {len(from_zero)} boxes have a corner of 0 or one that is "
            "not whole, as tools write that count pixels from 0; VOC counts from 1: boxes may be a pixel off"
        )
    return dataclasses.replace(table, notes=notes, warnings=warnings)


def read_voc_boxes(path: str | Path) -> np.ndarray:
    """Read one file's boxes.

    Returns:
        (M, 4) float64, XYXY absolute pixels; difficult objects are among them.

    Raises:
        UserError: naming the file, or the object, that can't be read.
    """

    def refuse(item: str, text: str) -> None:
        raise UserError(f"{item}: {text}")

    boxes = np.array([box.corners for box in _boxes(path, _parse(path), refuse)], dtype=np.float64)
    boxes = boxes.reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _read_file(path: str, stem: str, rows: Rows) -> bool:
    """Add an XML file's image and boxes; return whether its `filename` means another image.

    Args:
        path: of the file.
        stem: its name without ending, relative to the folder of annotations.
        rows: gets them.
    """
    root = _parse(path)
    size = None
    if root.find("size") is not None:
        sides = [root.findtext(f"size/{side}", "") for side in ("height", "width")]
        numbers = [_number(side) for side in sides]
        if any(x is None or x != int(x) for x in numbers):
            raise UserError(f"{path}: size has the height and width {sides}; not whole numbers")
        # Some tools write 0 for a size that they don't know.
        size = None if 0 in numbers else (int(numbers[0] or 0), int(numbers[1] or 0))
    name, differs = _image_name(path, root, stem, rows.images, size)
    if name in rows:
        raise UserError(f"{path}: another file has the annotations of {name} already")
    if rows.add_image(name, path, size) is not None:
        for box in _boxes(path, root, rows.problem):
            rows.add_box(name, box)
    return differs


def _image_name(
    path: str, root: ElementTree.Element, stem: str, images: ImageFolder, size: tuple[int, int] | None
) -> tuple[str, bool]:
    """Return the name of an XML file's image, and whether `filename` and stem differ; see `read_voc`.

    Raises:
        UserError: naming the file, if it names no image or the stem means several.
    """
    given = root.findtext("filename", "").strip()
    by_stem = images.with_stem(stem)
    by_filename = [os.path.join(os.path.dirname(stem), given), given]
    by_filename = [os.path.normpath(name) for name in by_filename if images.holds(name)]
    both = [name for name in by_stem if name in by_filename]
    if len(both or by_stem) > 1:
        raise UserError(
            f"{path}: <filename> is {short(given)}, and {len(by_stem)} images have the name of this file: "
            f"{first_few(by_stem)}"
        )
    if not (by_stem or given):
        raise UserError(
            f"{path}: no <filename> in <{root.tag}> and no image {stem}.* in {images.root}: not a VOC file"
        )
    differs = bool(by_filename and by_stem and not both)
    fits = [_has_size(images, x[0], size) for x in (by_filename, by_stem)] if differs and size else []
    if fits == [True, False]:
        return by_filename[0], differs
    return [*both, *by_stem, *by_filename, given][0], differs


def _has_size(images: ImageFolder, name: str, size: tuple[int, int]) -> bool:
    """Tell whether an image can be read and has a size; some tools ignore that an image is turned."""
    path, _ = images.path(name)
    try:
        return path is not None and sorted(image_size(path)) == sorted(size)
    except UserError:
        return False


def _parse(path: str | Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_bytes(path))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as XML: {error}") from error


def _boxes(path: str | Path, root: ElementTree.Element, problem: Callable[[str, str], None]) -> Iterator[Box]:
    for i, element in enumerate(root.iterfind("object"), 1):
        item = f"{path}: object {i}"
        texts = {key: element.findtext(f"bndbox/{key}", "").strip() for key in _CORNERS}
        numbers = [_number(text) for text in texts.values()]
        if None in numbers:
            key = next(key for key, number in zip(texts, numbers, strict=True) if number is None)
            problem(item, f'bndbox has "{texts[key][:60]}" for {key}; it must be a number')
            continue
        left, top, right, bottom = (x or 0.0 for x in numbers)
        corners = (left - 1, top - 1, right - left + 1, bottom - top + 1)
        difficult = element.findtext("difficult", "").strip() or "0"  # labelme2voc writes it empty
        if difficult not in ("0", "1"):
            problem(item, f'difficult is "{difficult[:60]}"; it must be 0 or 1')
            continue
        yield Box(corners, element.findtext("name", "").strip(), difficult == "1", item)


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
