"""Gradient harmonising: examples weigh in inverse proportion to how many share their gradient norm.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.

The unit interval of gradient norms g is cut into M bins; with R_j examples in the bin of g, the gradient
density is GD(g) = R_j · M (eq. 6, 9), and the loss Σ L / GD(g) (eq. 8) is already an average: it is divided
by nothing else. Departures from mmdetection's code: that divides by the bins that are not empty instead of M,
and lets a bin's moving average rest while it is empty. The average starts at 0, so that the first batches
weigh up to 1 / (1 - momentum) times as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_histogram(norms: Tensor, counts: Tensor, *, bins: int) -> Tensor:
    """Count examples by gradient norm.

    Args:
        norms: any shape, in [0, 1].
        counts: bool of the same shape: the example takes part.
        bins: M.

    Returns:
        (M,) float: the number of examples in [j/M, (j+1)/M), 1 belonging to the last bin.
    """
    return torch.bincount(_bin_of(norms, bins)[counts], minlength=bins).to(norms.dtype)


def harmonise(
    norms: Tensor,
    counts: Tensor,
    histogram: Tensor,
    momentum: float,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Update a moving histogram in place with a batch, and return the density GD(g) of each norm.

    Args:
        norms: any shape, in [0, 1].
        counts: bool of the same shape: the example takes part.
        histogram: (M,) examples a bin, changed to momentum · histogram + (1 - momentum) · batch (eq. 12).
        momentum: in [0, 1); 0 forgets all earlier batches.
        pool: sums a histogram (M,) over the processes that share a batch; None: there is one.

    Returns:
        GD(g) (eq. 6), of the norms' shape, above 0.
    """
    current = gradient_histogram(norms, counts, bins=len(histogram))
    if pool is not None:
        current = pool(current)
    histogram.mul_(momentum).add_(current, alpha=1 - momentum)
    return gradient_density(norms, histogram)


def gradient_density(norms: Tensor, histogram: Tensor) -> Tensor:
    """Return the density GD(g) (eq. 6) of norms in [0, 1], of their shape and above 0.

    Args:
        norms: any shape.
        histogram: (M,) examples a bin.
    """
    bins = len(histogram)
    density = histogram[_bin_of(norms, bins)] * bins
    # A bin in which only ignored examples lie may be empty.
    return density.clamp(min=torch.finfo(density.dtype).tiny)


def _bin_of(norms: Tensor, bins: int) -> Tensor:
    # A loss that is NaN stays so whatever its weight; counting must not fail before it is seen.
    return (norms * bins).nan_to_num(0).long().clamp(max=bins - 1)
