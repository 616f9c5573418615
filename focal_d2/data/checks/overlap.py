"""Checks for images that are in a list twice, or in two of training, validation and test."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES
from focal_d2.data.checks.findings import Example, Finding, share


def check_sides(train: Mapping[str, Table], test: Mapping[str, Table]) -> list[Finding]:
    """Find datasets that are both in `DATASETS.TRAIN` and in `DATASETS.VAL` or `DATASETS.TEST`.

    Args:
        train: the datasets to train on, by name.
        test: those to validate and to test on.
    """
    both = [name for name in train if name in test]
    message = "to train on and to test on: AP says how well it is learnt by heart"
    return [Finding("dataset-in-both", message, name, len(train[name])) for name in both]


def check_repeats(
    train: Mapping[str, Table], test: Mapping[str, Table], digests: Mapping[str, bytes]
) -> list[Finding]:
    """Find images that occur twice: as different files of one side, or in training and in test.

    Args:
        train: the datasets to train on, by name.
        test: those to test on; the ones that are in `train` too are not looked at again.
        digests: of the pixels of each file that was read; of the others the paths are compared.
    """
    test = {name: table for name, table in test.items() if name not in train}
    findings = []
    # Datasets to test on are measured one by one, so an image may be in two of them.
    units = [train, *({name: table} for name, table in test.items())]
    to_train, *to_test = contents = [_by_content(unit, digests) for unit in units]
    for unit, content in zip(units, contents, strict=True):
        again = [files for files in content.values() if len(files) > 1]
        if again:
            involved = dict.fromkeys(name for files in again for name, _ in files)
            examples = [Example(path, f"same as {files[0][1]}") for files in again for _, path in files[1:]]
            among = sum(len(dict.fromkeys(table.file_names)) for table in unit.values())
            message = (
                f"{share(len(examples), among)} images are there again, as another file or of another dataset"
            )
            findings.append(
                Finding(
                    "image-duplicate", message, ", ".join(involved), len(examples), examples[:MOST_EXAMPLES]
                )
            )
    for (name, table), content in zip(test.items(), to_test, strict=True):
        examples = []
        for key, files in content.items():
            if key in to_train:
                dataset, trained = to_train[key][0]
                for _, path in files:
                    same = "the same file is in" if path == trained else f"same as {trained} of"
                    examples.append(Example(path, f"{same} {dataset}"))
        if examples:
            message = f"{share(len(examples), len(table))} images to test on are also to train on"
            findings.append(Finding("image-leak", message, name, len(examples), examples[:MOST_EXAMPLES]))
    return findings


def check_validation(
    tables: Mapping[str, Table],
    to_validate: Sequence[str],
    to_test: Sequence[str],
    digests: Mapping[str, bytes],
) -> list[Finding]:
    """Find images to validate on that are also images to test on, each dataset with each other.

    Args:
        tables: the datasets of both, by name; those that can't be read are missing.
        to_validate: names of `DATASETS.VAL`.
        to_test: names of `DATASETS.TEST`.
        digests: see `check_repeats`.
    """
    findings = []
    tested = _by_content({name: tables[name] for name in to_test if name in tables}, digests)
    for name in to_validate:
        if name not in tables:
            continue
        content = _by_content({name: tables[name]}, digests)
        examples = [
            Example(path, f"same as {tested[key][0][1]} of {tested[key][0][0]}")
            for key, files in content.items()
            if key in tested
            for _, path in files
        ]
        if examples:
            message = f"{share(len(examples), len(tables[name]))} images to validate on are also to test on"
            findings.append(
                Finding("image-in-val-and-test", message, name, len(examples), examples[:MOST_EXAMPLES])
            )
    return findings


def _by_content(
    tables: Mapping[str, Table], digests: Mapping[str, bytes]
) -> dict[bytes | str, list[tuple[str, str]]]:
    """Group (dataset, path) by the pixels of the file; files that were not read, by their path."""
    files: dict[bytes | str, list[tuple[str, str]]] = defaultdict(list)
    for name, table in tables.items():
        for path in dict.fromkeys(table.file_names):
            # `abspath` takes 10 µs; most names have nothing that it would change.
            plain = path.startswith("/") and "/." not in path and "//" not in path
            files[digests.get(path) or (path if plain else os.path.abspath(path))].append((name, path))
    return files
