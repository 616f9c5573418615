"""Triton kernels for GPUs: the one-pass losses of all levels.

The host never waits for the GPU: no number is read back, and no shape depends on values. The sum does not
depend on the order in which programs run, because each program writes its partial sum to a separate element.

Only `common.find_kernels` imports this module, where Triton is installed. If TRITON_INTERPRET=1 is set,
Triton's interpreter runs the kernels on CPU tensors; the tests do that.

Shapes: see `dense`. A program is one block of threads, and a tile is the elements that it computes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from focal_d2.ops.common import in_memory_order

# Not tuned on a GPU yet. A program computes one tile of channels-last levels, and a tile for each of some
# classes of contiguous ones, for which it reads the labels once.
_LOSS_TILE = 2048  # elements of channels-last levels
_LOSS_CELLS = 512  # cells of contiguous levels
_LOSS_CLASSES = 16  # at most so many classes
_LOSS_WARPS = 4
# Backward: elements of a tile, and the number of programs, which go from tile to tile.
_SCALE_TILE = 2048
_SCALE_PROGRAMS = 1024


def dense_loss(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    labels: Tensor,
    quality: Tensor | None,
    upstream: Tensor,
    *,
    num_classes: int,
    kind: str,
    gamma: float,
    negative_weight: float | Tensor,
    positive_weight: float | Tensor,
) -> Tensor:
    """Return the sum of a one-pass loss over all levels, and write its gradient, in one launch.

    Args:
        levels: L × (N, A·K, H, W) bfloat16, float16 or float32, all contiguous or all channels-last.
        gradients: L tensors laid out as the levels; None: not wanted.
        labels: (N, R) int64; the class in [0, K), K for background, below 0 for no loss.
        quality: (N, R) float in [0, 1], read where the label is a class; None for the focal loss.
        upstream: float32 scalar: the gradients are multiplied by it.
        num_classes: K.
        kind: "focal", "quality" or "varifocal".
        gamma: the focusing parameter; beta of the quality focal loss.
        negative_weight: a number, or one for each class (K,); not for "quality".
        positive_weight: likewise; for "focal" only.

    Returns:
        A scalar in float64.
    """
    per_class = isinstance(negative_weight, Tensor)
    weights = [
        w.to(labels.device, torch.float32).contiguous() if isinstance(w, Tensor) else float(w)
        for w in (negative_weight, positive_weight)
    ]
    channels_last = not all(x.is_contiguous() for x in levels)
    images, channels = levels[0].shape[:2]
    groups = triton.cdiv(num_classes, _LOSS_CLASSES)
    # Levels without a cell have no programs.
    used = [i for i, x in enumerate(levels) if x.numel()]
    cells = [levels[i].shape[2] * levels[i].shape[3] for i in used]
    first = [0]
    for count in cells:
        if channels_last:
            programs = triton.cdiv(count * channels, _LOSS_TILE)
        else:
            programs = triton.cdiv(count, _LOSS_CELLS) * groups * (channels // num_classes)
        first.append(first[-1] + programs * images)
    partial = torch.empty(first[-1], dtype=torch.float32, device=labels.device)
    if used:
        with torch.cuda.device_of(labels):
            _loss_kernel[(first[-1],)](
                tuple(levels[i] for i in used),
                None if gradients is None else tuple(gradients[i] for i in used),
                labels.contiguous(),
                None if quality is None else quality.contiguous(),
                upstream,
                *weights,
                partial,
                _as_odd(first[:-1]),
                _as_odd(cells),
                labels.shape[1],
                float(gamma),
                A=channels // num_classes,
                K=num_classes,
                KIND=kind,
                POWER=int(gamma) if gamma in (0, 1, 2) else -1,
                PER_CLASS=per_class,
                CHANNELS_LAST=channels_last,
                TILE=_LOSS_TILE if channels_last else _LOSS_CELLS,
                CLASSES=triton.cdiv(num_classes, groups),
                num_warps=_LOSS_WARPS,
            )
    return partial.sum(dtype=torch.float64)


def _as_odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return 2n + 1 for each number: Triton compiles a kernel for each pattern of 1s and multiples of 16."""
    return tuple(2 * n + 1 for n in numbers)


def rescale(gradients: Sequence[Tensor], upstream: Tensor, expected: Tensor) -> None:
    """Multiply gradients by `upstream` / `expected` in place, or leave them alone if the two are equal.

    Args:
        gradients: L tensors, all of one type, each contiguous or channels-last.
        upstream: float32 scalar, the gradient that backward was given.
        expected: float32 scalar, the gradient that `dense_loss` multiplied by.
    """
    flat = [in_memory_order(x) for x in gradients if x.numel()]
    tiles = max((triton.cdiv(len(x), _SCALE_TILE) for x in flat), default=0)
    if tiles:
        with torch.cuda.device_of(upstream):
            _rescale_kernel[(min(tiles, _SCALE_PROGRAMS),)](
                tuple(flat), _as_odd([len(x) for x in flat]), upstream, expected, TILE=_SCALE_TILE
            )


@triton.jit
def _rescale_kernel(gradients, sizes, upstream, expected, TILE: tl.constexpr):
    """Scale `gradients`; see `rescale`. Each program takes every P-th tile of each level, P programs."""
    actual = tl.load(upstream)
    written = tl.load(expected)
    if actual != written:
        for i in tl.static_range(len(gradients)):
            size = sizes[i].to(tl.int64) // 2
            for tile in range(tl.program_id(0), tl.cdiv(size, TILE), tl.num_programs(0)):
                offset = tile * TILE + tl.arange(0, TILE)
                x = tl.load(gradients[i] + offset, mask=offset < size)
                scaled = x.to(tl.float32) * (actual / written)
                tl.store(gradients[i] + offset, scaled, mask=offset < size)


@triton.jit(do_not_specialize=["anchors"])
def _loss_kernel(
    logits,
    gradients,
    labels,
    quality,
    upstream,
    negative_weight,
    positive_weight,
    partial,
    first,
    sizes,
    anchors,
    gamma,
    A: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    PER_CLASS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Value and gradient of a part of a level; see `dense_loss`.

    `logits`, `gradients`, `first` (program) and `sizes` (cells) are tuples of the levels.
    """
    program = tl.program_id(0)
    x = logits[0]
    gradient = None if gradients is None else gradients[0]
    cells = sizes[0] // 2
    first_program = 0
    first_anchor = 0
    end = cells * A
    for i in tl.static_range(1, len(sizes)):
        is_here = program >= first[i] // 2
        x = tl.where(is_here, logits[i], x)
        if gradients is not None:
            gradient = tl.where(is_here, gradients[i], gradient)
        cells = tl.where(is_here, sizes[i] // 2, cells)
        first_program = tl.where(is_here, first[i] // 2, first_program)
        first_anchor = tl.where(is_here, end, first_anchor)
        end += sizes[i] // 2 * A
    total = 0.0
    for ALIGNED in tl.static_range(2):
        # Rows that start at multiples of 8 elements allow wide loads, if the compiler knows it.
        if (cells % 8 == 0) == (ALIGNED == 1):
            total = _part(
                x,
                gradient,
                labels + first_anchor,
                None if quality is None else quality + first_anchor,
                upstream,
                negative_weight,
                positive_weight,
                program - first_program,
                cells // 8 * 8 if ALIGNED else cells,
                anchors,
                gamma,
                A,
                K,
                KIND,
                POWER,
                PER_CLASS,
                CHANNELS_LAST,
                TILE,
                CLASSES,
            )
    tl.store(partial + program, total)


@triton.jit
def _part(
    logits,
    gradient,
    labels,
    quality,
    upstream,
    negative_weight,
    positive_weight,
    program,
    cells,
    anchors,
    gamma,
    A: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    PER_CLASS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Write the gradient of a program's part of one level, and return the part's sum.

    Channels-last, it is a tile in the order of memory, of one image. Else it is tiles of up to CLASSES
    classes, on the same cells of one anchor shape. Offsets are 64-bit: logits may exceed 2^31.
    """
    cells = cells.to(tl.int64)
    step = tl.arange(0, TILE)
    if CHANNELS_LAST:
        size = cells * (A * K)
        blocks = tl.cdiv(size, TILE).to(tl.int32)
        image = (program // blocks).to(tl.int64)
        start = (program % blocks).to(tl.int64) * TILE
        inside = step < size - start
        # 32-bit divisions in the tile, 64-bit ones once.
        element = (start % K).to(tl.int32) + step
        k = element % K
        anchor = image * anchors + start // K + element // K
        first = image * size + start
        count = 1
    else:
        GROUPS: tl.constexpr = (K + CLASSES - 1) // CLASSES
        blocks = tl.cdiv(cells, TILE).to(tl.int32)
        group = program // blocks
        shape = (group // GROUPS).to(tl.int64)  # n · A + a
        k = group % GROUPS * CLASSES
        start = (program % blocks).to(tl.int64) * TILE
        inside = step < cells - start
        anchor = shape // A * anchors + shape % A + (start + step) * A
        first = (shape * K + k) * cells + start
        count = tl.minimum(K - k, CLASSES)
    label = tl.load(labels + anchor, mask=inside, other=-1).to(tl.int32)
    valid = label >= 0
    scale = tl.load(upstream)
    target = 0.0
    if KIND != "focal":
        target = tl.load(quality + anchor, mask=valid & (label < K), other=0.0).to(tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for i in range(count):
        x = tl.load(logits + (first + i * cells) + step, mask=inside, other=0.0).to(tl.float32)
        negative = negative_weight
        positive = positive_weight
        if PER_CLASS:
            negative = tl.load(negative_weight + k + i)
            positive = tl.load(positive_weight + k + i)
        value, slope = _term(x, label == k + i, target, negative, positive, gamma, KIND, POWER)
        if gradient is not None:
            # Ignored anchors have none, whatever their logits.
            tl.store(gradient + (first + i * cells) + step, tl.where(valid, scale * slope, 0.0), mask=inside)
        total += tl.where(valid, value, 0.0)
    return tl.sum(total)


@triton.jit
def _term(x, is_class, target, negative, positive, gamma, KIND: tl.constexpr, POWER: tl.constexpr):
    """Value and derivative of logits; `target` is the quality of their anchors, `negative` a weight."""
    if KIND == "focal":
        # A positive is a negative of the opposite logit, with the opposite gradient.
        value, slope = _focal(tl.where(is_class, -x, x), gamma, POWER)
        return tl.where(is_class, positive, negative) * value, tl.where(is_class, -positive, negative) * slope
    else:
        target = tl.where(is_class, target, 0.0)
        if KIND == "quality":
            return _quality_focal(x, target, gamma, POWER)
        else:
            entropy, difference = _soft_cross_entropy(x, target)
            value, slope = _focal(x, gamma, POWER)
            value = tl.where(target > 0, target * entropy, negative * value)
            return value, tl.where(target > 0, target * difference, negative * slope)


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
