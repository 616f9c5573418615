"""Processes that read images: their signals, the deadline of a batch, and errors when one hangs or dies."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from focal_d2.detectron2_compat import is_worker_watch
from focal_d2.errors import UserError


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
