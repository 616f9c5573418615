"""What led to a loss that is not finite."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """Figures of an iteration."""

    iteration: int
    learning_rate: float
    losses: dict[str, float]
    gradient_norm: float
