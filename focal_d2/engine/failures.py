"""Failures of the machine, told in a line."""

from __future__ import annotations

import torch

from focal_d2.engine.ranks import peer_is_lost


def explain(error: Exception) -> str | None:
    """Return one line for a failure of the machine rather than the program, or None."""
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
