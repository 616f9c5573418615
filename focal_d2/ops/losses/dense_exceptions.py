"""The entries of a dense head's output that are not negatives: positives, and all entries of ignored anchors.

Shapes: see `dense`. `by_class` views a level as (blocks, K, offsets), whatever its layout in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.common import divide, in_memory_order
from focal_d2.ops.losses import dense_chunks
from focal_d2.ops.losses.dense_chunks import kept_scale

# As a negative, a logit of this value has no loss and no gradient, in every precision.
_NO_LOSS = -1e4


class Exceptions(NamedTuple):
    """Where a level has entries that are not negatives: indices into `by_class` of the level."""

    block: Tensor  # (P,) int64, of the positives
    classes: Tensor  # (P,) int64
    offset: Tensor  # (P,) int64
    quality: Tensor | None  # (P,)
    ignored_block: Tensor  # (E,) int64, of the ignored anchors
    ignored_offset: Tensor  # (E,) int64


def find_exceptions(
    levels: Sequence[Tensor], labels: Tensor, quality: Tensor | None, num_classes: int
) -> list[Exceptions]:
    """Find the positives and the ignored anchors of each level.

    Args:
        levels: L × (N, A·K, H, W), contiguous or channels-last.
        labels: (N, R) int64.
        quality: (N, R), or None.
        num_classes: K.
    """
    image, anchor = (labels < num_classes).nonzero(as_tuple=True)
    label = labels[image, anchor]
    exceptions = []
    start = 0
    for x in levels:
        cells = x.shape[2] * x.shape[3]
        per_cell = x.shape[1] // num_classes
        stop = start + cells * per_cell
        here = ((anchor >= start) & (anchor < stop)).nonzero().squeeze(1)
        n, in_level, k = image[here], anchor[here] - start, label[here]
        if x.is_contiguous():
            offset, a = divide(in_level, per_cell)
            block = n * per_cell + a
        else:
            block, offset = n * (stop - start) + in_level, torch.zeros_like(in_level)
        positive = k >= 0
        chosen = here[positive]
        exceptions.append(
            Exceptions(
                block[positive],
                k[positive],
                offset[positive],
                None if quality is None else quality[image[chosen], anchor[chosen]],
                block[~positive],
                offset[~positive],
            )
        )
        start = stop
    return exceptions


def by_class(x: Tensor, num_classes: int) -> Tensor:
    """View a contiguous level as (N · A, K, H · W), a channels-last one as (N · H · W · A, K, 1)."""
    return in_memory_order(x).view(-1, num_classes, x.shape[2] * x.shape[3] if x.is_contiguous() else 1)


def read_exceptions(
    levels: Sequence[Tensor], exceptions: Sequence[Exceptions], num_classes: int
) -> Iterator[tuple[Tensor, Tensor | slice]]:
    """Yield all exceptions' logits and classes: (P,) of positives, then (E', K) of ignored anchors.

    The ignored anchors come in parts. Near many objects a large share of all anchors is ignored, and a copy
    of all their logits would take as much memory as the head's output.
    """
    yield read_positives(levels, exceptions, num_classes), torch.cat([p.classes for p in exceptions])
    size = max(1, dense_chunks.CHUNK // (4 * num_classes))
    for level, p in zip(levels, exceptions, strict=True):
        if len(p.ignored_block):
            view = by_class(level, num_classes)
            for block, offset in zip(p.ignored_block.split(size), p.ignored_offset.split(size), strict=True):
                yield view[block, :, offset], slice(None)


def read_positives(levels: Sequence[Tensor], exceptions: Sequence[Exceptions], num_classes: int) -> Tensor:
    """Return the logits (P,) of all levels' positives."""
    views = [by_class(x, num_classes) for x in levels]
    return torch.cat([x[p.block, p.classes, p.offset] for x, p in zip(views, exceptions, strict=True)])


def without_exceptions(
    levels: Sequence[Tensor], exceptions: Sequence[Exceptions], num_classes: int
) -> list[Tensor]:
    """Copy the levels, with logits that have no loss and no gradient at all exceptions."""
    copies = [x.clone() for x in levels]
    for x, p in zip(copies, exceptions, strict=True):
        view = by_class(x, num_classes)
        view[p.block, p.classes, p.offset] = _NO_LOSS
        view[p.ignored_block, :, p.ignored_offset] = _NO_LOSS
    return copies


def clear_ignored(
    gradients: Sequence[Tensor | None], exceptions: Sequence[Exceptions], num_classes: int
) -> None:
    """Set the gradients of ignored anchors to 0."""
    for g, p in zip(gradients, exceptions, strict=True):
        if g is not None and len(p.ignored_block):
            by_class(g, num_classes)[p.ignored_block, :, p.ignored_offset] = 0


def write_positives(
    gradients: Sequence[Tensor | None], exceptions: Sequence[Exceptions], slope: Tensor, num_classes: int
) -> None:
    """Write the gradients (P,) of all levels' positives."""
    slopes = slope.split([len(p.classes) for p in exceptions])
    for g, p, part in zip(gradients, exceptions, slopes, strict=True):
        if g is not None:
            by_class(g, num_classes)[p.block, p.classes, p.offset] = (part * kept_scale(g)).to(g.dtype)
