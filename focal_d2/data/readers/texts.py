"""Text files of annotations: bytes, lines, YAML, lists of class names; and values in messages."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from focal_d2.errors import UserError, reason
from focal_d2.storage import yaml_text
from focal_d2.storage.files import LARGEST_ANNOTATIONS, read_file

_BOM = b"\xef\xbb\xbf"


def read_bytes(path: str | Path) -> bytes:
    """Read a file of annotations without its byte order mark.

    Raises:
        UserError: if it can't be read.
    """
    try:
        return read_file(path, limit=LARGEST_ANNOTATIONS).removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: if it can't be read, or is in another encoding.
    """
    return decode_text(path, read_bytes(path))


def decode_text(path: str | Path, data: bytes) -> str:
    """Decode what was read from a file.

    Raises:
        UserError: naming the file, if it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def short(value: object) -> str:
    """Write a value of any size in a few characters of one line."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return " ".join(brief.repr(value).split())


def read_list(path: str | Path) -> list[str]:
    """Read the lines of a text file that are not blank.

    Raises:
        UserError: if it can't be read or there are none.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: nothing in it")
    return lines


def class_names(classes: Sequence[object] | str, key: str = "CLASSES") -> tuple[str, ...]:
    """Return class names: as they are given, or of a file.

    Args:
        classes: names; or a file with a name a line; or a YAML file with `names`, as YOLO has it: a list, or
            a mapping from 0, 1, … to names.
        key: that holds them, for messages.

    Raises:
        UserError: if there are none, or a name occurs twice.
    """
    source = key
    if isinstance(classes, str):
        source = classes
        classes = _yaml_names(classes) if is_yaml(classes) else read_list(classes)
    # Types first: of aliases in YAML, the text of a list can be too long for any memory.
    if not classes or any(type(name) not in (str, int) or not str(name).strip() for name in classes):
        raise UserError(f"{source}: class names are {short(classes)}; they must be texts, at least one")
    names = tuple(str(name) for name in classes)
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f'{source}: the class name "{twice[0]}" is there twice')
    return names


def is_yaml(path: str) -> bool:
    """Tell whether a file is YAML, by its ending."""
    return path.lower().endswith((".yaml", ".yml"))


def read_yaml(path: str) -> dict[str, object]:
    """Read a YAML file of key: value pairs, without code.

    Raises:
        UserError: if the file is not YAML; the message names it.
    """
    content = yaml_text.read_yaml(path)
    return content if isinstance(content, dict) else {}


def _yaml_names(path: str) -> list[object]:
    names = read_yaml(path).get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{path}: names has the keys {short(list(names))}; they must be 0, 1, …")
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{path}: no list `names` in it")
    return names


def is_label_row(line: str) -> bool:
    """Tell whether a line can be a YOLO label: a class and at least four numbers."""
    fields = line.split()
    return len(fields) >= 5 and fields[0].isdecimal() and all(map(is_number, fields[1:]))


def is_number(text: str) -> bool:
    """Tell whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
