"""Failures, told in a line."""

from __future__ import annotations

import multiprocessing

import torch

from focal_d2.engine.ranks import peer_is_lost
from focal_d2.errors import user_message


def tell(error: Exception) -> str | None:
    """Return one line for a user's mistake or a failure of the machine; None for one of the program."""
    if (message := user_message(error)) is not None:
        return message
    text = str(error)
    if peer_is_lost(error):
        return f"another process of this job ended, or hangs ({text.splitlines()[0][:100]})"
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return (
            "a process that reads images was killed, most often because memory ran out: lower "
            "DATALOADER.NUM_WORKERS or the size of the images"
        )
    if "DataLoader timed out" in text:
        return f"{text.splitlines()[0]} (DATALOADER.FOCAL.TIMEOUT): the processes that read images hang"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return (
            f"out of memory: {text.strip().splitlines()[-1] if text.strip() else 'the machine'}; "
            "SOLVER.FOCAL.ACCUMULATE computes a batch in parts"
        )
    return None


def end_hung_workers(error: Exception) -> None:
    """Kill the processes that read images if they hang: this one would wait for them at its end."""
    if "DataLoader timed out" in str(error):
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
