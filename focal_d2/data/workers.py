"""Processes that read images: what they need, their signals, and errors when one hangs or dies."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from focal_d2.detectron2_compat import is_worker_watch
from focal_d2.errors import UserError

# Of the main process: both ends of a worker's pipe, and two by which each learns of the other's end.
_HANDLES_A_WORKER = 4
# For checkpoints, logs, images and connections that are open for a while only.
_HANDLES_BESIDE = 32


class HungError(UserError):
    """No batch came in time."""


class WorkerLostError(UserError):
    """A process that reads images is gone."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise HungError(
            f"no batch came in {seconds:g} seconds (DATALOADER.FOCAL.TIMEOUT): reading images hangs"
        )

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, start = signal.signal(signal.SIGALRM, end), time.monotonic()
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # Whoever else has set the alarm gets it.
        left = max(others - (time.monotonic() - start), 1e-3) if others else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def let_no_death_raise() -> None:
    """Take back PyTorch's handler of SIGCHLD.

    With it, the death of a worker raises wherever the program is, even half-way through an optimizer's step.
    Whoever waits for a batch finds out as well.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if is_worker_watch(handler):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def start_worker(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the main one finishes its iteration with its workers' help.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Tell in one line why the processes that read images cannot be started.

    Raises:
        UserError: if the machine lacks handles, processes, memory or room in /dev/shm.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the processes that read images cannot be started: {error}; {remedy(error)}"
        ) from error


def remedy(error: OSError) -> str:
    """Say what helps if the machine has no room for the processes that read images."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the number of file handles (ulimit -n) or lower DATALOADER.NUM_WORKERS"
    if error.errno == errno.ENOSPC:
        return (
            "make room in /dev/shm (docker run --shm-size=1g, or --ipc=host) or set DATALOADER.NUM_WORKERS "
            "0, which needs none"
        )
    return "lower DATALOADER.NUM_WORKERS; with 0, training reads the images itself"


def check_handles(workers: int, *, loaders: int) -> None:
    """Check that this process may open the files and pipes that reading images needs.

    Args:
        workers: `DATALOADER.NUM_WORKERS`.
        loaders: how many loaders have their workers at a time; an evaluation in training has its own.

    Raises:
        UserError: if the limit (`ulimit -n`) is too low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + loaders * workers * _HANDLES_A_WORKER + _HANDLES_BESIDE
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"this process may open {limit} files (ulimit -n), and DATALOADER.NUM_WORKERS {workers} needs "
            f"{needed}: run `ulimit -n {max(1024, needed)}` first, or lower DATALOADER.NUM_WORKERS"
        )
