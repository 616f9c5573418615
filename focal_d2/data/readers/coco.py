"""COCO annotation files to tables, and boxes to the content of a COCO file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.readers.coco_file import EXPECTED, Category, CocoFile, read_coco_file
from focal_d2.data.readers.image_folder import ImageFolder, image_size
from focal_d2.data.readers.rows import MOST_PIXELS
from focal_d2.data.readers.texts import short
from focal_d2.errors import UserError, first_few


def read_coco(annotations: str, images: ImageFolder | str, classes: Sequence[str] | None = None) -> Table:
    """Read a COCO file.

    Annotations with "ignore": 1, which converters of VOC files write for difficult objects, are ignored
    regions as crowds are. pycocotools overwrites that flag.

    Beside what COCO's own files have: annotations may have no id; images may have no size, which is then
    read from the file; an annotation may have a mask alone (polygons or RLE), of which the extent is taken;
    ids may be whole numbers as text; a category may be listed twice. A file without the list "annotations"
    is a test set whose objects are not published.

    Args:
        annotations: the json file.
        images: folder of the images.
        classes: K names of its categories in the order of labels; None: all categories, by their ids.

    Returns:
        Images in order of id, boxes in order of the file.

    Raises:
        UserError: naming the file, if it is not COCO's JSON or names no image or category.
    """
    file = read_coco_file(annotations)
    file.check_ids()
    names, label_of, category_ids = _classes(annotations, file.used_categories(), classes)
    columns = _image_columns(file, ImageFolder.of(images))
    objects = file.coco.annotations or []
    boxes = np.array([a.bbox for a in objects], dtype=np.float64).reshape(-1, 4)
    image = np.array([columns.row_of.get(a.image_id, -1) for a in objects], dtype=np.int64)
    labels = np.array([label_of.get(a.category_id, -1) for a in objects], dtype=np.int64)
    areas = np.array([math.nan if a.area is None else a.area for a in objects], dtype=np.float64)
    crowds = np.array([bool(a.iscrowd) for a in objects], dtype=bool)
    marked = np.array([bool(a.ignore) for a in objects], dtype=bool)
    fits = _valid_boxes(file, boxes)
    _note_unknown_images(file, image, columns.refused)
    _note_unknown_categories(file, labels, names)
    for i in np.flatnonzero((areas < 0) | np.isinf(areas)).tolist():
        file.note("annotations", i, f"has the area {areas[i]}; it must be {EXPECTED['area']}, at least 0")
    kept = np.flatnonzero(fits & (image >= 0) & (labels >= 0))
    kept = kept[np.argsort(image[kept], kind="stable")]
    return Table(
        classes=names,
        category_ids=category_ids,
        file_names=columns.paths,
        image_ids=np.fromiter(columns.row_of, np.int64, len(columns.row_of)),
        sizes=np.array(columns.sizes, dtype=np.int64).reshape(-1, 2),
        image=image[kept],
        boxes=boxes[kept],
        labels=labels[kept],
        ignored=(crowds | marked)[kept],
        areas=np.where(np.isfinite(areas), areas, boxes[:, 2] * boxes[:, 3])[kept],
        annotated=file.coco.annotations is not None,
        problems=file.problems,
        notes=_notes_on_ignored(annotations, crowds, marked),
    )


class _ImageColumns(NamedTuple):
    """The valid images in order of id."""

    row_of: dict[int, int]  # image id -> position in the lists below
    paths: list[str]
    sizes: list[tuple[int, int]]  # height, width
    refused: set[int]  # ids of images that are not valid; their boxes need no line of their own


def _image_columns(file: CocoFile, folder: ImageFolder) -> _ImageColumns:
    columns = _ImageColumns({}, [], [], set())
    listed = file.coco.images
    for i in sorted(range(len(listed)), key=lambda i: listed[i].id):
        image = listed[i]
        path, refused = folder.path(image.file_name)
        height, width = image.height, image.width
        if path is None:
            file.note("images", i, f"has a file_name that is refused: {refused}")
        elif height and width and (height != int(height) or width != int(width)):
            file.note("images", i, f"has the height and width {height}, {width}; not whole numbers")
        elif image.id not in columns.row_of:
            try:
                size = (int(height), int(width)) if height and width else image_size(path)
            except UserError as error:
                file.note("images", i, f"has no size: {error}{folder.hint(path)}")
            else:
                columns.row_of[image.id] = len(columns.paths)
                columns.paths.append(path)
                columns.sizes.append(size)
                continue
        columns.refused.add(image.id)
    return columns


def _valid_boxes(file: CocoFile, boxes: np.ndarray) -> np.ndarray:
    """Return whether each box (B, 4) is valid, (B,) bool, and note the others."""
    valid = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1) & (np.abs(boxes) <= MOST_PIXELS).all(1)
    for i in np.flatnonzero(~valid).tolist():
        bbox = list((file.coco.annotations or [])[i].bbox)
        file.note("annotations", i, f"has the bbox {short(bbox)}; {_WRONG_BOX}")
    return valid


def _note_unknown_images(file: CocoFile, image: np.ndarray, refused: set[int]) -> None:
    """Note boxes whose image is not in the file, which have -1 in `image` (B,)."""
    for i in np.flatnonzero(image < 0).tolist():
        image_id = (file.coco.annotations or [])[i].image_id
        if image_id not in refused:
            file.note("annotations", i, f"has an unknown image_id: {image_id}")


def _note_unknown_categories(file: CocoFile, labels: np.ndarray, names: Sequence[str]) -> None:
    """Note boxes without a class, which have -1 in `labels` (B,)."""
    known = {category.id: category.name for category in file.coco.categories}
    for i in np.flatnonzero(labels < 0).tolist():
        category = (file.coco.annotations or [])[i].category_id
        if category in known:
            file.note("annotations", i, f"is of {short(known[category])}, not one of {first_few(names)}")
        else:
            file.note("annotations", i, f"has an unknown category_id: {category}")


def _notes_on_ignored(path: str, crowds: np.ndarray, marked: np.ndarray) -> list[str]:
    """Say which annotations are ignored regions though their author may not expect it.

    Args:
        path: of the file.
        crowds: (B,) bool: "iscrowd" is 1.
        marked: (B,) bool: "ignore" is 1.
    """
    notes = []
    if marked.any():
        notes.append(
            f'{path}: {marked.sum()} of {len(marked)} annotations have "ignore": 1: they are ignored '
            "regions, neither trained on nor counted in AP"
        )
    if len(crowds) and crowds.all():
        notes.append(
            f"{path}: all {len(crowds)} annotations have iscrowd 1, as CVAT writes masks: they are "
            "ignored regions; export the objects as boxes or polygons to train on them"
        )
    return notes


_WRONG_BOX = f"it must be [x, y, width, height], finite, sides at least 0, within {MOST_PIXELS} pixels"


def _classes(
    path: str, categories: Sequence[Category], chosen: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[int, int], tuple[int, ...]]:
    """Return the class names, the label of each category id, and the category id of each label."""
    ids: dict[str, int] = {}
    for category in sorted(categories, key=lambda c: c.id):
        if not category.name.strip() or category.name in ids:
            raise UserError(f"{path}: categories: the name {short(category.name)} is empty or there twice")
        ids[category.name] = category.id
    names = tuple(ids) if chosen is None else tuple(chosen)
    if not set(names) & set(ids):
        raise UserError(
            f"{path}: has the categories {first_few(ids)}; none is in CLASSES ({first_few(names)})"
        )
    # A class that this file lacks still needs a number of its own in prediction files.
    free = max(ids.values()) + 1
    category_ids = []
    for name in names:
        category_ids.append(ids.get(name, free))
        free += name not in ids
    return names, {ids[name]: k for k, name in enumerate(names) if name in ids}, tuple(category_ids)


def coco_content(
    description: str,
    images: Iterable[tuple[str, Sequence[int], Sequence[Sequence[float]], Sequence[int]]],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return what a COCO file of these images holds.

    Args:
        description: of the dataset.
        images: of each the file name, its (height, width), its boxes (M, 4) XYXY absolute pixels, and their
            classes (M,) in [0, K).
        classes: the K names.
    """
    content: dict[str, Any] = {
        "info": {"description": description},
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
    }
    for image_id, (name, (height, width), boxes, labels) in enumerate(images, 1):
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    return content
