"""The content of a COCO file: its valid items, and a line for each of the others.

The file is read once, into typed columns; masks and other members that are not needed are skipped. If it does
not fit, it is read again, slowly, to say which item is wrong.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from focal_d2.data.readers.masks import mask_box
from focal_d2.data.readers.rows import MOST_PIXELS
from focal_d2.data.readers.texts import decode_text, read_bytes, short
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


class Category(Struct, gc=False):
    id: _Id
    name: str


class _Coco(Struct, gc=False):
    images: list[_Image]
    categories: list[Category]
    annotations: list[_Annotation] | None = None


_SECTIONS: dict[str, Any] = {"images": _Image, "annotations": _Annotation, "categories": Category}

EXPECTED = {
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


@dataclass
class CocoFile:
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

    def used_categories(self) -> list[Category]:
        """Return the categories, each once. Of those with the same name, only the ones that have boxes.

        Some tools add a parent of the same name, which has no boxes.
        """
        categories = list({(c.id, c.name): c for c in self.coco.categories}.values())
        if len({c.name for c in categories}) == len(categories):
            return categories
        used = {a.category_id for a in self.coco.annotations or ()}
        return [c for c in categories if c.id in used] or categories


def read_coco_file(path: str) -> CocoFile:
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
    return CocoFile(path, coco, positions, problems)


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
            known = f" (id {short(members['id'])})" if key != "id" and "id" in members else ""
            raise UserError(f"{path}: the key {short(key)} is twice in an object{known}; remove one")
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
    coco, positions = _Coco([], []), dict[str, Sequence[int]]()
    if isinstance(content, dict) and content.get("annotations") is not None:
        coco.annotations = []
    for section, kind in _SECTIONS.items():
        items = content.get(section) if isinstance(content, dict) else None
        if items is None and section == "annotations" and isinstance(content, dict):
            items = []
        if not isinstance(items, list):
            raise UserError(f'{path}: no list "{section}"; a COCO file has {", ".join(_SECTIONS)}')
        kept: list[int] = []
        positions[section] = kept
        for i, item in enumerate(items):
            try:
                getattr(coco, section).append(msgspec.convert(_usual(item), kind))
                kept.append(i)
            except msgspec.ValidationError as error:
                problems.append(f"{path}: {section}[{i}] {_what_is_wrong(item, kind, str(error))}")
    return coco, positions


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
    member = re.search(r"`\$\.(\w+)", message)
    key = member.group(1) if member else "id"
    return f"{known}has the {key} {short(item[key])}; it must be {EXPECTED[key]}"
