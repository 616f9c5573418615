"""The one-pass losses on a GPU without kernels: each logit with its label, in large chunks.

Nothing here waits for the GPU: no number is read back, and no shape depends on values. So each logit is
computed both as a negative and as a positive, and the label chooses. A CPU is faster with `dense_chunks`.

Shapes: see `dense`; a level is viewed as (blocks, K, offsets), see `dense_exceptions.by_class`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from focal_d2.ops.losses.dense_chunks import kept_scale, negative_terms, upcast
from focal_d2.ops.losses.dense_exceptions import by_class
from focal_d2.ops.losses.dense_terms import DenseLoss, of_class

# Logits of a chunk. In float32, each of some 15 temporaries has 16 MiB.
CHUNK = 1 << 22


def masked_loss(
    levels: Sequence[tuple[Tensor, Tensor | None]],
    labels: Tensor,
    quality: Tensor | None,
    num_classes: int,
    loss: DenseLoss,
) -> Tensor:
    """Return the sum (float64) over all levels, and write the gradients times `kept_scale`.

    Args:
        levels: L × (N, A·K, H, W) logits, contiguous or channels-last, and a tensor of the same layout for
            their gradients, or None.
        labels: (N, R) int64.
        quality: (N, R) float, or None.
        num_classes: K.
        loss: which one.
    """
    sums, start = [labels.new_zeros((), dtype=torch.float64)], 0
    for level, gradient in levels:
        stop = start + level.shape[1:].numel() // num_classes
        logits, label = by_class(level, num_classes), _as_blocks(labels[:, start:stop], level)
        soft = None if quality is None else _as_blocks(quality[:, start:stop], level)
        written = None if gradient is None else by_class(gradient, num_classes)
        start = stop
        for part in _parts(logits):
            total, slope = _chunk(logits[part], label[part], None if soft is None else soft[part], loss)
            sums.append(total)
            if written is not None:
                torch.mul(slope, kept_scale(written), out=written[part])
    return torch.stack(sums).sum()


def _parts(logits: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the parts of (blocks, K, offsets) that are computed at once, with all classes of an anchor."""
    blocks, classes, offsets = logits.shape
    width = min(max(1, offsets), max(1, CHUNK // classes))
    height = max(1, CHUNK // (classes * width))
    for top, left in product(range(0, blocks, height), range(0, offsets, width)):
        yield slice(top, top + height), slice(None), slice(left, left + width)


def _as_blocks(values: Tensor, level: Tensor) -> Tensor:
    """Return values (N, H·W·A) of a level's anchors as (blocks, 1, offsets), see `by_class`."""
    if not level.is_contiguous():
        return values.reshape(-1, 1, 1)
    cells = level.shape[2] * level.shape[3]
    return values.unflatten(1, (cells, -1)).transpose(1, 2).reshape(-1, 1, cells)


def _chunk(logits: Tensor, labels: Tensor, quality: Tensor | None, loss: DenseLoss) -> tuple[Tensor, Tensor]:
    """Return the sum (float64) of logits (b, K, n) with labels (b, 1, n), and the gradient (b, K, n)."""
    x = upcast(logits)
    classes = torch.arange(x.shape[1], device=x.device).unsqueeze(1)
    is_class, valid = labels == classes, labels >= 0
    negative, weight = negative_terms(x, loss.gamma), of_class(loss.negative_weight, classes)
    positive = loss.positives(x, x if quality is None else quality.to(x.dtype), classes)
    value, slope = (
        torch.where(valid, torch.where(is_class, p, weight * n), 0.0)
        for p, n in zip(positive, negative, strict=True)
    )
    return value.sum(dtype=torch.float64), slope
