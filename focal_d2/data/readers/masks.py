"""Boxes around COCO's masks, for annotations that have a mask alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_CHUNKS = 13  # of five bits in a number of compressed RLE; 64 bits have no more


def mask_box(segmentation: Any) -> list[float] | None:
    """Return the extent of a mask.

    Args:
        segmentation: polygons [[x, y, x, y, …], …] in pixels, or run-length encoding {"size":
            [height, width], "counts": run lengths as a list, or in COCO's compressed text}.

    Returns:
        [left, top, width, height] in pixels, zeros for a mask without pixels; None if it is neither kind.
    """
    try:
        if isinstance(segmentation, dict):
            height, width = segmentation["size"]
            return _run_length_box(segmentation["counts"], int(height), int(width))
        points = np.concatenate([np.array(p, dtype=np.float64).reshape(-1, 2) for p in segmentation])
        left, top = points.min(axis=0)
        right, bottom = points.max(axis=0)
    except (TypeError, ValueError, KeyError, OverflowError):
        return None
    return [float(left), float(top), float(right - left), float(bottom - top)]


def _run_length_box(counts: Sequence[int] | str, height: int, width: int) -> list[float]:
    """Read runs of background and mask in turn, over the columns of the image from left to right.

    Raises:
        ValueError: if the runs do not fill the image.
    """
    runs = np.array(_decode(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    ends = runs.cumsum()
    if runs.ndim != 1 or not len(runs) or (runs < 0).any() or height < 1 or ends[-1] != height * width:
        raise ValueError("runs that do not fill the image")
    starts, lengths = (ends - runs)[1::2], runs[1::2]
    starts, last = starts[lengths > 0], (starts + lengths - 1)[lengths > 0]
    if not len(starts):
        return [0.0, 0.0, 0.0, 0.0]
    left, right = starts.min() // height, last.max() // height
    if (starts // height != last // height).any():  # a run over several columns reaches both edges
        top, bottom = 0, height - 1
    else:
        top, bottom = (starts % height).min(), (last % height).max()
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _decode(text: str) -> list[int]:
    """Read COCO's compressed run lengths.

    A number is chunks of five bits, the lowest first, in the characters from "0": a sixth bit says that
    another chunk follows, the highest bit of the last is the sign. From the fourth number on, each is the
    difference to the one two before it.
    """
    counts: list[int] = []
    number = chunks = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or chunks == _MOST_CHUNKS:
            raise ValueError("not COCO's compressed RLE")
        number |= (bits & 31) << 5 * chunks
        chunks += 1
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << 5 * chunks
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = chunks = 0
    if chunks:
        raise ValueError("not COCO's compressed RLE")
    return counts
