"""A lock on OUTPUT_DIR: two trainings at once would overwrite each other's files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

from focal_d2.errors import UserError, one_line

_NAME = "training.lock"

logger = logging.getLogger(__name__)

_held: set[str] = set()  # folders of this process


@contextmanager
def output_lock(folder: str) -> Iterator[None]:
    """Lock the folder while the block runs. A block inside another one for the same folder does nothing.

    All processes of a job call this function, and the main process holds the lock. The kernel releases the
    lock when the main process ends, also if it is killed. The file is not removed: otherwise two processes
    could lock two files of the same name.

    Args:
        folder: OUTPUT_DIR; it is made if it does not exist.

    Raises:
        UserError: in all processes, if another training holds the lock, or the file can't be written.
    """
    path, handle, problem = os.path.realpath(folder), None, None
    if comm.is_main_process() and path not in _held:
        try:
            handle = _lock(folder)
        except (OSError, UserError) as error:
            problem = str(error) if isinstance(error, UserError) else f"OUTPUT_DIR {folder}: {error}"
    (problem, *_) = comm.all_gather(problem)
    if problem is not None:
        raise UserError(problem)
    first = path not in _held
    _held.add(path)
    try:
        yield
    finally:
        if first:
            _held.remove(path)
        if handle is not None:
            os.close(handle)


def was_trained_in(folder: str) -> bool:
    """Return whether a training holds the lock of this folder or held it earlier."""
    return os.path.isfile(os.path.join(folder, _NAME))


def _lock(folder: str) -> int:
    """Lock the file and write this process's id and host into it; return the file's descriptor.

    A record lock (`lockf`) belongs to the process. A lock by `flock` would belong to the open file, which
    forked data workers inherit: a worker that lives longer than a killed training would keep the lock.
    """
    os.makedirs(folder, exist_ok=True)
    handle = os.open(os.path.join(folder, _NAME), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = one_line(os.pread(handle, 200, 0).decode(errors="replace"))
            os.close(handle)
            raise UserError(
                f"OUTPUT_DIR {folder} is in use: {holder or 'another process'} trains there; choose another "
                "folder, or wait until that training has ended"
            ) from None
        logger.warning(
            f"OUTPUT_DIR {folder}: this file system has no locks ({error.strerror}); a second training in "
            "the same folder would not be noticed"
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle
