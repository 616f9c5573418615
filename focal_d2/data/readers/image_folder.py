"""The folder of a dataset's images: paths below it, names of files, sizes."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence

from focal_d2.data.image_files import IMAGE_SUFFIXES, UNREADABLE, upright_size, why_unreadable
from focal_d2.data.readers.texts import short
from focal_d2.errors import UserError, first_few

MOST_FILES = 4_000_000  # in a folder of images: twice what Open Images has
MOST_FOLDERS = 100_000  # ImageNet has 22,000
# Ends the line that refuses an image for its place.
UNLESS_OUTSIDE = (
    " (coco, voc, csv: OUTSIDE: true lets names leave IMAGES; NAMES: basename takes the last part of each)"
)


def path_under(root: str, name: str, *, outside: bool = False) -> str | None:
    """Join an image's name to its folder; None if that leaves the folder or is no path.

    A link in the folder is followed: who put it there could have put the file there.

    Args:
        root: the folder.
        name: of the image.
        outside: it may leave the folder.
    """
    if not name.strip() or "\0" in name or not _is_encodable(name):
        return None
    path = os.path.normpath(os.path.join(root, name))
    inside = os.path.join(os.path.abspath(root), "")
    return path if outside or os.path.abspath(path).startswith(inside) else None


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a letter of UTF-16, which JSON can write
        return False
    return True


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
            return (
                None,
                f"{short(name)} means {len(files)} files under {self.root}: {first_few(sorted(files))}",
            )
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
        UserError: if there is no such folder, or it has more files and folders than any dataset.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: {no_folder(root)}")
    files, entered, count = [], {os.path.realpath(root)}, 0
    for folder, below, names in os.walk(root, followlinks=True):
        count += len(names)
        if count > MOST_FILES or len(entered) > MOST_FOLDERS:  # a data.yaml can name any folder, such as /
            raise UserError(f"{root}: more than {MOST_FILES:,} files or {MOST_FOLDERS:,} folders are in it")
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            if real in entered:
                below.remove(name)
            entered.add(real)
        below.sort()
        files += [os.path.join(folder, name) for name in names if name.lower().endswith(tuple(suffixes))]
    return sorted(os.path.relpath(file, root) for file in files)
