"""The configs that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from focal_d2.errors import UserError, reason
from focal_d2.storage.files import LARGEST_DOWNLOAD, LONGEST_YAML, open_file

# A wheel has a copy inside; a checkout has them beside the package.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def packaged_folder() -> Path:
    """Return the folder of the configs that come with the package."""
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


def packaged_configs() -> list[str]:
    """Return the names of all configs of the package, relative to their folder."""
    folder = packaged_folder()
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


def packaged_config(name: str) -> str | None:
    """Return the path of a config of the package; None if there is none of that name.

    Args:
        name: one that `packaged_configs` lists, also with `configs/` before it.
    """
    name = name.removeprefix("configs/")
    return str(packaged_folder() / name) if name in packaged_configs() else None


def find_config(name: str) -> str:
    """Return the path of a config: the file of that name or, where there is none, the package's.

    Args:
        name: path of a file, which may begin with ~, or a name of `packaged_config`.

    Returns:
        The path of `name` if there is no such file in either place.
    """
    name = os.path.expanduser(name)
    return name if os.path.exists(name) else packaged_config(name) or name


def is_checkpoint(name: str) -> bool:
    """Return whether the name of a config is that of a checkpoint, which has a config in it."""
    return name.endswith(".pth")


def check_config_file(path: str, name: str) -> None:
    """Check that a config is a file of bounded length, before anyone waits for a pipe.

    A checkpoint may be as long as checkpoints are.

    Args:
        path: of the file.
        name: what messages call it.

    Raises:
        UserError: if not.
    """
    if not os.path.exists(path):
        raise UserError(f"config file not found: {name}")
    try:
        open_file(path, limit=LARGEST_DOWNLOAD if is_checkpoint(path) else LONGEST_YAML).close()
    except OSError as error:
        raise UserError(f"config file {name}: {reason(error)}") from error
