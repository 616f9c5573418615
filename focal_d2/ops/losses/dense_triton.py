"""Triton kernels for GPUs: the one-pass losses of a level.

The host never waits for the GPU: no number is read back, and no shape depends on values. The sum does not
depend on the order in which programs run, because each program writes its partial sum to a separate element.

Only `common.find_kernels` imports this module, where Triton is installed. If TRITON_INTERPRET=1 is set,
Triton's interpreter runs the kernels on CPU tensors; the tests do that.

Shapes: see `dense`. A program is one block of threads, and a tile is the elements that it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not tuned on a GPU yet: the elements of a program, its warps, and the largest number of classes in a tile
# of a contiguous level. A label is read once for the classes of a tile.
_LOSS_TILE = 2048
_LOSS_CLASSES = 16
_LOSS_WARPS = 4


def dense_loss(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    labels: Tensor,
    quality: Tensor | None,
    *,
    num_classes: int,
    kind: str,
    gamma: float,
    gradient_scale: float,
    negative_weight: float | Tensor,
    positive_weight: float | Tensor,
) -> Tensor:
    """Return the sum of a one-pass loss over all levels, and write its gradient.

    Args:
        levels: L × (N, A·K, H, W) bfloat16, float16 or float32, each contiguous or channels-last.
        gradients: L tensors laid out as the levels, or None where no gradient is wanted.
        labels: (N, R) int64; the class in [0, K), K for background, below 0 for no loss.
        quality: (N, R) float in [0, 1], read where the label is a class; None for the focal loss.
        num_classes: K.
        kind: "focal", "quality" or "varifocal".
        gamma: the focusing parameter; beta of the quality focal loss.
        gradient_scale: the gradient is multiplied by it.
        negative_weight: a number, or one for each class (K,); not for "quality".
        positive_weight: likewise; for "focal" only.

    Returns:
        A scalar in float64.
    """
    labels = labels.contiguous()
    quality = None if quality is None else quality.contiguous()
    per_class = isinstance(negative_weight, Tensor)
    weights = [
        w.to(labels.device, torch.float32).contiguous() if isinstance(w, Tensor) else float(w)
        for w in (negative_weight, positive_weight)
    ]
    rows = min(_LOSS_CLASSES, triton.next_power_of_2(num_classes))
    tilings = [_tile(x, num_classes, rows) for x in levels]
    partial = torch.empty(sum(t.programs for t in tilings), dtype=torch.float32, device=labels.device)
    start = first_partial = 0
    with torch.cuda.device_of(labels):
        for x, gradient, tiling in zip(levels, gradients, tilings, strict=True):
            if tiling.programs:
                _loss_kernel[(tiling.programs,)](
                    x,
                    gradient,
                    labels,
                    quality,
                    *weights,
                    partial,
                    labels.shape[1],
                    start,
                    first_partial,
                    tiling.blocks,
                    tiling.cells,
                    tiling.per_cell,
                    tiling.size,
                    float(gamma),
                    gradient_scale,
                    K=num_classes,
                    KIND=kind,
                    POWER=int(gamma) if gamma in (0, 1, 2) else -1,
                    PER_CLASS=per_class,
                    CHANNELS_LAST=not x.is_contiguous(),
                    TILE=_LOSS_TILE,
                    ROWS=rows,
                    num_warps=_LOSS_WARPS,
                )
            start += tiling.cells * tiling.per_cell
            first_partial += tiling.programs
    return partial.sum(dtype=torch.float64)


class _Tiling(NamedTuple):
    """How a level is cut into programs."""

    programs: int
    blocks: int  # programs an image (channels-last), or a group of classes of one anchor shape
    cells: int  # H · W
    per_cell: int  # A
    size: int  # elements an image


def _tile(x: Tensor, num_classes: int, rows: int) -> _Tiling:
    cells, per_cell = x.shape[2] * x.shape[3], x.shape[1] // num_classes
    size = x.shape[1] * cells
    if x.is_contiguous():
        blocks = triton.cdiv(cells, _LOSS_TILE // rows)
        programs = blocks * triton.cdiv(num_classes, rows) * per_cell * x.shape[0]
    else:
        blocks = triton.cdiv(size, _LOSS_TILE)
        programs = blocks * x.shape[0]
    return _Tiling(programs, blocks, cells, per_cell, size)


# Triton compiles a kernel for each kind of an argument's value (1, or a multiple of 16), which allows wider
# loads. These arguments change from level to level and allow none, so they cause no further kernels.
@triton.jit(do_not_specialize=["anchors", "start", "first_partial", "blocks"])
def _loss_kernel(
    logits,
    gradient,
    labels,
    quality,
    negative_weight,
    positive_weight,
    partial,
    anchors,
    start,
    first_partial,
    blocks,
    cells,
    per_cell,
    size,
    gamma,
    gradient_scale,
    K: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    PER_CLASS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Value and gradient of a tile; see `dense_loss`.

    Channels-last, a tile is TILE elements in the order of memory, of one image. Else it is ROWS classes of
    one anchor shape (R', 1) on TILE / ROWS cells (1, C'). Offsets are 64-bit: logits may exceed 2^31.
    """
    program = tl.program_id(0)
    block = program % blocks
    outer = program // blocks
    if CHANNELS_LAST:
        image = outer.to(tl.int64)
        first = block.to(tl.int64) * TILE
        step = tl.arange(0, TILE)
        has_anchor = step < size - first
        inside = has_anchor
        # 32-bit divisions in the tile, 64-bit ones once.
        element = (first % K).to(tl.int32) + step
        k = element % K
        anchor_in_level = first // K + element // K
        offset = image * size + first + step
    else:
        GROUPS: tl.constexpr = (K + ROWS - 1) // ROWS
        shape = outer // GROUPS  # n · A + a
        k = (outer % GROUPS) * ROWS + tl.arange(0, ROWS)[:, None]
        cell = block * (TILE // ROWS) + tl.arange(0, TILE // ROWS)[None, :]
        image = (shape // per_cell).to(tl.int64)
        has_anchor = cell < cells
        inside = has_anchor & (k < K)
        anchor_in_level = cell * per_cell + shape % per_cell
        offset = (shape.to(tl.int64) * K + k) * cells + cell
    anchor = image * anchors + start + anchor_in_level
    x = tl.load(logits + offset, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels + anchor, mask=has_anchor, other=-1).to(tl.int32)
    is_class = label == k
    if PER_CLASS:
        negative = tl.load(negative_weight + k, mask=k < K, other=0.0)
        positive = tl.load(positive_weight + k, mask=k < K, other=0.0)
    else:
        negative = negative_weight
        positive = positive_weight
    if KIND == "focal":
        # A positive is a negative of the opposite logit, with the opposite gradient.
        value, slope = _focal(tl.where(is_class, -x, x), gamma, POWER)
        value = tl.where(is_class, positive, negative) * value
        slope = tl.where(is_class, -positive, negative) * slope
    else:
        has_class = has_anchor & (label >= 0) & (label < K)
        target = tl.load(quality + anchor, mask=has_class, other=0.0).to(tl.float32)
        target = tl.where(is_class, target, 0.0)
        if KIND == "quality":
            value, slope = _quality_focal(x, target, gamma, POWER)
        else:
            entropy, difference = _soft_cross_entropy(x, target)
            value, slope = _focal(x, gamma, POWER)
            value = tl.where(target > 0, target * entropy, negative * value)
            slope = tl.where(target > 0, target * difference, negative * slope)
    valid = inside & (label >= 0)
    if gradient is not None:
        tl.store(gradient + offset, tl.where(valid, gradient_scale * slope, 0.0), mask=inside)
    tl.store(partial + first_partial + program, tl.sum(tl.where(valid, value, 0.0)))


@triton.jit
def _focal(x, gamma, POWER: tl.constexpr):
    """p^γ softplus(x), the focal loss of negatives, and its derivative p^γ (γ (1 - p) softplus(x) + p)."""
    p, q, log1p = _sigmoid(x)
    softplus = tl.where(x >= 0, x, 0.0) + log1p
    value = softplus
    slope = gamma * q * softplus + p
    if POWER == 1:
        value = p * value
        slope = p * slope
    elif POWER == 2:
        value = p * p * value
        slope = p * p * slope
    elif POWER != 0:
        power = tl.exp(gamma * (tl.where(x >= 0, 0.0, x) - log1p))  # p is exp(x - softplus(x))
        value = power * value
        slope = power * slope
    return value, slope


@triton.jit
def _quality_focal(x, target, beta, POWER: tl.constexpr):
    """|p - y|^β BCE(x, y) and its derivative; with y = 0 a negative's focal loss."""
    entropy, difference = _soft_cross_entropy(x, target)
    value = entropy
    slope = difference
    if POWER != 0:
        p, q, _ = _sigmoid(x)
        size = tl.abs(difference)
        # At β = 1 the absolute value's derivative is taken as 0 where p = y, as autograd does.
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        slope = beta * sign * p * q * entropy + size * difference
        value = size * entropy
        if POWER == 2:
            value = size * value
            slope = size * slope
        elif POWER != 1:
            power = tl.exp((beta - 1) * tl.log(tl.maximum(size, 1e-37)))
            value = power * value
            slope = power * slope
    return value, slope


@triton.jit
def _soft_cross_entropy(x, target):
    """BCE(x, y), and p - y, its derivative; neither is a difference of numbers nearly equal."""
    p, q, log1p = _sigmoid(x)
    entropy = tl.abs(x) * tl.where(x >= 0, 1 - target, target) + log1p
    return entropy, tl.where(x >= 0, (1 - target) - q, p - target)


@triton.jit
def _sigmoid(x):
    """p = σ(x), q = 1 - p and log(1 + e), e = exp(-|x|), to a few units in the last place.

    On a GPU the relative error of e grows with |x| as if the last bit of x had changed. With t = e / (2 + e),
    log(1 + e) is 2 artanh(t) = 2 t (1 + t²/3 + t⁴/5 + ...): t is at most 1/3, where the first term left out
    is 1.4e-8 of the sum. The series loses no digits: it has no difference, and no logarithm of a number
    near 1.
    """
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    t = e / (2.0 + e)
    square = t * t
    series = 1.0 / 11 + square * (1.0 / 13)
    series = 1.0 / 9 + square * series
    series = 1.0 / 7 + square * series
    series = 1.0 / 5 + square * series
    series = 1.0 / 3 + square * series
    log1p = 2.0 * t * (1.0 + square * series)
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large), log1p
