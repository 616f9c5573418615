"""Which images a user means: files, folders, patterns and videos, in an order that is the same every time."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from focal_d2.data.image_files import IMAGE_SUFFIXES
from focal_d2.errors import UserError, first_few, reason
from focal_d2.inference.video import VIDEO_SUFFIXES


@dataclass(frozen=True)
class Inputs:
    """Files to predict on.

    Attributes:
        files: paths as they were found; no file twice.
        root: folder in which all of them lie.
        start: the working folder, from which relative paths start.
        doubles: names relative to `root`, without ending, that several files have.
    """

    files: list[str]
    root: str
    start: str
    doubles: frozenset[str]

    @classmethod
    def of(cls, files: Sequence[str], folders: Sequence[str] = ()) -> Inputs:
        """Take files, and the folders that were searched for them."""
        files = list(dict.fromkeys(files))
        within = {os.path.abspath(os.path.dirname(file) or os.curdir) for file in files}
        root = os.path.commonpath({*map(os.path.abspath, folders), *within} or {os.curdir})
        inputs = cls(files, root, os.getcwd(), frozenset())
        return replace(inputs, doubles=_doubles(lambda: map(inputs.stem, files)))

    def name(self, file: str) -> str:
        """Return the path of a file relative to `root`, whatever the working folder is now."""
        return os.path.relpath(os.path.join(self.start, file), self.root)

    def stem(self, file: str) -> str:
        """Return `name` without its ending; where several files differ in that only, with "_jpg" and so."""
        stem, ending = os.path.splitext(self.name(file))
        return f"{stem}_{ending[1:]}" if stem in self.doubles else stem

    def digest(self) -> str:
        """Return a text that changes if a file is added, missing, or in another place of the list."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(os.fsencode(self.name(file)) + b"\0")
        return total.hexdigest()


def _doubles(texts: Callable[[], Iterable[str]]) -> frozenset[str]:
    """Return the texts that come more than once; only their hashes are kept in memory."""
    seen: set[int] = set()
    again: set[int] = set()
    for text in texts():
        (again if hash(text) in seen else seen).add(hash(text))
    counts = Counter(text for text in texts() if hash(text) in again)
    return frozenset(text for text, number in counts.items() if number > 1)


def find_inputs(texts: Sequence[str], *, besides: Path | None = None) -> Inputs:
    """Find the images and videos that a user names.

    Args:
        texts: files; folders, which are searched for images at every depth; and patterns such as
            "day?/**/*.jpg". Videos are files or match a pattern; folders are not searched for them.
        besides: a folder whose files are left out: the output of an earlier run.

    Raises:
        UserError: naming the text for which there is nothing, or the folder that can't be read.
    """
    hidden = None if besides is None else os.path.abspath(besides)
    files: list[str] = []
    folders: list[str] = []
    for text in texts:
        path = os.path.expanduser(text)
        if os.path.isdir(path):
            inside = [x for x in _images_in(path) if not _is_within(x, hidden)]
            if not inside:
                raise UserError(
                    f"{text}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}); videos are named singly"
                )
            folders.append(path)
        elif os.path.lexists(path):
            inside = [path]
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            inside = [
                x
                for x in matches
                if x.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)) and os.path.isfile(x)
            ]
            inside = [x for x in inside if not _is_within(x, hidden)]
            if not inside:
                raise UserError(f"{text}: no image or video has such a name")
        else:
            raise UserError(f"{text}: no such file or folder")
        files += inside
    return Inputs.of(files, folders)


def _images_in(folder: str) -> Iterator[str]:
    """Yield the images of a folder and of those below it, in order of their names; links are not followed."""
    problems: list[OSError] = []
    for where, below, names in os.walk(folder, onerror=problems.append):
        if problems:
            raise UserError(f"folder {problems[0].filename}: {reason(problems[0])}")
        below.sort()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(where, name)
    if problems:
        raise UserError(f"folder {problems[0].filename}: {reason(problems[0])}")


def _is_within(path: str, folder: str | None) -> bool:
    return folder is not None and os.path.abspath(path).startswith(os.path.join(folder, ""))


def check_not_overwritten(inputs: Inputs, output: Path) -> None:
    """Check that no image lies where the pictures of detections go.

    Raises:
        UserError: naming one that does.
    """
    folder = os.path.abspath(output / "pictures")
    inside = [file for file in inputs.files if _is_within(os.path.realpath(file), os.path.realpath(folder))]
    if inside:
        raise UserError(f"{first_few(inside, 1)} would be overwritten: choose another output folder")
