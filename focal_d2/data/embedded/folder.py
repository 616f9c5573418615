"""What the embedded datasets share: where they lie, and that they appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from focal_d2.errors import UserError


def datasets_root() -> Path:
    """Return detectron2's dataset folder: `DETECTRON2_DATASETS`, or `datasets/`."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def prepare_once(folder: Path, recipe: Any, splits: Sequence[str], write: Callable[[Path], None]) -> Path:
    """Make a dataset's folder, unless it is there and of the same recipe.

    Args:
        folder: where it goes.
        recipe: a dataclass that says how it is made; kept in recipe.json.
        splits: of each there must be a folder of images and a COCO file.
        write: fills an empty folder with the splits.

    Returns:
        The folder.

    Raises:
        UserError: if it can't be written, or there is a folder of that name that was not made here.
    """
    stamp = folder / "recipe.json"
    written = json.dumps(asdict(recipe))

    def is_there() -> bool:
        whole = all((folder / split).is_dir() and (folder / f"{split}.json").is_file() for split in splits)
        return whole and stamp.is_file() and stamp.read_text(encoding="utf-8") == written

    if is_there():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may start on the same machine; one makes it, the others wait.
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_there():
                return folder
            if folder.exists() and not stamp.is_file():
                raise UserError(f"{folder} was not made by focal_d2: move it away, its name is needed")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
                aside = Path(work) / folder.name
                aside.mkdir()
                write(aside)
                (aside / "recipe.json").write_text(written, encoding="utf-8")
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"dataset folder {folder.parent}: {error}") from error
    return folder
