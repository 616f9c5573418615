"""Checks for images that are in a list twice, or both in training and in test."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES
from focal_d2.data.checks.findings import Example, Finding, share


def check_sides(train: Mapping[str, Table], test: Mapping[str, Table]) -> list[Finding]:
    """Find datasets that are trained and tested on.

    Args:
        train: the datasets to train on, by name.
        test: those to test on.
    """
    both = [name for name in train if name in test]
    message = "to train on and to test on: AP says how well it is learnt by heart"
    return [Finding("dataset-in-both", message, name, len(train[name])) for name in both]


def check_repeats(
    train: Mapping[str, Table], test: Mapping[str, Table], digests: Mapping[str, bytes]
) -> list[Finding]:
    """Find images met again: within a side as other files, or on both sides.

    Args:
        train: the datasets to train on, by name.
        test: those to test on; the ones that are in `train` too are not looked at again.
        digests: of the pixels of each file that was read; of the others the paths are compared.
    """
    test = {name: table for name, table in test.items() if name not in train}
    found = []
    # Datasets to test on are measured one by one, so an image may be in two of them.
    units = [train, *({name: table} for name, table in test.items())]
    to_train, *to_test = contents = [_by_content(unit, digests) for unit in units]
    for unit, content in zip(units, contents, strict=True):
        again = [files for files in content.values() if len(files) > 1]
        if again:
            involved = dict.fromkeys(name for files in again for name, _ in files)
            examples = [Example(own, f"same as {files[0][1]}") for files in again for _, own in files[1:]]
            among = sum(len(dict.fromkeys(table.file_names)) for table in unit.values())
            message = (
                f"{share(len(examples), among)} images are there again, as another file or of another dataset"
            )
            found.append(
                Finding(
                    "image-duplicate", message, ", ".join(involved), len(examples), examples[:MOST_EXAMPLES]
                )
            )
    for (name, table), content in zip(test.items(), to_test, strict=True):
        examples = []
        for key, files in content.items():
            if key in to_train:
                of, path = to_train[key][0]
                for _, own in files:
                    same = "the same file is in" if own == path else f"same as {path} of"
                    examples.append(Example(own, f"{same} {of}"))
        if examples:
            message = f"{share(len(examples), len(table))} images to test on are also to train on"
            found.append(Finding("image-leak", message, name, len(examples), examples[:MOST_EXAMPLES]))
    return found


def _by_content(
    tables: Mapping[str, Table], digests: Mapping[str, bytes]
) -> dict[bytes | str, list[tuple[str, str]]]:
    """Group (dataset, path) by what the file holds; a file that was not read, by its path."""
    files: dict[bytes | str, list[tuple[str, str]]] = defaultdict(list)
    for name, table in tables.items():
        for path in dict.fromkeys(table.file_names):
            # `abspath` takes 10 µs; most names have nothing that it would change.
            plain = path.startswith("/") and "/." not in path and "//" not in path
            files[digests.get(path) or (path if plain else os.path.abspath(path))].append((name, path))
    return files
