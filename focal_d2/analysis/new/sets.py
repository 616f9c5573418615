"""The datasets of a new config: their entries, their tables, and what each is for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_d2.analysis.new.facts import Looked, look, map_extents
from focal_d2.analysis.new.find import Source
from focal_d2.analysis.new.names import read_names
from focal_d2.analysis.new.places import Places, find_places, overlaps
from focal_d2.analysis.new.split import TEST, TRAIN, VAL, propose_split, wanted_shares
from focal_d2.annotations import Table
from focal_d2.data.entries import images_of, read_entry
from focal_d2.data.readers.image_folder import list_files
from focal_d2.data.readers.texts import is_yaml
from focal_d2.data.readers.voc import read_voc
from focal_d2.errors import UserError, first_few

_SIDE_NAMES = {TRAIN: "train", VAL: "val", TEST: "test"}
_LONGEST_NAME = 60


class Part(NamedTuple):
    """A source and its table."""

    source: Source
    table: Table


class Dataset(NamedTuple):
    """An entry of DATASETS.FOCAL."""

    use: str  # train, val or test
    entry: dict[str, Any]  # with NAME and CLASSES; LIST is not among them if `images` is not None
    table: Table
    images: list[str] | None  # the lines of its LIST, which is to be written; None: all of its images


class Sets(NamedTuple):
    """The datasets, and why they are divided so."""

    datasets: list[Dataset]
    reason: str
    notes: list[str]
    places: Places  # of the images to train on, before a split
    looked: Looked  # at these images
    all_train: Table  # of the same images

    def tables(self, use: str) -> dict[str, Table]:
        """Return the tables of a use, by the datasets' names."""
        return {x.entry["NAME"]: x.table for x in self.datasets if x.use == use}


def read_sources(sources: Sequence[Source]) -> tuple[list[Part], list[str]]:
    """Read the annotations.

    Returns:
        The sources and their tables, and lines about what was left out: a set of a data.yaml that is not
        there, or that is the same as the one to train on.

    Raises:
        UserError: if annotations cannot be read.
    """
    parts, notes = list[Part](), list[str]()
    for source in sorted(sources, key=lambda x: (x.split != "train", x.split or "", x.path)):
        try:
            table = read_entry(source.entry)
        except UserError as error:
            if source.entry.get("SPLIT") in (None, "train"):
                raise
            notes.append(f"left out: {error}")
            continue
        files = set(table.file_names)
        same = next((x for x in parts if files & set(x.table.file_names)), None)
        common = len(files & set(same.table.file_names)) if same else 0
        if same is None or (source.split and source.split != same.source.split and common < len(files)):
            parts.append(Part(source, table))
        if same is None:
            continue
        if source.split is None or source.split == same.source.split:
            raise UserError(
                f"{source.path} and {same.source.path} annotate the same images: choose with --annotations "
                "PATH"
            )
        if common < len(files):
            notes.append(f"careful: {common} images of {source.path} are also in {same.source.path}")
        else:
            notes.append(f"left out: {source.path} has the same images as {same.source.path}")
    return parts, notes


def unite_classes(parts: Sequence[Part]) -> tuple[list[Part], list[str]]:
    """Give all tables the same classes, those of the first one first; leave out those without any box.

    Returns:
        The sources with CLASSES and their tables, and lines about classes that were left out.

    Raises:
        UserError: for YOLO labels whose numbers mean different classes.
    """
    lists = [list(part.table.classes) for part in parts]
    longest = max(lists, key=len)
    style = parts[0].source.entry["FORMAT"]
    notes: list[str] = []
    if style == "yolo":  # a label is a number
        for part, classes in zip(parts, lists, strict=True):
            if classes != longest[: len(classes)]:
                raise UserError(
                    f"{part.source.path} has the classes {first_few(classes)}, another set "
                    f"{first_few(longest)}: a number must mean the same class in both"
                )
        names = longest
    else:
        names = list(dict.fromkeys(name for classes in lists for name in classes))
        used = {part.table.classes[k] for part in parts for k in np.unique(part.table.labels) if k >= 0}
        unused = [name for name in names if name not in used]
        if unused and used:
            notes.append(f"left out: classes without any box: {first_few(unused)}")
            names = [name for name in names if name in used]
    if not any(part.table.objects.any() for part in parts):
        raise UserError(f"{parts[0].source.path}: no box in it, so that there is nothing to train on")
    united = []
    for source, table in parts:
        label = {name: k for k, name in enumerate(names)}
        new = np.array([label.get(name, -1) for name in table.classes] or [0])
        labels = np.where(table.labels < 0, table.labels, new[table.labels])
        entry = {**source.entry, "CLASSES": names}
        changed = replace(table, classes=tuple(names), labels=labels, category_ids=tuple(range(len(names))))
        united.append(Part(source._replace(entry=entry), changed))
    return united, notes


def divide(parts: Sequence[Part], name: str, *, seed: int, max_pixels: int) -> Sets:
    """Take the sets that are there, and cut those that are missing from the images to train on.

    Args:
        parts: of all sets, with the same classes.
        name: that the datasets' names begin with.
        seed: of a split.
        max_pixels: of an image that is looked at.

    Raises:
        UserError: if there are no images to train on, or a split is not possible.
    """
    given = {part.source.split for part in parts}
    if given in ({"val"}, {"test"}) or ("train" not in given and None not in given):
        raise UserError(
            f"there is only a set called {' and '.join(sorted(x for x in given if x))} "
            f"({first_few(part.source.path for part in parts)}), and none to train on"
        )
    train = [part for part in parts if part.source.split in (None, "train")]
    others = [part for part in parts if part.source.split not in (None, "train")]
    table = Table.joined([part.table for part in train])
    cut = "val" not in given
    looked = look(table, search=cut, max_pixels=max_pixels, seed=seed)
    places = find_places(
        read_names(_stems(table)),
        table.sizes,
        shared=looked.shared,
        alike=looked.alike,
        on_map=map_extents(table),
        exact=looked.exact,
        classes=[frozenset(x.tolist()) for x in table.image_classes()],
    )
    notes: list[str] = []
    datasets: list[Dataset] = []
    if cut:
        shares = wanted_shares(len(table), int(table.objects.sum()), test="test" not in given)
        proposal = propose_split(places, _counts(table), shares, seed=seed)
        reason = proposal.reason
        if not looked.searched:
            notes.append("only equal images were searched for, and no overlaps: there are too many pixels")
        whole = f"cut from {first_few(part.source.path for part in train)}"
        reason = f"{_sizes(proposal.sides)}, {whole}; {reason}"
        datasets += _by_side(train, proposal.sides, name)
    else:
        reason = f"the sets of the folder are taken: {first_few([part.source.path for part in parts], 6)}"
        datasets += _whole(train, "train", name)
        notes += _same_places(train, others)
    for use in ("val", "test"):
        datasets += _whole([part for part in others if part.source.split == use], use, name)
    if not any(x.use == "test" for x in datasets):
        notes.append(
            "no test set: the best checkpoint is chosen on the validation set, whose AP is therefore a "
            "little too high"
        )
    return Sets(datasets, reason, notes, places, looked, table)


def _counts(table: Table) -> np.ndarray:
    """Return each image's boxes of each class, and in the last column whether it has none, (N, K + 1)."""
    counts = np.zeros((len(table), len(table.classes) + 1))
    np.add.at(counts, (table.image[table.objects], table.labels[table.objects]), 1)
    counts[:, -1] = counts.sum(axis=1) == 0
    return counts


def dataset_name(folder: str) -> str:
    """Return a folder's name as the beginning of datasets' names: letters, digits, dots, - and _.

    It begins with "my_" if datasets of detectron2 or of this package have these names already.
    """
    last = os.path.basename(os.path.abspath(folder))
    name = re.sub(r"[^\w.-]+", "_", last, flags=re.ASCII).strip("._")[:_LONGEST_NAME] or "mine"
    taken = [x for x in (f"{name}_{use}" for use in _SIDE_NAMES.values()) if x in DatasetCatalog]
    others = [x for x in taken if not MetadataCatalog.get(x).get("from_focal_yaml", False)]
    return f"my_{name}" if others else name


def _stems(table: Table) -> list[str]:
    root = os.path.commonpath([os.path.dirname(x) for x in table.file_names]) if len(table) else ""
    return [os.path.splitext(os.path.relpath(x, root or os.curdir))[0] for x in table.file_names]


def _sizes(sides: np.ndarray) -> str:
    return ", ".join(
        f"{(sides == side).sum()} images to {use}"
        for side, use in ((TRAIN, "train"), (VAL, "validate"), (TEST, "test"))
        if (sides == side).any()
    )


def _whole(parts: Sequence[Part], use: str, name: str) -> list[Dataset]:
    return [
        Dataset(
            use, {"NAME": _numbered(f"{name}_{use}", i, len(parts)), **part.source.entry}, part.table, None
        )
        for i, part in enumerate(parts)
    ]


def _numbered(name: str, i: int, count: int) -> str:
    return name if count == 1 else f"{name}_{i + 1}"


def _by_side(parts: Sequence[Part], sides: np.ndarray, name: str) -> list[Dataset]:
    """Make a dataset of each side of each part."""
    firsts = np.cumsum([0, *(len(part.table) for part in parts)])
    datasets = []
    for side, use in _SIDE_NAMES.items():
        for i, part in enumerate(parts):
            rows = np.flatnonzero(sides[firsts[i] : firsts[i + 1]] == side)
            if not len(rows):
                continue
            table = part.table.of_images(rows.tolist())
            entry = {"NAME": _numbered(f"{name}_{use}", i, len(parts)), **part.source.entry}
            entry.pop("LIST", None)
            datasets.append(Dataset(use, entry, table, list_lines(part, table)))
    return datasets


def list_lines(part: Part, table: Table) -> list[str]:
    """Return the lines of a LIST for some of a source's images, sorted.

    Raises:
        UserError: if a name cannot be a line.
    """
    entry = part.source.entry
    if entry["FORMAT"] == "voc":
        names = _xml_names(entry, part.table)
        lines = [names[os.path.abspath(x)] for x in table.file_names]
    else:
        annotations = entry["ANNOTATIONS"]
        root = os.path.dirname(annotations) if is_yaml(annotations) else entry["IMAGES"]
        lines = [os.path.relpath(x, root or os.curdir) for x in table.file_names]
    for line in lines:
        if line != line.strip() or len(line.splitlines()) != 1:
            raise UserError(f"{line!r}: an image with such a name can't be in a list: rename it")
    return sorted(lines)


def _xml_names(entry: Mapping[str, Any], table: Table) -> dict[str, str]:
    """Return the name of the XML file of each of a source's images, without ending, by the image's path."""
    images, paths = images_of(dict(entry)), {os.path.abspath(x) for x in table.file_names}
    names: dict[str, str] = {}
    unclear = []
    for file in list_files(entry["ANNOTATIONS"], (".xml",)):
        stem = os.path.splitext(file)[0]
        of_stem = [os.path.abspath(os.path.join(images.root, x)) for x in images.with_stem(stem)]
        if len(of_stem) == 1 and of_stem[0] in paths:
            names[of_stem[0]] = stem
        else:
            unclear.append(stem)
    for stem in unclear if len(names) < len(paths) else ():  # the file's <filename> decides
        (path,) = read_voc(entry["ANNOTATIONS"], images, entry.get("CLASSES"), [stem]).file_names
        names.setdefault(os.path.abspath(path), stem)
    return names


def _same_places(train: Sequence[Part], others: Sequence[Part]) -> list[str]:
    """Return a line for each set whose images, by their names, show the same as some to train on."""
    tables = [Table.joined([part.table for part in train]), *(part.table for part in others)]
    both = Table.joined(tables)
    places = find_places(read_names(_stems(both)), both.sizes)
    owner = np.repeat(np.arange(len(tables)), [len(x) for x in tables])
    copies = np.isnan(places.extents).all()
    notes = []
    for k, part in enumerate(others, 1):
        rows, trained = np.flatnonzero(owner == k), np.flatnonzero(owner == 0)
        hits = [
            int(i)
            for i in rows
            if (
                (places.groups[trained] == places.groups[i])
                & (overlaps(places.extents[trained], places.extents[i]) | copies)
            ).any()
        ]
        if hits:
            notes.append(
                f"careful: {len(hits)} of {len(rows)} images of {part.source.path} show, by their names, the "
                f"same as images to train on (the first: {both.file_names[hits[0]]}): AP there is too high"
            )
    return notes
