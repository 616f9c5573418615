"""Files that are written so that a crash leaves the old or the new one."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from focal_d2.errors import UserError

ASIDE = ".tmp"  # ends the name of a file that is not whole yet
# In OUTPUT_DIR, what is opened where it lies, not written aside: by us, detectron2, TensorBoard and W&B.
_FILES = ("config.yaml", "log.txt*", "metrics.json", "training.lock", "events.out.*", "wandb_id.txt")
_FOLDERS = ("inference", "nonfinite_*", "earlier_*", "wandb")


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
        with suppress(FileNotFoundError):
            os.remove(aside)  # what a killed run left; if it is a link, the link
        with open(aside, "xb") as file:
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


def check_output(folder: str) -> None:
    """Check that what a job writes into its folder stays in it: it may be somebody else's, links included.

    What `write_aside` writes needs no check: it replaces a link.

    Raises:
        UserError: naming a link that leads out of the folder, or what is no file where one is written.
    """
    root = os.path.realpath(folder)
    pattern = os.path.join(glob.escape(folder), "")
    files = [path for name in _FILES for path in glob.glob(pattern + name)]
    for path in (*files, *(path for name in _FOLDERS for path in glob.glob(pattern + name))):
        _check_place(path, root)
    for where, folders, names in os.walk(os.path.join(folder, _FOLDERS[0])):
        for name in (*folders, *names):
            _check_place(os.path.join(where, name), root)
    for path in files:
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file: remove it")


def _check_place(path: str, root: str) -> None:
    target = os.path.realpath(path)
    if os.path.commonpath([root, target]) != root:
        raise UserError(f"{path} is a link to {target}, outside the folder: remove it")
