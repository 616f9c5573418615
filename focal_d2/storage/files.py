"""Files that are written so that a crash leaves the old or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO

ASIDE = ".tmp"  # ends the name of a file that is not whole yet


def write_aside(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, bring it to the disk, and put it in place in one step.

    A process that is killed, or a machine that loses power, leaves the former file or the whole new one, and
    maybe `path` + ".tmp".

    Args:
        path: of the file.
        write: given the open file, fills it.

    Raises:
        OSError: if that fails; the former file is as it was.
    """
    aside = path + ASIDE
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(aside)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error  # PyTorch's writer miscounts once a write has failed
        raise
    _sync_folder(os.path.dirname(path) or os.curdir)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network drives can't, and the file is in place
        os.fsync(handle)
    os.close(handle)
