"""Entries of DATASETS.FOCAL: registering them, their keys, and reading what they name."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_d2.annotations import Table
from focal_d2.config import check_choice
from focal_d2.data.datasets import register_table
from focal_d2.data.readers import READERS
from focal_d2.data.readers.csv_file import COLUMNS
from focal_d2.data.readers.image_folder import ImageFolder
from focal_d2.data.readers.sniff import describe
from focal_d2.data.readers.texts import class_names, is_yaml, read_list, short
from focal_d2.data.readers.yolo import ROWS
from focal_d2.errors import UserError

# Keys that an entry can have, beside those of its format.
_KEYS = ("NAME", "FORMAT", "ANNOTATIONS", "CLASSES", "KEEP", "OTHERS", "NAMES")
_OF_FORMAT = {
    "coco": ("IMAGES", "OUTSIDE", "LIST"),
    "csv": ("IMAGES", "OUTSIDE", "COLUMNS", "LIST"),
    "voc": ("IMAGES", "OUTSIDE", "LIST"),
    "yolo": ("IMAGES", "LIST", "ROWS"),
    "yolo with a data.yaml": ("SPLIT", "OUTSIDE", "ROWS", "LIST"),
}
_NEEDED = ("NAME", "IMAGES", "ANNOTATIONS", "SPLIT")
# Of a NAME: file systems take names of 255 bytes, and names of files may add to it.
_MOST_BYTES = 200
_CHOICES = {"NAMES": ("path", "basename"), "OTHERS": ("background", "ignored"), "ROWS": ROWS}


def register_datasets(entries: list[dict[str, Any]]) -> None:
    """Register the datasets of `DATASETS.FOCAL`; a name given again replaces the earlier one.

    The files are read when a dataset is first asked for, and once.

    Args:
        entries: each a mapping with the keys that docs/data.md lists.

    Raises:
        UserError: for a missing or unknown key, a value of the wrong type, or a name that detectron2 already
            has.
    """
    for i, entry in enumerate(entries):
        key = f"DATASETS.FOCAL[{i}]"
        check_entry(key, entry)
        entry = expand_paths(entry)
        name = entry["NAME"]
        if any(name == earlier["NAME"] for earlier in entries[:i]):
            raise UserError(f'{key}.NAME "{name}" is already the name of an earlier entry')
        if name in DatasetCatalog:
            if not MetadataCatalog.get(name).get("from_focal_yaml", False):
                raise UserError(f'{key}.NAME "{name}" is the name of another dataset')
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        read = functools.partial(read_entry, dict(entry))
        register_table(
            name,
            functools.cache(read),
            from_focal_yaml=True,
            source=entry["ANNOTATIONS"],
            images=images_of(entry),
        )


def check_entry(prefix: str, entry: Any) -> None:
    """Check the keys and the types of the values of an entry.

    Args:
        prefix: the config key that holds it.
        entry: it must be a mapping.

    Raises:
        UserError: for a missing or unknown key, or a value of the wrong type.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{prefix} is {entry!r}; it must have NAME, IMAGES, ANNOTATIONS")
    style = check_choice(f"{prefix}.FORMAT", _format(entry), tuple(READERS))
    if style == "yolo" and _is_data_file(entry):
        style = "yolo with a data.yaml"
    legal = (*_KEYS[:2], *_OF_FORMAT[style][:1], *_KEYS[2:], *_OF_FORMAT[style][1:])
    for key in entry:
        if key not in legal:
            raise UserError(f"{prefix} has {key}; of format {style} it can have {', '.join(legal)}")
    if style == "yolo with a data.yaml" and entry.get("SPLIT") is None:
        raise UserError(f"{prefix} has no SPLIT; it must be train, val, test or another key of the data.yaml")
    for key in dict.fromkeys((*(x for x in _NEEDED if x in legal), *entry)):
        _check_value(f"{prefix}.{key}", key, entry.get(key))
    if "OTHERS" in entry and entry.get("KEEP") is None:
        raise UserError(f"{prefix} has OTHERS, but KEEP names no classes to keep")
    name = entry["NAME"]
    if os.path.basename(name) != name or name in (os.curdir, os.pardir):
        raise UserError(f'{prefix}.NAME "{name}" becomes the name of a folder: it can have no slash')
    if not name.isprintable() or len(name.encode()) > _MOST_BYTES:
        raise UserError(
            f"{prefix}.NAME is {short(name)}; it becomes the name of a folder: it must be printable "
            f"characters, at most {_MOST_BYTES} bytes in UTF-8"
        )


def expand_paths(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with `~` at the start of its paths replaced by the user's folder."""
    paths = ("IMAGES", "ANNOTATIONS", "CLASSES", "KEEP", "LIST")
    return {k: os.path.expanduser(x) if k in paths and isinstance(x, str) else x for k, x in entry.items()}


def _check_value(prefix: str, key: str, value: Any) -> None:
    if key in _CHOICES:
        check_choice(prefix, value, _CHOICES[key])
    elif key == "OUTSIDE":
        if not isinstance(value, bool):
            raise UserError(f"{prefix} is {value!r}; it must be true or false")
    elif key in ("CLASSES", "KEEP"):
        if not isinstance(value, (str, list, tuple, type(None))):
            raise UserError(f"{prefix} is {value!r}; it must be a list of names, or a file of them")
    elif key == "COLUMNS":
        if not isinstance(value, dict) or not all(isinstance(x, str) and x.strip() for x in value.values()):
            raise UserError(
                f"{prefix} is {value!r}; it must be a mapping, such as {{xmin: x0, label: species}}"
            )
        for column in value:
            check_choice(f"{prefix} has a column that", column, tuple(COLUMNS))
    elif not (isinstance(value, str) and value.strip()):
        raise UserError(f"{prefix} is {value!r}; it must be a text")


def _format(entry: dict[str, Any]) -> Any:
    """Return the format of an entry. Without FORMAT, a YAML file is of YOLO and any other file of COCO."""
    return entry.get("FORMAT", "yolo" if _is_data_file(entry) else "coco")


def _is_data_file(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("ANNOTATIONS"), str) and is_yaml(entry["ANNOTATIONS"])


def images_of(entry: dict[str, Any]) -> ImageFolder:
    """Return the folder of an entry's images; that of a data.yaml is the file's own."""
    return ImageFolder(
        entry.get("IMAGES") or os.path.dirname(entry["ANNOTATIONS"]),
        outside=entry.get("OUTSIDE", False),
        basename=entry.get("NAMES") == "basename",
    )


def read_entry(entry: dict[str, Any]) -> Table:
    """Read the annotations of an entry that was checked.

    Images come in the order of their names in every format, so that the format makes no difference to what is
    drawn.

    Raises:
        UserError: if they can't be read; it says what the file is, if another format or tool is recognised.
    """
    style, path = _format(entry), entry["ANNOTATIONS"]
    options: dict[str, Any] = {}
    if entry.get("CLASSES") is not None:
        options["classes"] = class_names(entry["CLASSES"])
    listed = read_list(entry["LIST"]) if "LIST" in entry else None
    in_folder = style in ("voc", "yolo") and not is_yaml(path)
    if listed is not None and in_folder:
        options["chosen"] = listed
    options |= {key.lower(): entry[key] for key in ("SPLIT", "ROWS", "COLUMNS") if key in entry}
    try:
        table = READERS[style](path, images_of(entry), **options)
    except UserError as error:
        kind = describe(path, style)
        if kind is None:
            raise
        # These formats are read from folders, of which only a few files were looked at for `kind`.
        reason = f"; {error}" if style in ("voc", "yolo") and os.path.isdir(path) else ""
        raise UserError(f"{path} {kind} (FORMAT is {style}{reason})") from error
    if listed is not None and not in_folder:
        table = _listed_images(table, listed, entry)
    if entry.get("KEEP") is not None:
        table = table.keep(class_names(entry["KEEP"], "KEEP"), ignore_others=entry.get("OTHERS") == "ignored")
    return table.by_name()


def _listed_images(table: Table, names: Sequence[str], entry: dict[str, Any]) -> Table:
    """Return the table with the listed images only, for formats whose annotations are one file.

    Raises:
        UserError: for a name that is no image of the annotations.
    """
    images = images_of(entry)
    position = {os.path.abspath(path): i for i, path in enumerate(table.file_names)}
    chosen = []
    for name in names:
        # A data.yaml may have images outside its folder, which `images` refuses.
        path = os.path.abspath(images.path(name)[0] or os.path.join(images.root, name))
        if path not in position:
            raise UserError(f"LIST: {short(name)} is no image of {entry['ANNOTATIONS']}, at {path}")
        chosen.append(position[path])
    return table.of_images(list(dict.fromkeys(chosen)))
