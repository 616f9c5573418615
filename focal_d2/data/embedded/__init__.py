"""Datasets that the package makes or cuts itself. Importing it registers them.

The module of a dataset, which makes and reads its files, is imported when the dataset is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

from focal_d2.annotations import Table
from focal_d2.data.datasets import register_table
from focal_d2.data.embedded.folder import datasets_root


class Embedded(NamedTuple):
    """What is known of a dataset before it is made."""

    splits: tuple[str, ...]
    classes: list[str]
    draws_itself: bool  # when it is first asked for


SETS = {
    "neon_trees": Embedded(("train", "val", "test", "other", "val_whole", "test_whole"), ["tree"], False),
    "digits": Embedded(("train", "test"), [str(k) for k in range(10)], True),
}


def _load(name: str, split: str) -> Table:
    return importlib.import_module(f"focal_d2.data.embedded.{name}").load(split)


def _register() -> None:
    for name, (splits, classes, draws_itself) in SETS.items():
        for split in splits:
            annotations = datasets_root() / name / f"{split}.json"
            register_table(
                f"{name}_{split}",
                functools.partial(_load, name, split),
                thing_classes=classes,
                # A dataset that draws itself is never missing.
                **({} if draws_itself else {"source": str(annotations)}),
            )


_register()
