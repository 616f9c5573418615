"""A Triton kernel of the tests: the terms of single logits, which the loss kernel only returns as a sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focal_d2.ops.losses.dense_triton import _term


def terms(x: Tensor, is_class: Tensor, quality: Tensor, *, kind: str, gamma: float, alpha: float) -> Tensor:
    """Return value and derivative (2, n) of logits, with alpha and 1 - alpha as the weights of the losses."""
    out = torch.empty(2, len(x), device=x.device)
    negative = {"focal": 1 - alpha, "quality": 1.0, "varifocal": alpha}[kind]
    power = int(gamma) if gamma in (0, 1, 2) else -1
    _terms_kernel[(1,)](
        x,
        is_class.int(),
        quality,
        out,
        negative,
        alpha,
        gamma,
        len(x),
        kind,
        power,
        triton.next_power_of_2(len(x)),
    )
    return out


@triton.jit
def _terms_kernel(
    x,
    is_class,
    quality,
    out,
    negative,
    positive,
    gamma,
    count,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    inside = i < count
    logits = tl.load(x + i, mask=inside, other=0.0)
    positives = tl.load(is_class + i, mask=inside, other=0) == 1
    target = tl.load(quality + i, mask=inside, other=0.0)
    value, slope = _term(logits, positives, target, negative, positive, gamma, KIND, POWER)
    tl.store(out + i, value, mask=inside)
    tl.store(out + count + i, slope, mask=inside)
