"""Find the images and annotations of a folder, and the entries of DATASETS.FOCAL that read them.

No annotation is read here: the readers of `focal_d2.data.readers` do that, with the entries.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from focal_d2.data.image_files import IMAGE_SUFFIXES
from focal_d2.data.readers.coco_file import read_coco_file
from focal_d2.data.readers.csv_file import image_names
from focal_d2.data.readers.image_folder import last_part, list_files
from focal_d2.data.readers.sniff import kind_of_file
from focal_d2.data.readers.texts import is_yaml, read_text, read_yaml
from focal_d2.errors import UserError, first_few

SPLITS = ("train", "val", "test")
# Words in names of files and folders -> the split that they mean.
_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Files of these endings may be annotations; of others, one of each ending is looked at for a message.
_ENDINGS = {".json": "coco", ".csv": "csv", ".tsv": "csv", ".xml": "voc", ".txt": "yolo"}
_PER_IMAGE = ("voc", "yolo")  # formats with a file for each image
# Files of one folder and ending that are looked at until one is known. Labels of images without objects are
# empty, and say nothing.
_LOOKS = 200
# A folder of images must have so many of the images that annotations name.
_ENOUGH = 0.5


class Source(NamedTuple):
    """Annotations, and the images that they belong to."""

    entry: dict[str, Any]  # of DATASETS.FOCAL, without NAME and CLASSES
    split: str | None  # train, val or test, as names say it; None: they say nothing
    path: str  # of the annotations, or of the list that chooses some of them, relative to the folder


class Contents(NamedTuple):
    """What a folder holds."""

    sources: list[Source]
    images: list[str]  # relative to the folder
    notes: list[str]  # what was left out, and why


def find_sources(folder: str, chosen: Sequence[str] = ()) -> Contents:
    """Find annotations of one format, and their images.

    Args:
        folder: to search, with all folders below it.
        chosen: files or folders of annotations; (): all below the folder.

    Raises:
        UserError: if there are no images, no annotations, or annotations of several formats.
    """
    files = [x for x in list_files(folder, ("",)) if not _is_hidden(x)]
    images = [x for x in files if x.lower().endswith(IMAGE_SUFFIXES)]
    others = [x for x in files if not x.lower().endswith(IMAGE_SUFFIXES)]
    if chosen:
        others = _chosen_files(folder, others, chosen)
    candidates, kinds = _candidates(folder, others)
    if not candidates:
        looked = "--annotations" if chosen else folder
        seen = [f"{path} {text}" for text, path in kinds.items()]
        raise UserError(
            f"{looked}: no annotations that can be read (a COCO JSON, VOC XML files, YOLO labels or a CSV "
            f"table with a box a line){'; ' + first_few(seen, 2, '; ') if seen else ''}"
        )
    if len(candidates) > 1:
        listed = "; ".join(f"{style}: {first_few(paths, 1)}" for style, paths in candidates.items())
        raise UserError(
            f"{folder}: annotations in {len(candidates)} formats ({listed}): choose with --annotations PATH"
        )
    ((style, paths),) = candidates.items()
    data_files = [x for x in paths if is_yaml(x)]
    if not images and not data_files:
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    finder = _Finder(folder, images, others)
    if data_files:
        sources = finder.of_data_file(data_files)
    elif style in _PER_IMAGE:
        sources = finder.per_image(style, paths)
    else:
        sources = finder.one_file_each(style, paths)
    sources, left_out = _without_copies(sources)
    return Contents(sources, images, [*finder.notes, *left_out])


def split_of(path: str) -> str | None:
    """Return the split that a path's names mean, those of its last part first; None: none.

    Examples:
        >>> split_of("annotations/instances_train2017.json"), split_of("valid/x.xml"), split_of("a/b.csv")
        ('train', 'val', None)
    """
    for part in reversed(path.split(os.sep)):
        for word in re.findall("[a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return None


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.split(os.sep))


def _chosen_files(folder: str, files: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Return the files that are, or are under, one of the paths.

    Raises:
        UserError: for a path that is not in the folder, or has no file.
    """
    kept: list[str] = []
    for path in chosen:
        relative = os.path.relpath(path, folder)
        below = [x for x in files if x == relative or relative == "." or x.startswith(relative + os.sep)]
        if not below:
            raise UserError(f"--annotations {path}: no such file or folder under {folder}")
        kept += below
    return list(dict.fromkeys(kept))


def _candidates(folder: str, files: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the files of annotations by format, and the first file of each kind that is not read.

    A YOLO data.yaml replaces the label files, which it names.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files:
        groups[os.path.dirname(path), os.path.splitext(path)[1].lower()].append(path)
    by_style: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for (_, ending), paths in groups.items():
        per_image = _ENDINGS.get(ending) in _PER_IMAGE
        for path in paths[: _LOOKS if ending in _ENDINGS or is_yaml(ending) else 1]:
            kind = kind_of_file(os.path.join(folder, path))
            if kind is None:
                continue
            if kind.style is None:
                kinds.setdefault(kind.text, path)
            elif per_image and kind.style == _ENDINGS[ending]:
                by_style[kind.style] += paths
                break
            elif _is_annotation(os.path.join(folder, path), kind.style):
                by_style[kind.style].append(path)
    data_files = [x for x in by_style["yolo"] if is_yaml(x)]
    if data_files:
        by_style["yolo"] = data_files
    return {style: paths for style, paths in by_style.items() if paths}, kinds


def _is_annotation(path: str, style: str) -> bool:
    """Tell a table of boxes from other tables, and a YOLO data.yaml from other files of names."""
    if style == "csv":
        return bool(image_names(path))
    if is_yaml(path):
        try:
            return any(read_yaml(path).get(split) for split in SPLITS)
        except UserError:
            return False
    return style == "coco"


class _Finder:
    """The files of a folder, by their names."""

    def __init__(self, folder: str, images: Sequence[str], others: Sequence[str]) -> None:
        self.folder, self.images, self.others = folder, images, others
        self.notes: list[str] = []
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in images:
            self._by_name[os.path.basename(path)].append(path)
            self._by_stem[os.path.splitext(os.path.basename(path))[0]].append(path)

    def of_data_file(self, paths: Sequence[str]) -> list[Source]:
        """Return the splits of a YOLO data.yaml."""
        nearest = min(path.count(os.sep) for path in paths)
        first, *rest = [path for path in paths if path.count(os.sep) == nearest]
        if rest:
            raise UserError(
                f"{self.folder}: several YOLO dataset files ({first_few([first, *rest], 3)}): choose with "
                "--annotations PATH"
            )
        whole = os.path.join(self.folder, first)
        content = read_yaml(whole)
        return [
            Source({"FORMAT": "yolo", "ANNOTATIONS": whole, "SPLIT": key}, key, f"{first}: {key}")
            for key in SPLITS
            if content.get(key)
        ]

    def one_file_each(self, style: str, paths: Sequence[str]) -> list[Source]:
        """Return the sources of formats that have all images in one file."""
        sources = []
        for path in paths:
            whole = os.path.join(self.folder, path)
            if style == "coco":
                names = [image.file_name for image in read_coco_file(whole).coco.images]
            else:
                names = image_names(whole)
            entry = {"FORMAT": style, **self._images_of(path, names), "ANNOTATIONS": whole}
            sources.append(Source(entry, split_of(path), path))
        return sources

    def per_image(self, style: str, paths: Sequence[str]) -> list[Source]:
        """Return the sources of formats that have a file for each image, one for each split."""
        lists = self._lists(style)
        if len({split for _, split in lists}) > 1:
            entry = self._entry(style, paths, None)
            return [
                Source({**entry, "LIST": os.path.join(self.folder, path)}, split, path)
                for path, split in lists
            ]
        by_split: dict[str | None, list[str]] = defaultdict(list)
        for path in paths:
            by_split[split_of(os.path.dirname(path))].append(path)
        sources = []
        for split, group in by_split.items():
            entry = self._entry(style, group, split)
            if split is None and len(by_split) > 1:
                self.notes.append(f"left out: {len(group)} files of no split, such as {group[0]}")
                continue
            path = os.path.relpath(entry["ANNOTATIONS"], self.folder)
            sources.append(Source(entry, split, "the labels" if path == os.curdir else path))
        return sources

    def _entry(self, style: str, paths: Sequence[str], split: str | None) -> dict[str, Any]:
        root = os.path.commonpath([os.path.dirname(path) or os.curdir for path in paths])
        names = [os.path.splitext(os.path.relpath(path, root))[0] for path in paths]
        images = self._common_root(names, root, split, stems=True)
        return {
            "FORMAT": style,
            "IMAGES": os.path.normpath(os.path.join(self.folder, images)),
            "ANNOTATIONS": os.path.normpath(os.path.join(self.folder, root)),
        }

    def _lists(self, style: str) -> list[tuple[str, str]]:
        """Return text files that list images (YOLO) or XML files (VOC) of a split, as VOC and Darknet do."""
        lists = []
        for path in self.others:
            stem, ending = os.path.splitext(os.path.basename(path))
            if ending != ".txt" or stem.lower() not in _WORDS or stem.lower() == "trainval":
                continue
            lines = [x for x in read_text(os.path.join(self.folder, path)).splitlines() if x.strip()]
            if not lines:
                continue
            is_image = lines[0].strip().lower().endswith(IMAGE_SUFFIXES)
            if is_image if style == "yolo" else last_part(lines[0].strip()) in self._by_stem:
                lists.append((path, _WORDS[stem.lower()]))
        return lists

    def _images_of(self, path: str, names: Sequence[str]) -> dict[str, str]:
        """Return IMAGES, and NAMES if it is needed, for annotations that name their images."""
        normal = [os.path.normpath(name.replace("\\", "/")) for name in names]
        root = self._common_root(normal, os.path.dirname(path), split_of(path), stems=False)
        keys = {"IMAGES": os.path.normpath(os.path.join(self.folder, root))}
        present = set(self.images)
        count = sum(os.path.normpath(os.path.join(root, name)) in present for name in normal)
        by_last = sum(len(self._by_name.get(last_part(name), ())) == 1 for name in normal)
        if count < _ENOUGH * len(normal) and by_last > count:
            return {"IMAGES": os.path.normpath(self.folder), "NAMES": "basename"}
        if not count:
            raise UserError(
                f"{path}: none of its {len(names)} images is under {self.folder}; the first is {names[0]}"
            )
        return keys

    def _common_root(self, names: Iterable[str], beside: str, split: str | None, *, stems: bool) -> str:
        """Return the folder under which most of the names are those of images.

        Args:
            names: relative to the folder that is searched for.
            beside: the folder of the annotations; of folders with as many of the images it is preferred.
            split: of the annotations; a folder of the same split is preferred before that.
            stems: the names have no ending.
        """
        count: Counter[str] = Counter()
        index, cut = (self._by_stem, _stem) if stems else (self._by_name, _same)
        for name in names:
            for path in index.get(os.path.basename(name), ()):
                text = cut(path)
                if text == name:
                    count["."] += 1
                elif text.endswith(os.sep + name):
                    count[text[: -len(name) - 1]] += 1
        if not count:
            folders = sorted({os.path.dirname(x) or "." for x in self.images})
            return os.path.commonpath(folders) if folders else "."
        labels_to_images = re.sub(r"(^|/)labels(?=/|$)", r"\1images", beside)

        def preference(root: str) -> tuple[object, ...]:
            near = os.path.normpath(root) in (os.path.normpath(beside or "."), labels_to_images)
            return -count[root], split_of(root) != split, not near, root.count(os.sep), root

        return min(count, key=preference)


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _same(path: str) -> str:
    return path


def _without_copies(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Leave out what names no split, where others do; refuse two files for one split.

    Returns:
        The sources, and lines about those that were left out.
    """
    if any(source.split for source in sources) and not all(source.split for source in sources):
        notes = [f"left out: {x.path}, whose name says no split" for x in sources if not x.split]
        return [x for x in sources if x.split], notes
    return list(sources), []
