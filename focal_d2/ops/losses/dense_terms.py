"""The one-pass losses: their weights, and the terms of positives. `dense_chunks` has those of negatives.

Shapes: see `dense`; P positives, each a pair of an anchor and its class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.losses.dense_chunks import Term, Workspace, negative_terms, sigmoid_and_log


class Focal(NamedTuple):
    """The focal loss: the weights, and the terms of the positives."""

    gamma: float
    negative_weight: float | Tensor  # a number, or (K,)
    positive_weight: float | Tensor

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> Term:
        """Return the weighted terms (P,): a positive is a negative of -x, with the opposite gradient."""
        term = negative_terms(-x, self.gamma)
        weight = of_class(self.positive_weight, classes)
        return Term(weight * term.value, -weight * term.slope)


class Quality(NamedTuple):
    """The quality focal loss; `gamma` is its β."""

    gamma: float
    negative_weight: float

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> Term:
        """Return |y - p|^β BCE(x, y), with the quality y."""
        p, q, log_q = sigmoid_and_log(x, Workspace.like(x, with_log=True, with_error=True))
        difference, entropy = p - quality, -log_q - quality * x
        if self.gamma == 0:
            return Term(entropy, difference)
        # At β = 1 the absolute value's derivative is taken as 0 where p = y, as autograd does.
        power = difference.abs().pow(self.gamma - 1)
        slope = self.gamma * power * difference.sign() * p * q * entropy
        return Term(power * difference.abs() * entropy, slope + power * difference.abs() * difference)


class Varifocal(NamedTuple):
    """The varifocal loss."""

    gamma: float
    negative_weight: float

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> Term:
        """Return the quality times BCE; a positive of quality 0 is a negative."""
        p, _, log_q = sigmoid_and_log(x, Workspace.like(x, with_log=True, with_error=True))
        term = negative_terms(x, self.gamma)
        none = quality <= 0
        return Term(
            torch.where(none, self.negative_weight * term.value, quality * (-log_q - quality * x)),
            torch.where(none, self.negative_weight * term.slope, quality * (p - quality)),
        )


def of_class(weight: float | Tensor, classes: Tensor | slice) -> float | Tensor:
    """Return the weights of classes: a number, or of (K,) those that `classes` selects."""
    return weight[classes] if isinstance(weight, Tensor) else weight


DenseLoss = Focal | Quality | Varifocal
