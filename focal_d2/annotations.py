"""A dataset's annotations in columns, from the readers to AP, and the table of a registered dataset.

detectron2's records are made of a table once, for its loaders. Everything else takes the table itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from focal_d2.errors import UserError, first_few
from focal_d2.ops.common import ANY_CLASS

_BOX_COLUMNS = ("boxes", "labels", "ignored", "areas")
# Sides in pixels that are not longer are as good as none: detectron2 drops such boxes after clipping.
SHORTEST_SIDE = 1e-5


@dataclass(frozen=True)
class Table:
    """N images and B boxes. A million boxes take some 70 MB; as detectron2's records, ten times that.

    Attributes:
        classes: K names; a label is a position in this list.
        category_ids: (K,) the dataset's own numbers of the classes, written to prediction files.
        file_names: (N,) paths of the images.
        image_ids: (N,) int64.
        sizes: (N, 2) int64, height and width as annotated, in pixels.
        image: (B,) int64, the position of a box's image; ascending.
        boxes: (B, 4) float64, left, top, width, height in pixels.
        labels: (B,) int64 in [0, K); of an ignored region it may be `ANY_CLASS`.
        ignored: (B,) bool: crowds, difficult objects and the like, neither background nor counted in AP.
        areas: (B,) float64 square pixels; COCO's own where a file has them (of the mask), else of the box.
        annotated: whether the dataset says which objects there are; False: a test set that keeps them secret.
        problems: a line for each item that could not be read; those items are in no column.
        notes: lines for the log: what the reader decided that its user may not expect.
        warnings: the same, where the decision may be wrong.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    file_names: list[str]
    image_ids: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    areas: np.ndarray
    annotated: bool = True
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def has_area(self) -> np.ndarray:
        """(B,) bool: whether all numbers of a box are finite and both sides longer than `SHORTEST_SIDE`."""
        return np.isfinite(self.boxes).all(axis=1) & (self.boxes[:, 2:] > SHORTEST_SIDE).all(axis=1)

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """(B,) bool: whether a box has an area, and has one left when it is clipped to its image."""
        usable = self.has_area
        corners = self.boxes[usable]
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, np.tile(self.sizes[self.image[usable], ::-1], 2))
        usable[usable] = (corners[:, 2:] - corners[:, :2] > SHORTEST_SIDE).all(axis=1)
        return usable

    @functools.cached_property
    def objects(self) -> np.ndarray:
        """(B,) bool: boxes that are trained on and counted in AP; they are usable and not ignored."""
        return self.usable & ~self.ignored

    def image_classes(self, *, with_ignored: bool = False) -> list[np.ndarray]:
        """Return the different labels of each image's objects: N arrays, int64 ascending.

        Args:
            with_ignored: ignored regions count, too, unless they are of any class.
        """
        rows = self.usable & (self.labels != ANY_CLASS) if with_ignored else self.objects
        above = len(self.classes) + 1
        image, label = np.divmod(np.unique(self.image[rows] * above + self.labels[rows]), above)
        ends = np.searchsorted(image, np.arange(len(self) + 1)).tolist()
        return [label[start:end] for start, end in itertools.pairwise(ends)]

    def whole(self) -> Table:
        """Return the table itself.

        Raises:
            UserError: if some of its items could not be read.
        """
        if self.problems:
            raise UserError(first_few(self.problems, 1, "; "))
        return self

    def by_name(self) -> Table:
        """Return the same with images in order of their files' names."""
        return self.of_images(sorted(range(len(self)), key=self.file_names.__getitem__))

    def of_images(self, order: Sequence[int]) -> Table:
        """Return the same with some of the images, in this order, and their boxes."""
        position = np.full(len(self), -1, dtype=np.int64)
        position[order] = np.arange(len(order))
        image = position[self.image]
        rows = np.argsort(image, kind="stable")
        rows = rows[np.searchsorted(image[rows], 0) :]
        return replace(
            self,
            file_names=[self.file_names[i] for i in order],
            image_ids=self.image_ids[order],
            sizes=self.sizes[order],
            image=image[rows],
            **{name: getattr(self, name)[rows] for name in _BOX_COLUMNS},
        )

    def keep(self, classes: Sequence[str], *, ignore_others: bool) -> Table:
        """Return the same with some of the classes.

        Args:
            classes: the K names to keep, in the order of the labels to come. Those that are not among the
                table's are classes without boxes, named in `notes`.
            ignore_others: boxes of other classes become ignored regions of `ANY_CLASS`; False: they are left
                out, which makes them background.

        Raises:
            UserError: if the table has none of the classes.
        """
        known = {name: label for label, name in enumerate(self.classes)}
        notes = list(self.notes)
        unknown = [name for name in classes if name not in known]
        if len(unknown) == len(classes):
            raise UserError(
                f"KEEP: {first_few(classes)}: none of these is a class of the data "
                f"({first_few(self.classes)})"
            )
        if unknown:
            notes.append(f"KEEP: no class of the data is called {', '.join(unknown)}")
        new_label = np.full(len(self.classes), ANY_CLASS)
        for label, name in enumerate(classes):
            if name in known:
                new_label[known[name]] = label
        labels = new_label[self.labels]
        others = labels < 0
        rows = np.flatnonzero(~others | ignore_others)
        # A class that the data lack still needs a number of its own in prediction files.
        free = iter(range(max(self.category_ids) + 1, max(self.category_ids) + 1 + len(classes)))
        return replace(
            self,
            classes=tuple(classes),
            category_ids=tuple(self.category_ids[known[x]] if x in known else next(free) for x in classes),
            image=self.image[rows],
            boxes=self.boxes[rows],
            labels=labels[rows],
            ignored=(self.ignored | others)[rows],
            areas=self.areas[rows],
            notes=notes,
        )

    def records(self) -> list[dict[str, Any]]:
        """Return the images in detectron2's dataset format, boxes as floats in `BoxMode.XYWH_ABS`.

        Beside detectron2's keys an annotation has its "area"; its "category_id" may be `ANY_CLASS`. Boxes
        that are not usable are left out: no detection can match them. Records of a dataset that is not
        annotated have no "annotations", as detectron2 has it.
        """
        kept = self.usable
        ends = np.searchsorted(self.image[kept], np.arange(len(self)), side="right").tolist()
        boxes, labels = self.boxes[kept].tolist(), self.labels[kept].tolist()
        ignored, areas = self.ignored[kept].astype(int).tolist(), self.areas[kept].tolist()
        records, start = [], 0
        for name, image_id, (height, width), end in zip(
            self.file_names, self.image_ids.tolist(), self.sizes.tolist(), ends, strict=True
        ):
            annotations = [
                {
                    "bbox": boxes[i],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": labels[i],
                    "iscrowd": ignored[i],
                    "area": areas[i],
                }
                for i in range(start, end)
            ]
            start = end
            records.append(
                {
                    "file_name": name,
                    "image_id": image_id,
                    "height": height,
                    "width": width,
                    **({"annotations": annotations} if self.annotated else {}),
                }
            )
        return records

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """Put the images of several tables, at least one, one after the other.

        Classes of the same name become one class. A label that is no class of its table becomes K. Category
        ids are the labels; lines about the tables are left out.
        """
        classes = tuple(dict.fromkeys(name for table in tables for name in table.classes))
        new_label = {name: label for label, name in enumerate(classes)}
        labels = []
        for table in tables:
            known = np.array([new_label[name] for name in table.classes] + [len(classes)], dtype=np.int64)
            of_class = (table.labels >= 0) & (table.labels < len(table.classes))
            of_any_class = table.ignored & (table.labels == ANY_CLASS)
            labels.append(np.where(of_any_class, ANY_CLASS, known[np.where(of_class, table.labels, -1)]))
        firsts = np.cumsum([0, *map(len, tables[:-1])])
        columns = {
            name: np.concatenate([getattr(table, name) for table in tables])
            for name in ("image_ids", "sizes", "boxes", "ignored", "areas")
        }
        return cls(
            classes=classes,
            category_ids=tuple(range(len(classes))),
            file_names=[name for table in tables for name in table.file_names],
            image=np.concatenate([t.image + first for t, first in zip(tables, firsts, strict=True)]),
            labels=np.concatenate(labels),
            annotated=any(table.annotated for table in tables),
            **columns,
        )

    @classmethod
    def from_records(cls, records: Sequence[dict[str, Any]], classes: Sequence[str]) -> Table:
        """Take detectron2's dataset records; image ids that are not whole numbers become places in the list.

        Args:
            records: with "file_name", "height", "width" and "annotations".
            classes: K names.
        """
        pairs = [(i, a) for i, record in enumerate(records) for a in record.get("annotations", ())]
        boxes = np.array([a["bbox"] for _, a in pairs], dtype=np.float64).reshape(-1, 4)
        modes = np.array([a["bbox_mode"] for _, a in pairs], dtype=np.int64)
        for mode in set(modes.tolist()):
            boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYWH_ABS)
        areas = boxes[:, 2] * boxes[:, 3]
        ids = [record.get("image_id", i) for i, record in enumerate(records)]
        whole = all(isinstance(image_id, int) for image_id in ids)
        return cls(
            classes=tuple(classes),
            category_ids=tuple(range(len(classes))),
            file_names=[record["file_name"] for record in records],
            image_ids=np.array(ids if whole else range(len(ids)), dtype=np.int64),
            sizes=np.array([(r["height"], r["width"]) for r in records], dtype=np.int64).reshape(-1, 2),
            image=np.array([i for i, _ in pairs], dtype=np.int64),
            boxes=boxes,
            labels=np.array([a["category_id"] for _, a in pairs], dtype=np.int64),
            ignored=np.array([bool(a.get("iscrowd", 0)) for _, a in pairs], dtype=bool),
            annotated=not records or any("annotations" in record for record in records),
            areas=np.array([a.get("area", of_box) for (_, a), of_box in zip(pairs, areas, strict=True)]),
        )


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (M,) of boxes (M, 4) XYXY."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def has_table(name: str) -> bool:
    """Tell whether a dataset was registered with a table; others, such as detectron2's, have records only."""
    return MetadataCatalog.get(name).get("read_table") is not None


def registered_table(name: str) -> Table | None:
    """Return the table that a dataset was registered with, or None; items that can't be read in `problems`.

    Its class names and category ids are written to detectron2's metadata.

    Raises:
        UserError: if the files can't be read at all.
    """
    metadata = MetadataCatalog.get(name)
    read = metadata.get("read_table")
    if read is None:
        return None
    table: Table = read()
    metadata.set(
        thing_classes=list(table.classes),
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(table.category_ids)},
    )
    return table
