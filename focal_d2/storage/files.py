"""Open files: read untrusted files, and write so that a crash leaves the old file or the new one.

Only regular files are opened. A named pipe would be waited for, a device may never end, and opening some
devices already has an effect.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from focal_d2.errors import UserError

# Bytes of a file of annotations. It is read whole; Objects365's has 6 · 10⁹.
LARGEST_ANNOTATIONS = 2**33
LARGEST_DOWNLOAD = 2**34  # bytes; weights have up to a few 2^30
LONGEST_YAML = 2**20  # bytes, with the files of its _BASE_

ASIDE = ".tmp"  # ends the name of a file that is not whole yet
# In OUTPUT_DIR, what is opened where it lies, not written aside: by us, detectron2, TensorBoard and W&B.
_FILES = ("config.yaml", "log.txt*", "metrics.json", "training.lock", "events.out.*", "wandb_id.txt")
_FOLDERS = ("inference", "nonfinite_*", "earlier_*", "wandb")

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# File systems of the kernel: a write to /proc/self/mem changes this process.
_KERNELS = {os.stat(x).st_dev for x in ("/proc", "/sys") if os.path.exists(x)}


def open_file(path: str | os.PathLike[str], *, limit: int) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        path: of the file.
        limit: most bytes that a file of its kind can have. A sparse file of terabytes takes no room on a
            disk, but reading it takes all memory.

    Raises:
        OSError: if it can't be opened, is no regular file, or is longer.
    """
    file = os.fdopen(_open(path, os.O_RDONLY), "rb")
    size = os.fstat(file.fileno()).st_size
    problem = f"it has {size} bytes, more than {limit}" if size > limit else ""
    if size == 0 and file.read(1):
        problem = "the system makes it up as it is read, maybe without end"  # as in /proc
    if problem:
        file.close()
        raise OSError(errno.EFBIG, problem, os.fspath(path))
    return file


def read_file(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """Read a regular file; see `open_file`."""
    with open_file(path, limit=limit) as file:
        return file.read()


def open_data(path: str, *, limit: int) -> IO[bytes]:
    """Open a file of a dataset; see `open_file`. A program can also register an address."""
    # Commands import this module before detectron2, which takes seconds.
    from detectron2.utils.file_io import PathManager

    from focal_d2.storage.downloads import is_address

    return PathManager.open(path, "rb") if is_address(path) else open_file(path, limit=limit)


def read_data(path: str, *, limit: int) -> bytes:
    """Read a file of a dataset; see `open_data`."""
    with open_data(path, limit=limit) as file:
        return file.read()


def create_file(path: str | os.PathLike[str], *, replace: bool = True) -> IO[bytes]:
    """Open a regular file for writing: a new one, or an old one that is emptied.

    Args:
        path: of the file.
        replace: False refuses a file that is there.

    Raises:
        OSError: if it can't be opened, is no regular file, or must not be replaced.
    """
    handle = _open(path, os.O_WRONLY | os.O_CREAT | (0 if replace else os.O_EXCL))
    os.ftruncate(handle, 0)
    return os.fdopen(handle, "wb")


def open_records(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading and for writing at its end, and lock it until this process ends.

    Raises:
        BlockingIOError: if another process has locked it.
        OSError: if it can't be opened, or is no regular file.
    """
    file = os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "r+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a file is a regular one, if it is there.

    Raises:
        OSError: if not.
    """
    with suppress(FileNotFoundError):
        _check_kind(path, os.stat(path))


def _open(path: str | os.PathLike[str], flags: int) -> int:
    try:
        check_regular(path)
        # Without waiting, in case that it became a pipe since.
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except UnicodeEncodeError as error:
        reason = f"its name can't be written in this system's encoding {error.encoding}: set PYTHONUTF8=1"
        raise OSError(errno.EINVAL, reason, os.fspath(path)) from error
    except ValueError as error:  # a NUL in it
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        _check_kind(path, os.fstat(handle))
    except OSError:
        os.close(handle)
        raise
    return handle


def _check_kind(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        if status.st_dev in _KERNELS:
            raise OSError(errno.EINVAL, "a file of the kernel, where a file is needed", os.fspath(path))
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    raise OSError(number, f"{kind}, where a file is needed", os.fspath(path))


def write_aside(path: str, write: Callable[[IO[bytes]], object], *, shared: bool = False) -> None:
    """Write a file beside its place, bring it to the disk, and put it in place in one step.

    A process that is killed, or a machine that loses power, leaves the former file or the whole new one, and
    maybe `path` + ".tmp".

    Args:
        path: of the file.
        write: given the open file, fills it.
        shared: several processes may write the file at once, all with the same content. It is not brought to
            the disk, so a machine that loses power may leave a damaged one: its reader must find that.

    Raises:
        OSError: if that fails; the former file is as it was.
    """
    aside = f"{path}.{secrets.token_hex(8)}{ASIDE}" if shared else path + ASIDE
    try:
        with suppress(FileNotFoundError):
            os.remove(aside)  # what a killed run left; if it is a link, the link
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            if not shared:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(aside)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error  # PyTorch's writer miscounts once a write has failed
        raise
    if not shared:
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
