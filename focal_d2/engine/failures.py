"""Describe a failure of training in one line, and end data workers that hang."""

from __future__ import annotations

import multiprocessing

import torch

from focal_d2.data.workers import HungError
from focal_d2.detectron2_compat import is_failed_compilation
from focal_d2.engine.launch.collectives import peer_is_lost
from focal_d2.errors import describe_error, one_line, user_message


def failure_message(error: Exception) -> str | None:
    """Return one line about a user's mistake or a failure of the machine; None for a fault of the program."""
    if (message := user_message(error)) is not None:
        return message
    text = str(error)
    if peer_is_lost(error):
        return f"another process of this job ended or hangs ({one_line(text, 100)})"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return (
            f"out of memory: {text.strip().splitlines()[-1] if text.strip() else 'the machine'}; "
            "SOLVER.FOCAL.ACCUMULATE computes a batch in parts"
        )
    if is_failed_compilation(error):
        return f"MODEL.FOCAL.COMPILE True: the model can't be compiled: {describe_error(error, lines=1)}"
    return None


def end_hung_workers(error: Exception) -> None:
    """Kill the data workers if they hang: this process would wait for them when it ends."""
    if isinstance(error, HungError):
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
