"""Import a user's modules that register losses, backbones, datasets and other parts: `--import MODULE`.

It is a flag and no config key, because configs run no code. Checkpoints do not contain the modules' names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from focal_d2.errors import UserError


def import_modules(names: Sequence[str]) -> None:
    """Import modules for what they register. Its errors are not caught.

    Args:
        names: such as "my_losses" or "my_package.backbones". Python searches them as it searches all modules,
            and last in the working folder.

    Raises:
        UserError: if there is no such module, or it calls sys.exit.
    """
    folder = os.getcwd()
    if names and folder not in sys.path:
        sys.path.append(folder)
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"--import {name}: it must be the name of a module, such as my_losses")
        try:
            importlib.import_module(name)
        except SystemExit as stop:
            raise UserError(f"--import {name}: the module ended with sys.exit({stop.code!r})") from stop
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but a module that it imports does not
            raise UserError(
                f"--import {name}: no module {error.name} in {folder}, PYTHONPATH or the installed packages"
            ) from None
