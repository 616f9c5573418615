"""COCO annotation files.

Read once, into typed columns: masks and whatever else is not asked for are skipped. A file that does not fit
is read again, slowly, to say which item is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder, image_size
from focal_d2.data.readers.masks import mask_box
from focal_d2.data.readers.rows import MOST_PIXELS
from focal_d2.data.readers.texts import decode_text, read_bytes, short
from focal_d2.errors import UserError, first_few

_Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Side = Annotated[int, Meta(ge=0, le=MOST_PIXELS)] | Annotated[float, Meta(ge=0, le=MOST_PIXELS)]


class _Image(Struct, gc=False):
    id: _Id
    file_name: str
    width: _Side | None = None  # of some tools 0 where they don't know it
    height: _Side | None = None


class _Annotation(Struct, gc=False):
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    id: _Id | float | str | None = None  # of no use here
    area: float | None = None
    iscrowd: int | bool | None = None
    ignore: int | bool | float | None = None


class _Category(Struct, gc=False):
    id: _Id
    name: str


class _Coco(Struct, gc=False):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] | None = None


_SECTIONS: dict[str, Any] = {"images": _Image, "annotations": _Annotation, "categories": _Category}
_EXPECTED = {
    "id": "a whole number of 64 bits",
    "image_id": "the id of an image",
    "category_id": "the id of a category",
    "file_name": "a text",
    "name": "a text",
    "width": f"a whole number of pixels from 1 to {MOST_PIXELS}",
    "height": f"a whole number of pixels from 1 to {MOST_PIXELS}",
    "bbox": "[x, y, width, height], numbers",
    "area": "a number",
    "iscrowd": "0 or 1",
    "ignore": "0 or 1",
}
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")  # written as a number would be, so that two texts can't be one
_IDS = ("id", "image_id", "category_id")
_DECODER = msgspec.json.Decoder(_Coco)


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
    file = _read_file(annotations)
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
        file.note("annotations", i, f"has the area {areas[i]}; it must be {_EXPECTED['area']}, at least 0")
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


@dataclass
class _File:
    """A file's valid items, and a line for each of the others."""

    path: str
    coco: _Coco
    positions: dict[str, Sequence[int]]  # section -> position of each valid item in the file's list
    problems: list[str]

    def note(self, section: str, i: int, text: str) -> None:
        """Add a line to `problems` about the valid item `i` of a section."""
        item = getattr(self.coco, section)[i]
        known = "" if item.id is None else f" (id {short(item.id) if isinstance(item.id, str) else item.id})"
        self.problems.append(f"{self.path}: {section}[{self.positions[section][i]}]{known} {text}")

    def check_ids(self) -> None:
        """Note images and categories that have the id of an earlier one."""
        for section in ("images", "categories"):
            seen: dict[int, Any] = {}
            for i, item in enumerate(getattr(self.coco, section)):
                if item.id in seen and not (section == "categories" and seen[item.id] == item):
                    self.note(section, i, "has the id of an earlier one; ids must be different whole numbers")
                seen[item.id] = item

    def used_categories(self) -> list[_Category]:
        """Return the categories, each once. Of those with the same name, only the ones that have boxes.

        Some tools add a parent of the same name, which has no boxes.
        """
        categories = list({(c.id, c.name): c for c in self.coco.categories}.values())
        if len({c.name for c in categories}) == len(categories):
            return categories
        used = {a.category_id for a in self.coco.annotations or ()}
        return [c for c in categories if c.id in used] or categories


def _read_file(path: str) -> _File:
    """Read the items of a file.

    Raises:
        UserError: if it is not COCO's JSON, or no image or no category is valid.
    """
    data = read_bytes(path)
    problems: list[str] = []
    try:
        coco = _DECODER.decode(data)
        positions: dict[str, Sequence[int]] = {k: range(len(getattr(coco, k) or ())) for k in _SECTIONS}
        if _may_repeat_keys(data, coco):
            _load(path, data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        coco, positions = _decode_slowly(path, data, problems)
    empty = [section for section in ("images", "categories") if not getattr(coco, section)]
    if empty:
        cause = f": {problems[0]}" if problems else ""
        raise UserError(f"{path}: no {' and no '.join(empty)} in it{cause}")
    return _File(path, coco, positions, problems)


class _ImageColumns(NamedTuple):
    """The valid images in order of id."""

    row_of: dict[int, int]  # image id -> position in the lists below
    paths: list[str]
    sizes: list[tuple[int, int]]  # height, width
    refused: set[int]  # ids of images that are not valid; their boxes need no line of their own


def _image_columns(file: _File, folder: ImageFolder) -> _ImageColumns:
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


def _valid_boxes(file: _File, boxes: np.ndarray) -> np.ndarray:
    """Return whether each box (B, 4) is valid, (B,) bool, and note the others."""
    valid = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1) & (np.abs(boxes) <= MOST_PIXELS).all(1)
    for i in np.flatnonzero(~valid).tolist():
        bbox = list((file.coco.annotations or [])[i].bbox)
        file.note("annotations", i, f"has the bbox {short(bbox)}; {_WRONG_BOX}")
    return valid


def _note_unknown_images(file: _File, image: np.ndarray, refused: set[int]) -> None:
    """Note boxes whose image is not in the file, which have -1 in `image` (B,)."""
    for i in np.flatnonzero(image < 0).tolist():
        image_id = (file.coco.annotations or [])[i].image_id
        if image_id not in refused:
            file.note("annotations", i, f"has an unknown image_id: {image_id}")


def _note_unknown_categories(file: _File, labels: np.ndarray, names: Sequence[str]) -> None:
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
    path: str, categories: Sequence[_Category], chosen: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[int, int], tuple[int, ...]]:
    """Return the class names, the label of each category id, and the category id of each label."""
    ids: dict[str, int] = {}
    for category in sorted(categories, key=lambda c: c.id):
        if not category.name.strip() or category.name in ids:
            raise UserError(
                f"{path}: categories: the name {short(category.name)} is empty or stands there twice"
            )
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


# A key that is written with escapes ends like this.
_ESCAPED_KEY = re.compile(rb'\\u00[0-9a-fA-F]{2}[a-z_]{0,12}"\s*:')


def _may_repeat_keys(data: bytes, coco: _Coco) -> bool:
    """Tell by counting whether a key may stand twice in an object: the decoder takes the last one.

    False is certain for the sections and for the keys that their items must have.
    """
    items = dict.fromkeys(
        ("image_id", "category_id", "bbox", "iscrowd", "ignore"), len(coco.annotations or ())
    )
    most = {**dict.fromkeys(_SECTIONS, 1), "file_name": len(coco.images), **items}
    repeated = any(data.count(f'"{key}"'.encode()) > times for key, times in most.items())
    return repeated or _ESCAPED_KEY.search(data) is not None


def _load(path: str, data: bytes) -> Any:
    """Read JSON slowly.

    Raises:
        UserError: if it is none, or a key occurs twice in an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            place = f" (id {short(members['id'])})" if key != "id" and "id" in members else ""
            raise UserError(f"{path}: the key {short(key)} stands twice in an object{place}; remove one")
        return members

    text = decode_text(path, data)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def _decode_slowly(path: str, data: bytes, problems: list[str]) -> tuple[_Coco, dict[str, Sequence[int]]]:
    """Keep the items that fit, and where they stand, and note the others.

    Raises:
        UserError: if it is no JSON, or a section is missing.
    """
    content = _load(path, data)
    coco, places = _Coco([], []), dict[str, Sequence[int]]()
    if isinstance(content, dict) and content.get("annotations") is not None:
        coco.annotations = []
    for section, kind in _SECTIONS.items():
        items = content.get(section) if isinstance(content, dict) else None
        if items is None and section == "annotations" and isinstance(content, dict):
            items = []
        if not isinstance(items, list):
            raise UserError(f'{path}: no list "{section}"; a COCO file has {", ".join(_SECTIONS)}')
        kept: list[int] = []
        places[section] = kept
        for i, item in enumerate(items):
            try:
                getattr(coco, section).append(msgspec.convert(_usual(item), kind))
                kept.append(i)
            except msgspec.ValidationError as error:
                problems.append(f"{path}: {section}[{i}] {_what_is_wrong(item, kind, str(error))}")
    return coco, places


def _usual(item: Any) -> Any:
    """Return an item as most tools write it: ids as numbers, and a box where there is a mask."""
    if not isinstance(item, dict):
        return item
    item = {key: _whole(value) if key in _IDS else value for key, value in item.items()}
    if not item.get("bbox") and item.get("segmentation"):
        item["bbox"] = mask_box(item["segmentation"])
    return item


def _whole(value: Any) -> Any:
    """Return the whole number that a text or a float is; pandas writes 1.0 where other ids are missing."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    # Larger floats can stand for several ids.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def _what_is_wrong(item: Any, kind: type[Struct], message: str) -> str:
    if not isinstance(item, dict):
        return f"is {short(item)}; it must be an object with {', '.join(kind.__struct_fields__)}"
    known = f"(id {short(item['id'])}) " if "id" in item else ""
    missing = [f.name for f in msgspec.structs.fields(kind) if f.required and f.name not in item]
    if missing:
        wrong_mask = ", and its segmentation is neither polygons nor RLE" if "segmentation" in item else ""
        return f"{known}has no {', '.join(missing)}{wrong_mask if 'bbox' in missing else ''}"
    place = re.search(r"`\$\.(\w+)", message)
    key = place.group(1) if place else "id"
    return f"{known}has the {key} {short(item[key])}; it must be {_EXPECTED[key]}"


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
