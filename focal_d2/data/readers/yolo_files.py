"""Where YOLO data keep their images, labels and class names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from focal_d2.data.image_files import IMAGE_SUFFIXES
from focal_d2.data.readers.image_folder import ImageFolder, list_files
from focal_d2.data.readers.texts import is_yaml, read_list, read_yaml, short
from focal_d2.errors import UserError, first_few

# Where tools leave class names: labelImg and makesense, CVAT, Roboflow's Darknet export, ultralytics.
_NAMES = ("classes.txt", "obj.names", "_darknet.labels")
_DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")
# Keys of a data.yaml that are texts or lists, but not the images of a split.
_NO_SPLITS = ("path", "names", "nc", "kpt_shape", "flip_idx", "download", "yaml_file")


class YoloFiles(NamedTuple):
    """Which label file belongs to which image.

    Attributes:
        images: the folder of the images.
        labels: of each image's name its label file, which need not be there.
        any_labels: whether any image, chosen or not, has a label file.
        without_image: text files beside the labels that belong to no image.
    """

    images: ImageFolder
    labels: dict[str, str]
    any_labels: bool
    without_image: list[str]


class AboutClasses(NamedTuple):
    """What a dataset's files say about its classes.

    Attributes:
        names_file: the file that names them; None if there is none.
        number: `nc` of this file, if it is a data.yaml that has it.
        keypoint_shape: `kpt_shape` of a data.yaml, or None.
    """

    names_file: str | None
    number: Any
    keypoint_shape: Any


def about_classes(annotations: str) -> AboutClasses:
    """Find the file that names the classes, and ultralytics' `nc` and `kpt_shape`.

    Args:
        annotations: the folder of labels, or a data.yaml.

    Returns:
        The names file is the data.yaml, or of the files that tools leave in the folder, else in one of the
        three above it, the nearest.
    """
    data = annotations if is_yaml(annotations) else _nearby(annotations, _DATA_FILES)
    content = read_yaml(data) if data else {}
    if is_yaml(annotations):
        names = annotations if "names" in content else None
    else:
        names = _nearby(annotations, (*_NAMES, *_DATA_FILES) if "names" in content else _NAMES)
    return AboutClasses(names, content.get("nc") if names == data else None, content.get("kpt_shape"))


def _nearby(folder: str, names: Sequence[str]) -> str | None:
    for up in range(4):  # data/labels/train or dataset/train/labels, and the file above both
        for name in names:
            path = os.path.normpath(os.path.join(folder, *[".."] * up, name))
            if os.path.isfile(path):
                return path
    return None


def files_of_folder(annotations: str, images: ImageFolder, chosen: Sequence[str] | None) -> YoloFiles:
    """Pair the images of a folder with the label files of another.

    Args:
        annotations: folder of the label files.
        images: folder of the images.
        chosen: names of images under their folder, or relative to a folder above it; None: all.

    Raises:
        UserError: if two different names in `chosen` mean one image.
    """
    stems = {os.path.splitext(x)[0]: x for x in list_files(annotations, (".txt",))}
    present = list_files(images.root, IMAGE_SUFFIXES)
    names = present if chosen is None else _chosen_images(chosen, images)

    def label_file(name: str) -> str:
        stem = os.path.splitext(name)[0]
        return os.path.join(annotations, stems.get(stem, f"{stem}.txt"))

    known = {os.path.splitext(name)[0] for name in (*present, *names)}
    without_image = [os.path.join(annotations, x) for stem, x in stems.items() if stem not in known]
    labels = {name: label_file(name) for name in names}
    return YoloFiles(images, labels, any(stem in stems for stem in known), without_image)


def _chosen_images(chosen: Sequence[str], images: ImageFolder) -> list[str]:
    """Return listed names relative to the images' folder, each once."""
    lines: dict[str, str] = {}
    for line in chosen:
        shortened = images.shortened(line)
        path, _ = images.path(shortened)
        name = shortened if path is None else os.path.relpath(path, images.root)
        earlier = lines.setdefault(name, line)
        if earlier != line and shortened != line:
            raise UserError(f"LIST: {short(earlier)} and {short(line)} both mean the image {path}")
    return list(lines)


def files_of_split(path: str, split: str | None, options: ImageFolder) -> YoloFiles:
    """Find the images of a split of a data.yaml, and their labels, as ultralytics does.

    Args:
        path: of the file.
        split: train, val, test, or another key of the file.
        options: whose `outside` and `basename` hold for the names in lists of images.

    Raises:
        UserError: naming the file, if it has no such split, or its folders or lists are not there.
    """
    content = read_yaml(path)
    # CVAT gives its subsets names of the user's.
    splits = [x for x, y in content.items() if y and isinstance(y, (str, list)) and x not in _NO_SPLITS]
    if split not in splits:
        raise UserError(
            f"{path}: SPLIT is {split}; the file has {first_few(splits) or 'no train, val or test'}"
        )
    beside = os.path.dirname(os.path.abspath(path))
    base = _paths(path, "path", content.get("path") or "")[0]
    sources = _paths(path, split or "", content[split])
    # Relative to the file, else to the working directory; else the file was moved together with its images.
    roots = [x for x in (os.path.join(beside, base), os.path.abspath(base), beside) if os.path.isdir(x)]
    images: list[str] = []
    label_files: list[str] = []
    for named in sources:
        source = _first_present(named, roots)
        if source is None:
            tried = ", ".join(dict.fromkeys(map(os.path.normpath, roots)))
            raise UserError(f"{path}: {split}: {short(named)} is not there; it was looked for in {tried}")
        if os.path.isdir(source):
            images += [os.path.join(source, name) for name in list_files(source, IMAGE_SUFFIXES)]
            folder = os.path.dirname(_label_stem(os.path.join(source, "x")))
            if os.path.isdir(folder):
                label_files += [os.path.join(folder, x) for x in list_files(folder, (".txt",))]
        elif source.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(
                f"{path}: {split}: {short(named)} is an image; it must be a folder of images, or a text file "
                "that lists images"
            )
        else:
            folders = [
                ImageFolder(x, outside=options.outside, basename=options.basename)
                for x in dict.fromkeys((os.path.dirname(source), *roots))
            ]
            images += [_listed_image(line, folders, source) for line in read_list(source)]
    images = list(dict.fromkeys(images))
    if not images:
        raise UserError(f"{path}: {split}: no images in {first_few(sources)}")
    stems = {os.path.splitext(x)[0]: x for x in label_files}
    labels = {x: stems.get(_label_stem(x), f"{_label_stem(x)}.txt") for x in images}
    root = os.path.commonpath(map(os.path.dirname, images))
    known = set(map(_label_stem, images))
    return YoloFiles(
        images=ImageFolder(root),
        labels={os.path.relpath(x, root): label_file for x, label_file in labels.items()},
        any_labels=any(map(os.path.isfile, labels.values())),
        without_image=[x for stem, x in stems.items() if stem not in known],
    )


def _paths(source: str, key: str, value: object) -> list[str]:
    """Return a path, or several, as a list."""
    paths: list[str] = []
    for path in value if isinstance(value, list) and value else [value]:
        if not isinstance(path, str):
            raise UserError(f"{source}: {key} is {short(path)}; it must be a path")
        paths.append(os.path.expanduser(path))
    return paths


def _first_present(name: str, roots: Sequence[str]) -> str | None:
    """Return the first path that exists; Roboflow writes `../train/images` for a folder beside the file."""
    names = dict.fromkeys((name, re.sub(r"^(\.\./)+", "", name)))
    paths = (os.path.normpath(os.path.join(root, x)) for x in names for root in roots)
    return next(filter(os.path.exists, paths), None)


def _listed_image(line: str, folders: Sequence[ImageFolder], source: str) -> str:
    """Return the path of an image that a list names, which need not be there.

    Raises:
        UserError: if the name leaves all folders, or several images have its last part.
    """
    refusals: list[str] = []
    paths: list[str] = []
    for folder in folders:
        path, refused = folder.path(folder.shortened(line))
        if path and os.path.isfile(path):
            return path
        paths += [path] if path else []
        refusals += [refused] if refused else []
    if not paths:
        raise UserError(f"{source}: the image {refusals[0]}")
    return paths[0]


def _label_stem(image: str) -> str:
    """Return an image's label file without ending: the last folder `images` becomes `labels`."""
    stem = os.path.splitext(image)[0]
    head, folder, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    return os.path.join(head, "labels", tail) if folder else stem
