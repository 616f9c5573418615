"""Sums over all processes of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from torch import Tensor

_alone: list[None] = []  # an element for each `alone` block that is entered


@contextmanager
def alone() -> Iterator[None]:
    """Make `sum_over_ranks` use this process only, for code that the other processes do not run."""
    _alone.append(None)
    try:
        yield
    finally:
        _alone.pop()


def number_of_ranks() -> int:
    """Return the number of processes that `sum_over_ranks` adds up."""
    return 1 if _alone else comm.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of all processes' x, a new tensor; with one process, or `alone`, x itself."""
    if number_of_ranks() == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total)
    return total
