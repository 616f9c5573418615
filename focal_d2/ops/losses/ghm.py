"""Gradient harmonising: an example's weight is the inverse of how many examples share its gradient norm.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.

The unit interval of gradient norms g is divided into M bins; with R_j examples in the bin of g, the gradient
density is GD(g) = R_j · M (eq. 6, 9), and the loss Σ L / GD(g) (eq. 8) is already an average, which is not
divided again. mmdetection's code differs: it divides by the number of bins that are not empty instead of M,
and does not update a bin's moving average while the bin is empty. The average starts at 0, so that the first
batches weigh up to 1 / (1 - momentum) times as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_histogram(norms: Tensor, valid: Tensor, *, bins: int) -> Tensor:
    """Count examples by gradient norm.

    Args:
        norms: any shape, in [0, 1].
        valid: bool of the same shape: the example takes part.
        bins: M.

    Returns:
        (M,) float: the number of examples in [j/M, (j+1)/M), 1 belonging to the last bin.
    """
    # What is left out has a bin of its own: the number of the others would be read from a GPU.
    index = torch.where(valid, _bin_of(norms, bins), bins).flatten()
    if index.is_cuda:  # there, bincount makes the host wait; on a CPU, histc takes no integers
        counts = torch.histc(index, bins=bins + 1, min=0, max=bins + 1)
    else:
        counts = torch.bincount(index, minlength=bins + 1)
    return counts[:bins].to(norms.dtype)


def harmonise(
    norms: Tensor,
    valid: Tensor,
    histogram: Tensor,
    momentum: float,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Update a moving histogram in place with a batch, and return the density GD(g) of each norm.

    Args:
        norms: any shape, in [0, 1].
        valid: bool of the same shape: the example takes part.
        histogram: (M,) examples a bin, changed to momentum · histogram + (1 - momentum) · batch (eq. 12).
        momentum: in [0, 1); 0 forgets all earlier batches.
        pool: sums a histogram (M,) over the processes that share a batch; None: there is one.

    Returns:
        GD(g) (eq. 6), of the norms' shape, above 0.
    """
    current = gradient_histogram(norms, valid, bins=len(histogram))
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
    # A bin with ignored examples only counts none.
    return density.clamp(min=torch.finfo(density.dtype).tiny)


def _bin_of(norms: Tensor, bins: int) -> Tensor:
    # A NaN loss is NaN with any weight. Counting must not fail first, so that the trainer can report it.
    return (norms * bins).nan_to_num(0).long().clamp(max=bins - 1)
