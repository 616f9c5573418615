"""The configs that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from focal_d2.errors import UserError

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


def check_config(name: str) -> None:
    """Check that there is a config of that name; see `find_config`.

    Raises:
        UserError: if there is none.
    """
    if not os.path.exists(find_config(os.path.expanduser(name))):
        raise UserError(f"config file not found: {name}")


def find_config(name: str) -> str:
    """Return the path of a config: the file of that name or, where there is none, the package's.

    Args:
        name: path of a file, or a name of `packaged_config`.

    Returns:
        `name` as it is if there is no such file in either place.
    """
    return name if os.path.exists(name) else packaged_config(name) or name
