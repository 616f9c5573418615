"""Checks of class names and of the number of boxes of each class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES
from focal_d2.data.checks.findings import Finding, Fix, share
from focal_d2.errors import first_few

# Fewer boxes than these are too few to learn from, or a slip of the annotator.
_RARE = 10


def class_counts(tables: Mapping[str, Table]) -> Counter[str]:
    """Count the objects of each class by name, over datasets; see `Table.objects`."""
    counts: Counter[str] = Counter()
    for table in tables.values():
        counts.update(dict.fromkeys(table.classes, 0))
        valid = table.labels[table.objects]
        valid = valid[(valid >= 0) & (valid < len(table.classes))]
        for name, count in zip(table.classes, np.bincount(valid, minlength=len(table.classes)), strict=True):
            counts[name] += int(count)
    return counts


def check_classes(
    train: Mapping[str, Table], test: Mapping[str, Table], *, counted_by: str, num_classes: int | None
) -> list[Finding]:
    """Check the classes of the datasets against each other and the model.

    Args:
        train: the datasets to train on, by name.
        test: those to test on.
        counted_by: the key that counts the model's classes.
        num_classes: its value; None: it is not known which key that is.
    """
    findings = []
    datasets = {**train, **test}
    lists: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, table in datasets.items():
        lists[table.classes].append(name)
    for classes, names in lists.items():
        if num_classes not in (None, len(classes)):
            message = f"{len(classes)} classes, but {counted_by} is {num_classes}"
            fixes = [Fix(f"the classes of {names[0]}", counted_by, len(classes))]
            findings.append(Finding("class-count", message, ", ".join(names), len(classes), fixes=fixes))
    (first, _), *others = lists.items() or [((), [])]
    for classes, names in others:
        at = next((k for k, (a, b) in enumerate(zip(first, classes, strict=False)) if a != b), None)
        of, first_of = ", ".join(names), lists[first][0]
        message = (
            f"{len(classes)} classes instead of {len(first)}, the first ones alike"
            if at is None
            else f'class {at} is "{classes[at]}", in {first_of} it is "{first[at]}"'
        )
        fixes = [Fix(f"DATASETS.FOCAL, entries {of} and {first_of}: the same CLASSES, in the same order")]
        findings.append(Finding("class-names", message, of, len(names), fixes=fixes))
    findings += _check_names(datasets)
    if train:
        annotated = any(table.annotated for table in test.values())
        findings += _check_counts(class_counts(train), class_counts(test), with_test=annotated)
    return findings


def _check_names(datasets: Mapping[str, Table]) -> list[Finding]:
    alike = defaultdict(set)
    for table in datasets.values():
        for name in table.classes:
            alike["".join(name.split()).casefold()].add(name)
    pairs = [sorted(names) for names in alike.values() if len(names) > 1]
    if not pairs:
        return []
    groups = first_few([", ".join(f'"{name}"' for name in names) for names in pairs], MOST_EXAMPLES, "; ")
    return [Finding("class-alike", f"written in different ways: {groups}", count=len(pairs))]


def _check_counts(train: Counter[str], test: Counter[str], *, with_test: bool) -> list[Finding]:
    findings = []
    known = {**train, **test}
    missing = [k for k in train if train[k] and not test[k]] if with_test else []
    for code, names, what in (
        ("class-unused", [k for k in known if not train[k] and not test[k]], "have no box"),
        ("class-not-in-test", missing, "have no box to test on"),
        ("class-not-in-train", [k for k in test if test[k] and not train[k]], "have no box to train on"),
        (
            "class-rare",
            [k for k in train if 0 < train[k] < _RARE],
            f"have fewer than {_RARE} boxes to train on",
        ),
    ):
        if names:
            counted = [f"{name} ({train[name]})" if code == "class-rare" else name for name in names]
            message = f"{share(len(names), len(known))} classes {what}: {first_few(counted, 10)}"
            findings.append(Finding(code, message, count=len(names)))
    return findings
