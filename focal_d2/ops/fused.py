"""Sigmoid focal loss of a level's raw head output, value and gradient in one pass.

A dense detector's labels are almost all background. So every logit is first taken for a negative, without
reading a label, in chunks that stay in cache: its value is summed and its gradient written. Then the few
positives are corrected, and what ignored anchors added is taken out again. Nothing of the logits' size is
kept but the gradient, which backward only scales, in place.

Shapes: N images, A anchors a cell, K classes; logits (N, A·K, H, W), labels (N, H·W·A) in the order of
anchors, as detectron2 has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.common import IGNORE_LABEL, check_at_least_0, check_weight

# Elements worked on at once: their float32 temporaries fit a core's second-level cache.
_CHUNK = 1 << 17


def dense_focal_loss(
    logits: Tensor, labels: Tensor, *, num_classes: int, alpha: float, gamma: float
) -> Tensor:
    """Return what `sigmoid_focal_loss` returns for the same logits as (N, H·W·A, K).

    Args:
        logits: (N, A·K, H, W) float, contiguous or channels-last (other layouts are copied).
        labels: (N, H·W·A) int64; the class in [0, K), K for background, -1 (`IGNORE_LABEL`) for no loss.
        num_classes: K.
        alpha: weight of the positives in [0, 1]; a negative number leaves all weights at 1.
        gamma: focusing parameter, at least 0.

    Returns:
        The sum over anchors that are not ignored and all classes, a scalar in float32 (float64 for float64
        logits). Its backward can run once; there is no second derivative.

    Raises:
        ValueError: if shapes, labels' dtype, alpha or gamma do not fit.
    """
    check_weight("alpha", alpha)
    check_at_least_0("gamma", gamma)
    images, channels, height, width = logits.shape
    anchors, left_over = divmod(channels, num_classes)
    if left_over or labels.shape != (images, height * width * anchors):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: with K={num_classes} "
            "they must be (N, A·K, H, W) and (N, H·W·A)"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    total: Tensor = _DenseFocalLoss.apply(logits, labels, num_classes, alpha, gamma)
    return total


class _DenseFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, num_classes: int, alpha: float, gamma: float
    ) -> Tensor:
        if not _is_dense(logits):
            logits = logits.contiguous()
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = _value_and_gradient(logits, labels, num_classes, alpha, gamma, gradient)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.gradient is None:  # create_graph=True, or a second backward
            raise RuntimeError(
                "the fused focal loss has one backward and no second derivative (retain_graph, "
                "create_graph): set MODEL.FOCAL.LOSS.IMPLEMENTATION reference"
            )
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output.to(gradient.dtype)), None, None, None, None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _value_and_gradient(
    logits: Tensor, labels: Tensor, num_classes: int, alpha: float, gamma: float, gradient: Tensor | None
) -> Tensor:
    """Return the sum, and fill `gradient`, which has the layout of `logits`."""
    positive_weight, negative_weight = (1.0, 1.0) if alpha < 0 else (alpha, 1.0 - alpha)
    total = _all_as_negatives(logits, gamma, negative_weight, gradient)
    height, width = logits.shape[2:]
    anchors = logits.shape[1] // num_classes

    # (N, A, K, H, W) views of the logits and of the gradient that is written.
    x = logits.unflatten(1, (anchors, num_classes))
    g = None if gradient is None else gradient.unflatten(1, (anchors, num_classes))
    grid = labels.unflatten(1, (height, width, anchors))

    ignored = (grid == IGNORE_LABEL).nonzero(as_tuple=True)
    n, h, w, a = ignored
    if len(n):
        value, _ = _negatives(_computed(x[n, a, :, h, w]), gamma)
        # To the last digit where nothing else is in the sum.
        total = (
            total - negative_weight * value.sum(dtype=torch.float64) if len(n) < labels.numel() else total * 0
        )
        if g is not None:
            g[n, a, :, h, w] = 0
    n, h, w, a = ((grid >= 0) & (grid < num_classes)).nonzero(as_tuple=True)
    if len(n):
        k = grid[n, h, w, a]
        chosen = _computed(x[n, a, k, h, w])
        as_negative, _ = _negatives(chosen, gamma)
        # A positive is a negative of the opposite logit, with the opposite gradient.
        value, slope = _negatives(-chosen, gamma)
        total += positive_weight * value.sum(dtype=torch.float64)
        total -= negative_weight * as_negative.sum(dtype=torch.float64)
        if g is not None:
            g[n, a, k, h, w] = (-positive_weight * slope).to(g.dtype)
    return total.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _computed(x: Tensor) -> Tensor:
    """In the precision that losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _all_as_negatives(logits: Tensor, gamma: float, weight: float, gradient: Tensor | None) -> Tensor:
    flat = _flat(logits)
    out = None if gradient is None else _flat(gradient)
    work = _Workspace.like(flat[:_CHUNK])
    sums = []
    for start in range(0, flat.numel(), _CHUNK):
        x = flat[start : start + _CHUNK]
        to = None if out is None else out[start : start + _CHUNK]
        sums.append(_chunk(x, gamma, weight, to, work.first(len(x))))
    if not sums:
        return flat.new_zeros((), dtype=torch.float64)
    return torch.stack(sums).sum(dtype=torch.float64) * weight


def _flat(x: Tensor) -> Tensor:
    """All elements in the order of memory, as a view."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).view(-1)


class _Workspace(NamedTuple):
    """Temporaries of a chunk, in the precision that losses are computed in."""

    x: Tensor
    p: Tensor
    q: Tensor
    log_q: Tensor
    more: Tensor
    zeros: Tensor

    @staticmethod
    def like(x: Tensor) -> _Workspace:
        x = _computed(x)
        x, p, q, log_q, more = (torch.empty_like(x) for _ in range(5))
        return _Workspace(x, p, q, log_q, more, torch.zeros_like(x))

    def first(self, count: int) -> _Workspace:
        return self if count == len(self.x) else _Workspace(*(t[:count] for t in self))


def _chunk(x: Tensor, gamma: float, weight: float, out: Tensor | None, work: _Workspace) -> Tensor:
    """Return the unweighted sum of a chunk of negatives, and write their weighted gradient to `out`."""
    if x.dtype != work.x.dtype:
        x = work.x.copy_(x)
    p, q, log_q = _sigmoid_and_log(x, work)
    power = _power(p, gamma, work.more)
    total = -(log_q.sum() if power is None else torch.dot(power, log_q))
    if out is not None:
        slope = p if gamma == 0 else torch.add(p, q.mul_(log_q), alpha=-gamma, out=q)
        if power is None:
            torch.mul(slope, weight, out=out)
        elif out.dtype == slope.dtype:
            torch.addcmul(work.zeros, power, slope, value=weight, out=out)
        else:
            torch.mul(slope, power, out=slope)
            torch.mul(slope, weight, out=out)
    return total


def _negatives(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of negatives, p^γ softplus(x), and its derivative p^γ (γ (1 - p) softplus(x) + p)."""
    p, q, log_q = _sigmoid_and_log(x, _Workspace.like(x))
    value, slope = -log_q, p - gamma * q * log_q
    power = _power(p, gamma, torch.empty_like(p))
    return (value, slope) if power is None else (power * value, power * slope)


def _power(p: Tensor, gamma: float, out: Tensor) -> Tensor | None:
    """p^γ, or None for 1."""
    if gamma == 0:
        return None
    if gamma == 1:
        return p
    if gamma == 2:
        return torch.mul(p, p, out=out)
    return torch.pow(p, gamma, out=out)


def _sigmoid_and_log(x: Tensor, work: _Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """p = σ(x), q = 1 - p and log(q) = -softplus(x) to full precision, from one sigmoid and one logarithm.

    log1p is many times slower than log. With s = σ(-|x|) ≤ 1/2 and u the rounded 1 - s, the rounding error
    (1 - u) - s is exact, and log(1 - s) = log(u) + ((1 - u) - s) / u to the last digit. Where no logit of the
    chunk is above 0, which is most chunks, s is p and u is q.
    """
    above = None if x.numel() == 0 or x.amax() <= 0 else x > 0
    s = torch.sigmoid(x if above is None else torch.abs(x, out=work.p).neg_(), out=work.p)
    u = torch.sub(1, s, out=work.q)
    log = torch.log(u, out=work.log_q)
    log.addcdiv_(torch.sub(1, u, out=work.more).sub_(s), u)
    if above is None:
        return s, u, log
    return torch.where(above, u, s), torch.where(above, s, u), log.sub_(x.clamp(min=0))
