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
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder, image_size
from focal_d2.data.readers.masks import mask_box
from focal_d2.data.readers.rows import MOST_PIXELS
from focal_d2.data.readers.texts import decode_text, listed, read_bytes, short
from focal_d2.errors import UserError

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
    images = ImageFolder.of(images)
    data = read_bytes(annotations)
    problems: list[str] = []
    try:
        coco = _DECODER.decode(data)
        places_in_file: dict[str, Sequence[int]] = {k: range(len(getattr(coco, k) or ())) for k in _SECTIONS}
        if _may_repeat_keys(data, coco):
            _load(annotations, data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        coco, places_in_file = _decode_slowly(annotations, data, problems)
    del data
    annotated = coco.annotations is not None
    objects = coco.annotations or []

    def note(section: str, i: int, text: str) -> None:
        item = getattr(coco, section)[i]
        known = "" if item.id is None else f" (id {short(item.id) if isinstance(item.id, str) else item.id})"
        problems.append(f"{annotations}: {section}[{places_in_file[section][i]}]{known} {text}")

    empty = [section for section in ("images", "categories") if not getattr(coco, section)]
    if empty:
        reason = f": {problems[0]}" if problems else ""
        raise UserError(f"{annotations}: no {' and no '.join(empty)} in it{reason}")
    for section in ("images", "categories"):
        seen: dict[int, Any] = {}
        for i, item in enumerate(getattr(coco, section)):
            if item.id in seen and not (section == "categories" and seen[item.id] == item):
                note(section, i, "has the id of an earlier one; ids must be different whole numbers")
            seen[item.id] = item
    categories = list({(c.id, c.name): c for c in coco.categories}.values())
    if len({c.name for c in categories}) < len(categories):
        # Some tools add a parent of the same name, of which there are no boxes.
        used = {a.category_id for a in objects}
        categories = [c for c in categories if c.id in used] or categories
    names, label_of, category_ids = _classes(annotations, categories, classes)

    places: dict[int, int] = {}
    paths: list[str] = []
    sizes: list[tuple[int, int]] = []
    set_aside: set[int] = set()
    for i in sorted(range(len(coco.images)), key=lambda i: coco.images[i].id):
        image = coco.images[i]
        path, refused = images.path(image.file_name)
        height, width = image.height, image.width
        if path is None:
            note("images", i, f"has a file_name that is refused: {refused}")
        elif height and width and (height != int(height) or width != int(width)):
            note("images", i, f"has the height and width {height}, {width}; not whole numbers")
        elif image.id not in places:
            try:
                size = (int(height), int(width)) if height and width else image_size(path)
            except UserError as error:
                note("images", i, f"has no size: {error}{images.hint(path)}")
            else:
                places[image.id] = len(paths)
                paths.append(path)
                sizes.append(size)
                continue
        set_aside.add(image.id)

    boxes = np.array([a.bbox for a in objects], dtype=np.float64).reshape(-1, 4)
    good = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1) & (np.abs(boxes) <= MOST_PIXELS).all(1)
    for i in np.flatnonzero(~good).tolist():
        note("annotations", i, f"has the bbox {short(list(objects[i].bbox))}; {_WRONG_BOX}")
    owner = np.array([places.get(a.image_id, -1) for a in objects], dtype=np.int64)
    for i in np.flatnonzero(owner < 0).tolist():
        if objects[i].image_id not in set_aside:
            note("annotations", i, f"has an unknown image_id: {objects[i].image_id}")
    labels = np.array([label_of.get(a.category_id, -1) for a in objects], dtype=np.int64)
    known = {category.id: category.name for category in coco.categories}
    for i in np.flatnonzero(labels < 0).tolist():
        category = objects[i].category_id
        if category in known:
            note("annotations", i, f"is of {short(known[category])}, not one of {listed(names)}")
        else:
            note("annotations", i, f"has an unknown category_id: {category}")
    keep = np.flatnonzero(good & (owner >= 0) & (labels >= 0))
    keep = keep[np.argsort(owner[keep], kind="stable")]
    given = [a.area if a.area is not None else math.nan for a in objects]
    areas = np.array(given, dtype=np.float64)
    for i in np.flatnonzero((areas < 0) | np.isinf(areas)).tolist():
        note("annotations", i, f"has the area {areas[i]}; it must be {_EXPECTED['area']}, at least 0")
    marked = np.array([bool(a.ignore) for a in objects], dtype=bool)
    notes = []
    if marked.any():
        notes.append(
            f'{annotations}: {marked.sum()} of {len(marked)} annotations have "ignore": 1: they are ignored '
            "regions, neither trained on nor counted in AP"
        )
    crowds = np.array([bool(a.iscrowd) for a in objects], dtype=bool)
    if len(crowds) and crowds.all():
        notes.append(
            f"{annotations}: all {len(crowds)} annotations have iscrowd 1, as CVAT writes masks: they are "
            "ignored regions; export the objects as boxes or polygons to train on them"
        )
    return Table(
        classes=names,
        category_ids=category_ids,
        file_names=paths,
        image_ids=np.fromiter(places, np.int64, len(places)),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        image=owner[keep],
        boxes=boxes[keep],
        labels=labels[keep],
        ignored=(crowds | marked)[keep],
        areas=np.where(np.isfinite(areas), areas, boxes[:, 2] * boxes[:, 3])[keep],
        annotated=annotated,
        problems=problems,
        notes=notes,
    )


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
        raise UserError(f"{path}: has the categories {listed(ids)}; none is in CLASSES ({listed(names)})")
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
