"""Random draws that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's generators, as `torch.load` reads it safely."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, *rest = numpy_state
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state that `random_state` returned.

    Raises:
        ValueError: if NumPy's state is out of its range, which NumPy does not check: it would read beyond it.
    """
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    if not (type(position) is int and 0 <= position <= len(keys) and has_gauss in (0, 1)):
        raise ValueError(f"NumPy's generator at position {position!r} of {len(keys)}, {has_gauss!r} in store")
    if not math.isfinite(gauss):
        raise ValueError(f"NumPy's generator has {gauss!r} in store")
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the state of the generators at the end of the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators inside the block, and restore their state at its end.

    All three libraries are seeded, since an augmentation may draw from any (detectron2's: NumPy's).

    Args:
        *key: numbers that the seed is made of, each at least 0.
    """
    words = np.random.SeedSequence(key).generate_state(3)
    with kept_random_state():
        random.seed(int(words[0]))
        np.random.seed(words[1])  # noqa: NPY002
        torch.default_generator.manual_seed(int(words[2]))
        yield


def derived_seed(*key: int) -> int:
    """Return a seed in [0, 2^63) made of numbers, each at least 0; the same numbers give the same seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
