"""SIGTERM and Ctrl-C: a job stops after its iteration, with a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from detectron2.utils import comm

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Two signals within this time count as one: a terminal and a launcher may both send it.
_SAME_SIGNAL = 0.5  # seconds


class StopRequest:
    """Records that SIGTERM or Ctrl-C came. A second signal kills the process and its children at once.

    The first signal continues children that were stopped (SIGSTOP): the job would wait for them. Outside the
    main thread this class does nothing, because Python handles no signals there.
    """

    def __init__(self, on_first: Callable[[int], None]) -> None:
        """Begin without a signal; `on_first` is called with the number of the first one."""
        self.number: int | None = None  # of the first signal
        self._process = os.getpid()
        self._on_first = on_first
        self._time = 0.0

    def __enter__(self) -> StopRequest:
        self.number = None
        self._before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def came(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked data worker. Ctrl-C reaches all processes of a terminal; only the parent handles it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self.number is not None:
            if now - self._time > _SAME_SIGNAL:
                signal_children(signal.SIGKILL)
                os._exit(128 + number)
            return
        self.number, self._time = number, now
        self._on_first(number)
        signal_children(signal.SIGCONT)


def signal_children(number: signal.Signals) -> None:
    """Send a signal to all processes that this one started."""
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(int(process.pid), number)  # type: ignore[arg-type]  # it was started


def announce_stop(number: int) -> None:
    """Print that a signal ends the training, in the main process."""
    if comm.is_main_process():
        name = signal.Signals(number).name
        # Not print: the signal may come during a write to the same stream.
        text = f"{name}: stopping after this iteration, with a checkpoint; a second {name} stops at once\n"
        os.write(2, text.encode())
