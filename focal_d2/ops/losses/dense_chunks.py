"""The arithmetic of the one-pass losses: every logit as a negative, a chunk at a time.

A negative of weight w has the loss w p^γ softplus(x), with p = σ(x). A chunk is small enough that its float32
temporaries stay in the cache; `Workspace` holds them, so that no chunk allocates memory.

Shapes: see `dense`; n elements are worked on at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.common import in_memory_order

# Elements worked on at once: their float32 temporaries fit the cores' second-level caches.
CHUNK = 1 << 18
# Gradients in float16 are multiplied by this until backward, because the smallest float16 is 6e-8 and a loss
# scaler multiplies them only then.
_FLOAT16_SCALE = 4096.0
# A probability above which 1 - p has lost digits that the logarithm needs.
_NEAR_1 = 0.98


class Term(NamedTuple):
    """Value and derivative of logits, both of the logits' shape, not weighted."""

    value: Tensor
    slope: Tensor


class Workspace(NamedTuple):
    """Temporaries of a chunk, in the precision that losses are computed in."""

    p: Tensor
    q: Tensor
    log_q: Tensor | None  # None: the gradient's memory is used, since the gradient is written last
    error: Tensor | None  # of the logarithm; None: it is not corrected
    zero: Tensor  # a scalar, made once for all calls
    one: Tensor  # a scalar

    @staticmethod
    def like(x: Tensor, *, with_log: bool, with_error: bool) -> Workspace:
        """Allocate temporaries for chunks of the length of x (n,)."""
        x = upcast(x)
        p, q = torch.empty_like(x), torch.empty_like(x)
        log_q = torch.empty_like(x) if with_log else None
        error = torch.empty_like(x) if with_error else None
        return Workspace(p, q, log_q, error, x.new_zeros(()), x.new_ones(()))

    def first(self, count: int) -> Workspace:
        """Return views of the first `count` elements, for a shorter chunk."""
        if count == len(self.p):
            return self
        log_q, error = (None if t is None else t[:count] for t in (self.log_q, self.error))
        return self._replace(p=self.p[:count], q=self.q[:count], log_q=log_q, error=error)


def upcast(x: Tensor) -> Tensor:
    """Return x in the precision that losses are computed in: float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def kept_scale(gradient: Tensor) -> float:
    """Return the factor that a gradient of this type is multiplied by until backward."""
    return _FLOAT16_SCALE if gradient.dtype == torch.float16 else 1.0


def has_room_for(gradient: Tensor | None, x: Tensor) -> bool:
    """Whether a gradient's memory can hold the temporaries of x."""
    return gradient is not None and gradient.dtype == upcast(x[:0]).dtype


def all_as_negatives(
    logits: Tensor, gradient: Tensor | None, *, gamma: float, weight: float | Tensor, work: Workspace
) -> Tensor:
    """Return the sum (float64) of a level's losses as if all were negatives, and write their gradient.

    Args:
        logits: (N, A·K, H, W), contiguous or channels-last.
        gradient: the same layout, written times `kept_scale`; None: not wanted.
        gamma: focusing parameter.
        weight: of the negatives, a number or (K,).
        work: for chunks of `CHUNK` elements.
    """
    flat, out = in_memory_order(logits), None if gradient is None else in_memory_order(gradient)
    size = CHUNK
    weights: float | Tensor = weight
    if isinstance(weight, Tensor):
        # A chunk is a whole number of periods of the classes, with one weight for each of its elements.
        period = weight if not logits.is_contiguous() else weight.repeat_interleave(logits.shape[2:].numel())
        copies = max(1, min(CHUNK, flat.numel()) // max(1, len(period)))
        weights = period.to(work.p.dtype).repeat(copies)
        size = max(1, len(weights))
        if size > len(work.p):
            work = Workspace.like(
                flat[:size], with_log=work.log_q is not None, with_error=work.error is not None
            )
    sums = []
    gradients = [None] * -(-flat.numel() // size) if out is None else out.split(size)
    for x, to in zip(flat.split(size), gradients, strict=True):
        sums.append(_chunk(x, gamma, weights, to, work.first(len(x))))
    return torch.stack(sums).sum(dtype=torch.float64) * (1.0 if isinstance(weight, Tensor) else weight)


def _chunk(x: Tensor, gamma: float, weight: float | Tensor, out: Tensor | None, work: Workspace) -> Tensor:
    """Return the sum over a chunk (n,) of negatives, and write their weighted gradient to `out`.

    The sum contains a `weight` that is a tensor (at least n,), but not one that is a number.
    """
    if out is not None and has_room_for(out, x):
        work = work._replace(log_q=out)
    p, q, log_q = sigmoid_and_log(upcast(x), work, precise=gamma < 1)
    slope = p if gamma == 0 else torch.addcmul(p, q, log_q, value=-gamma, out=q)
    power = _power(p, gamma)
    if isinstance(weight, Tensor):
        weights = weight[: len(x)]
        power = weights if power is None else power.mul_(weights)
    # Not torch.dot, which adds up long vectors less carefully.
    total = -(log_q if power is None else log_q.mul_(power)).sum()
    if out is None:
        return total
    scale = kept_scale(out)
    if power is None:
        torch.mul(slope, weight * scale, out=out)
    elif isinstance(weight, Tensor):
        torch.mul(power, slope if scale == 1 else slope.mul_(scale), out=out)
    elif out.dtype == slope.dtype:
        torch.addcmul(work.zero, power, slope, value=weight, out=out)
    else:
        torch.mul(torch.mul(slope, power, out=slope), weight * scale, out=out)
    return total


def terms_as_counted(x: Tensor, gamma: float, work: Workspace) -> Tensor:
    """Return what each logit (n,) added to its chunk's sum as a negative, rounded in the same way."""
    values = torch.empty_like(x)
    size = max(1, len(work.p))
    for part, to in zip(x.split(size), values.split(size), strict=True):
        room = work.first(len(part))._replace(log_q=to)
        p, _, log_q = sigmoid_and_log(part, room, precise=gamma < 1)
        power = _power(p, gamma)
        torch.neg(log_q if power is None else log_q.mul_(power), out=to)
    return values


def negative_terms(x: Tensor, gamma: float) -> Term:
    """Return negatives' loss p^γ softplus(x) and its derivative p^γ (γ (1 - p) softplus(x) + p)."""
    p, q, log_q = sigmoid_and_log(x, Workspace.like(x, with_log=True, with_error=True))
    value, slope = -log_q, p - gamma * q * log_q
    power = _power(p.clone(), gamma)
    return Term(value, slope) if power is None else Term(power * value, power * slope)


def _power(p: Tensor, gamma: float) -> Tensor | None:
    """Return p^γ, computed in place, or None if it is 1."""
    if gamma == 0:
        return None
    if gamma == 1:
        return p
    if gamma == 2:
        return p.mul_(p)
    return p.pow_(gamma)


def sigmoid_and_log(x: Tensor, work: Workspace, *, precise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return p = σ(x), q = 1 - p and log(q) = -softplus(x), from sigmoids and one logarithm.

    log1p would be simpler, but is many times slower than log on small arguments. Instead, let s = σ(-|x|),
    which is at most 1/2, and u be 1 - s after rounding. The rounding error (1 - u) - s is exact, and
    log(1 - s) is log(u) plus that error. (The derivative of log at u is 1 / u. It differs from 1 only where s
    is far larger than a rounding error.) In most chunks no p is near 1. There s can be p itself, because
    1 - p is exact from p = 1/2 on. If p^γ multiplies the logarithm, its error of 6e-8 does not matter; it is
    corrected only if `precise`.
    """
    p = torch.sigmoid(x, out=work.p)
    # NaN counts as near 1. A GPU is not asked: the host would have to wait for it.
    near_1 = x.is_cuda or (x.numel() > 0 and not p.amax().item() <= _NEAR_1)
    if near_1:
        q = torch.sigmoid(torch.neg(x, out=work.q), out=work.q)
        s = torch.minimum(p, q)
        u = 1 - s
    else:
        s, u = p, torch.sub(work.one, p, out=work.q)
    log = torch.log(u, out=work.log_q)
    if precise:
        log += torch.sub(work.one, u, out=work.error).sub_(s)
    if near_1:
        return p, q, log.sub_(x.clamp(min=0))
    return s, u, log
