"""What the readers share: texts from files, paths under a root, and rows that become a `Table`."""

from __future__ import annotations

import functools
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.pixels import IMAGE_SUFFIXES, UNREADABLE, upright_size, why_unreadable
from focal_d2.errors import UserError
from focal_d2.storage import yaml_text

_BOM = b"\xef\xbb\xbf"
# Larger numbers are no pixels: they overflow where sizes are multiplied.
MOST_PIXELS = 2**24
# Ends the line that refuses an image for its place.
UNLESS_OUTSIDE = (
    " (coco, voc, csv: OUTSIDE: true lets names leave IMAGES; NAMES: basename takes the last part of each)"
)


class Box(NamedTuple):
    """One object of an image, before its class has a number."""

    corners: tuple[float, float, float, float]  # left, top, width, height, pixels
    name: str  # of its class
    ignored: bool
    item: str  # where it stands, for messages


def read_bytes(path: str | Path) -> bytes:
    """Read a file without its byte order mark.

    Raises:
        UserError: if it can't be read.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path}: not a file")  # a pipe would be waited for
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    return data.removeprefix(_BOM)


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


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def short(value: object) -> str:
    """Write a value of any size in a few characters of one line."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return " ".join(brief.repr(value).split())


def path_under(root: str, name: str, *, outside: bool = False) -> str | None:
    """Join an image's name to its folder; None if that leaves the folder or is no path.

    A link in the folder is followed: who put it there could have put the file there.

    Args:
        root: the folder.
        name: of the image.
        outside: it may leave the folder.
    """
    if not name.strip() or "\0" in name:
        return None
    path = os.path.normpath(os.path.join(root, name))
    inside = os.path.join(os.path.abspath(root), "")
    return path if outside or os.path.abspath(path).startswith(inside) else None


class ImageFolder:
    """The folder of a dataset's images: which file a name in the annotations means."""

    def __init__(self, root: str, *, outside: bool = False, basename: bool = False) -> None:
        """Look at no file yet.

        Args:
            root: the folder.
            outside: names may leave the folder.
            basename: only the last part of a name counts; its file may be in any folder under the root.
        """
        self.root, self.outside, self.basename = root, outside, basename
        self._paths: dict[str, tuple[str | None, str]] = {}
        self._name_of: dict[str, str] = {}  # of each path that was found by the last part of a name

    @classmethod
    def of(cls, images: ImageFolder | str) -> ImageFolder:
        """Return the folder of a path, for a reader that is called without options."""
        return cls(images) if isinstance(images, str) else images

    def path(self, name: str) -> tuple[str | None, str]:
        """Return the file that a name means, whether it is there or not.

        Where there is no file of that name, `\\` in it is read as `/`: Windows programs write it.

        Returns:
            The path and an empty text; or None and why the name is refused, as the end of a sentence.
        """
        if name not in self._paths:
            self._paths[name] = self._by_last_part(name) if self.basename else self._as_it_is(name)
        return self._paths[name]

    def holds(self, name: str) -> bool:
        """Tell whether a name means a file that is there."""
        path, _ = self.path(name)
        return path is not None and os.path.isfile(path)

    def with_stem(self, stem: str) -> list[str]:
        """Return the names of the images that are called `stem` (`folder/name`) and have a known ending."""
        return self._by_stem.get(os.path.normpath(stem), [])

    def shortened(self, name: str) -> str:
        """Return a name without its first folders, as few as needed for a file to be there; else as it is.

        Lists of images are often relative to a folder above the images.

        Args:
            name: of an image, with `/` or `\\`.
        """
        parts = re.split(r"[\\/]", name)
        tails = (os.path.join(*parts[i:]) for i in range(1, len(parts)) if all(parts[i:]))
        return name if self.holds(name) else next(filter(self.holds, tails), name)

    def hint(self, path: str) -> str:
        """Return the end of a message on an image that is missing: what would find it, if anything would."""
        if self.basename or os.path.exists(path) or not os.path.isdir(self.root):
            return ""
        if last_part(path) not in self._by_basename:
            return ""
        return "; NAMES: basename takes the last part of each name, of which there is a file under IMAGES"

    def _as_it_is(self, name: str) -> tuple[str | None, str]:
        path = path_under(self.root, name, outside=self.outside)
        if "\\" in name and not (path and os.path.exists(path)):
            slashes = path_under(self.root, name.replace("\\", "/"), outside=self.outside)
            if slashes and os.path.isfile(slashes):
                path = slashes
        if path is None:
            return None, f"{short(name)} is not a path under {self.root}{UNLESS_OUTSIDE}"
        return path, ""

    def _by_last_part(self, name: str) -> tuple[str | None, str]:
        last = last_part(name)
        files = self._by_basename.get(last, [])
        if len(files) > 1:
            return None, f"{short(name)} means {len(files)} files under {self.root}: {listed(sorted(files))}"
        path = path_under(self.root, files[0] if files else last)
        if path is None:
            return None, f"{short(name)} has no last part"
        earlier = self._name_of.setdefault(path, name)
        if earlier != name:
            return None, f"{short(name)} has the same last part as {short(earlier)} (NAMES: basename)"
        return path, ""

    @functools.cached_property
    def _by_basename(self) -> dict[str, list[str]]:
        """Names of the files under the root, by their last part."""
        names: dict[str, list[str]] = {}
        for file in list_files(self.root, ("",)):
            names.setdefault(os.path.basename(file), []).append(file)
        return names

    @functools.cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Names of the images under the root, by their path without ending."""
        names: dict[str, list[str]] = {}
        for file in list_files(self.root, IMAGE_SUFFIXES):
            names.setdefault(os.path.splitext(file)[0], []).append(file)
        return names


def image_size(path: str) -> tuple[int, int]:
    """Return an image's height and width, as it is upright.

    Raises:
        UserError: naming the file, if it can't be read.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a file")  # a pipe would be waited for
        return upright_size(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read the image {path}: {why_unreadable(path, error)}") from error


def last_part(name: str) -> str:
    """Return what follows the last `/` or `\\` of a name."""
    return re.split(r"[\\/]", name)[-1]


def no_folder(path: str) -> str:
    """Say why a path is no folder."""
    return "a file, where a folder is needed" if os.path.exists(path) else "no such folder"


def list_files(root: str, suffixes: Sequence[str]) -> list[str]:
    """List the files under a folder by their endings, as sorted paths relative to it.

    Links to folders are followed, but into no folder twice, so that a circle of links ends.

    Raises:
        UserError: if there is no such folder.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: {no_folder(root)}")
    files, entered = [], {os.path.realpath(root)}
    for folder, below, names in os.walk(root, followlinks=True):
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            if real in entered:
                below.remove(name)
            entered.add(real)
        below.sort()
        files += [os.path.join(folder, name) for name in names if name.lower().endswith(tuple(suffixes))]
    return sorted(os.path.relpath(file, root) for file in files)


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
        UserError: if there are none, or two alike.
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
        raise UserError(f'{source}: the class name "{twice[0]}" stands there twice')
    return names


def is_yaml(path: str) -> bool:
    """Tell whether a file is YAML, by its ending."""
    return path.lower().endswith((".yaml", ".yml"))


def read_yaml(path: str) -> dict[str, object]:
    """Read a YAML file of key: value pairs, without code.

    Raises:
        UserError: naming the file, if it is none.
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


def corner_problem(corners: Sequence[float]) -> str | None:
    """Say what is wrong with a box (left, top, width, height), or None."""
    if not all(math.isfinite(x) for x in corners):
        return "a coordinate that is not a number or infinite"
    if min(corners[2:]) < 0:
        return "a negative width or height"
    if max(map(abs, corners)) > MOST_PIXELS:
        return f"a coordinate beyond {MOST_PIXELS} pixels"
    return None


class Rows:
    """Images and boxes on their way into a `Table`, for formats that name classes by text."""

    def __init__(self, images: ImageFolder, classes: Sequence[str] | None, source: str) -> None:
        """Start with nothing.

        Args:
            images: the folder of the images.
            classes: the class names, or None to take those that occur.
            source: the file or folder of the annotations, for messages.
        """
        if not os.path.isdir(images.root):
            raise UserError(f"IMAGES: {images.root}: {no_folder(images.root)}")
        self.images, self.classes, self.source = images, classes, source
        self.problems: list[str] = []
        self._known = frozenset(classes or ())
        self._images: dict[str, tuple[int, int]] = {}
        self._boxes: dict[str, list[Box]] = {}

    def problem(self, item: str, text: str) -> None:
        """Note what is wrong with an item."""
        self.problems.append(f"{item}: {text}")

    def add_image(self, name: str, item: str, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Add an image, or add to one.

        Args:
            name: of its file, under the root.
            item: where it is named.
            size: height and width as annotated; None to read them from the file.

        Returns:
            Its size, or None if it was set aside.
        """
        path, refused = self.images.path(name)
        if path is None:
            self.problem(item, f"the image {refused}")
            return None
        if path not in self._images:
            if size is None:
                try:
                    size = image_size(path)
                except UserError as error:
                    self.problem(item, f"{error}{self.images.hint(path)}")
                    return None
            if not all(0 < x <= MOST_PIXELS for x in size):
                self.problem(item, f"the image {path} has the height and width {size}")
                return None
            self._images[path] = size
            self._boxes[path] = []
        return self._images[path]

    def add_box(self, name: str, box: Box) -> None:
        """Add a box to an image that was added."""
        wrong = corner_problem(box.corners)
        if wrong:
            self.problem(
                box.item, f"the box {short(list(box.corners))} (left, top, width, height) has {wrong}"
            )
        elif not box.name.strip():
            self.problem(box.item, "no class name")
        elif self.classes is not None and box.name not in self._known:
            self.problem(
                box.item, f'the class "{short(box.name)[1:-1]}" is not one of {listed(self.classes)}'
            )
        else:
            path, _ = self.images.path(name)
            assert path is not None
            self._boxes[path].append(box)

    def __contains__(self, name: str) -> bool:
        return self.images.path(name)[0] in self._images

    def names(self) -> set[str]:
        """Return the classes of the boxes so far."""
        return {box.name for boxes in self._boxes.values() for box in boxes}

    def table(self) -> Table:
        """Return what was added, images in order of name.

        Raises:
            UserError: if there is no image, or no class.
        """
        paths = sorted(self._images)
        if not paths:
            reason = f": {self.problems[0]}" if self.problems else ""
            raise UserError(f"{self.source}: no images in it{reason}")
        found = [(i, box) for i, path in enumerate(paths) for box in self._boxes[path]]
        classes = self.classes
        if classes is None:
            classes = sorted(self.names(), key=_number_first)
        if not classes:
            reason = f": {self.problems[0]}" if self.problems else ": name them with CLASSES"
            raise UserError(f"{self.source}: no boxes, so no class names{reason}")
        places = {name: k for k, name in enumerate(classes)}
        boxes = np.array([box.corners for _, box in found], dtype=np.float64).reshape(-1, 4)
        return Table(
            classes=tuple(classes),
            category_ids=tuple(range(1, len(classes) + 1)),
            file_names=paths,
            image_ids=np.arange(1, len(paths) + 1),
            sizes=np.array([self._images[path] for path in paths], dtype=np.int64).reshape(-1, 2),
            image=np.array([i for i, _ in found], dtype=np.int64),
            boxes=boxes,
            labels=np.array([places[box.name] for _, box in found], dtype=np.int64),
            ignored=np.array([box.ignored for _, box in found], dtype=bool),
            areas=boxes[:, 2] * boxes[:, 3],
            problems=self.problems,
        )


def _number_first(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value, before names."""
    # Nobody counts classes with more digits, and Python refuses to read thousands of them.
    return (False, int(name), name) if name.isdecimal() and len(name) < 20 else (True, 0, name)


def listed(names: Sequence[str] | Mapping[str, object]) -> str:
    """Write names, the first few of many."""
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")
