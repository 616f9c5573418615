"""Checks of a dataset's list of images: unreadable items, repeated ids and files, images without boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES, box_examples
from focal_d2.data.checks.findings import Example, Finding, Fix, share
from focal_d2.ops.common import ANY_CLASS

# Of the images; COCO's training set has 1 %.
_MANY_NEGATIVES = 0.1


def check_items(name: str, table: Table) -> list[Finding]:
    """Check one dataset's list of images and its labels; `check_boxes` checks the boxes.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    findings = []
    if table.problems:
        examples = [Example("", problem) for problem in table.problems[:MOST_EXAMPLES]]
        message = f"{len(table.problems)} items of the annotations cannot be read"
        findings.append(Finding("item-unreadable", message, name, len(table.problems), examples))
    if not len(table):
        return [*findings, Finding("dataset-empty", "no images in it", name)]
    wrong = (table.labels < 0) | (table.labels >= len(table.classes))
    wrong &= ~table.ignored | (table.labels != ANY_CLASS)
    if wrong.any():
        examples = box_examples(table, wrong, lambda i: f"label {table.labels[i]}")
        message = f"{share(int(wrong.sum()), wrong.size)} labels are not in [0, {len(table.classes)})"
        findings.append(Finding("class-index", message, name, int(wrong.sum()), examples))
    _, first = np.unique(table.image_ids, return_index=True)
    if first.size < len(table):
        again = np.setdiff1d(np.arange(len(table)), first)
        examples = [Example(table.file_names[i], f"id {table.image_ids[i]}") for i in again[:MOST_EXAMPLES]]
        message = f"{share(again.size, len(table))} images have the id of another one"
        findings.append(Finding("image-id-repeated", message, name, again.size, examples))
    ignored = int(table.ignored.sum())
    if ignored:
        message = f"{share(ignored, table.ignored.size)} boxes are crowds or difficult objects"
        findings.append(Finding("boxes-ignored", message, name, ignored))
    paths = Counter(table.file_names)
    repeated = [path for path, times in paths.items() if times > 1]
    if repeated:
        examples = [Example(path, f"{paths[path]} times") for path in repeated[:MOST_EXAMPLES]]
        message = f"{share(len(repeated), len(paths))} files are in the list more than once"
        findings.append(Finding("image-repeated", message, name, len(repeated), examples))
    return findings


def without_boxes(table: Table) -> int:
    """Count the images that have no object; see `Table.objects`."""
    return len(table) - np.unique(table.image[table.objects]).size


def check_negatives(
    train: Mapping[str, Table], test: Mapping[str, Table], *, filter_empty: bool
) -> list[Finding]:
    """Count the images without boxes, and say whether they are trained on.

    Args:
        train: the datasets to train on, by name; some may be of images without boxes only.
        test: those to test on.
        filter_empty: `DATALOADER.FILTER_EMPTY_ANNOTATIONS`.
    """
    findings = []
    for names in ([*train], *([name] for name in test if name not in train)):
        tables = [table for table in ({**train, **test}[name] for name in names) if table.annotated]
        images = sum(map(len, tables))
        if images and sum(map(without_boxes, tables)) == images:
            findings.append(Finding("dataset-empty", f"none of {images} images has a box", ", ".join(names)))
    for name, table in train.items():
        empty, images = without_boxes(table), len(table)
        if empty and filter_empty and empty >= _MANY_NEGATIVES * images:
            message = f"{share(empty, images)} images have no box and are left out of training"
            fix = Fix("train on images without boxes too", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
            findings.append(Finding("negatives-dropped", message, name, empty, fixes=[fix]))
        elif empty:
            fate = "are left out of training" if filter_empty else "are trained on"
            message = f"{share(empty, images)} images have no box and {fate}"
            findings.append(Finding("images-without-boxes", message, name, empty))
    return findings
