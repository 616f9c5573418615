"""What the pixels of images show: shared pixels, likeness of neighbours, and an upright direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np

# Windows whose hashes are compared, in pixels, and about how many of an image are.
_WINDOW = 8
HASHES = 600
# Images share pixels if so many of the windows where they overlap, and so many at least, are equal.
_SHARED, _LEAST_SHARED = 0.5, 15
# A window that more images have is common to a kind of images (a frame, a logo).
_MOST_IMAGES = 16
_THUMBNAIL = 24
_ALONG_X, _ALONG_Y = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # any odd numbers of 64 bits


def window_hashes(grey: np.ndarray, one_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash the windows of 8 × 8 pixels of an image, and choose some by their hash.

    The choice depends on a window's pixels alone. So of two images that share pixels, the same windows are
    chosen, whatever their positions. Windows of one colour are left out.

    Args:
        grey: (H, W) uint8.
        one_in: how many windows there are for each that is chosen.

    Returns:
        (M,) uint64 hashes that occur once in the image, and (M, 2) int64 row and column of each.
    """
    if min(grey.shape) < _WINDOW:
        return np.zeros(0, np.uint64), np.zeros((0, 2), np.int64)
    values = grey.astype(np.uint64) + np.uint64(1)
    height, width = grey.shape[0] - _WINDOW + 1, grey.shape[1] - _WINDOW + 1
    rows = np.zeros((grey.shape[0], width), np.uint64)
    hashes = np.zeros((height, width), np.uint64)
    for i in range(_WINDOW):
        rows += values[:, i : i + width] * np.uint64(pow(_ALONG_X, i + 1, 2**64))
    for i in range(_WINDOW):
        hashes += rows[i : i + height] * np.uint64(pow(_ALONG_Y, i + 1, 2**64))
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    at = np.argwhere(hashes % np.uint64(one_in) == 0)
    windows = np.lib.stride_tricks.sliding_window_view(grey, (_WINDOW, _WINDOW))[at[:, 0], at[:, 1]]
    at = at[windows.max(axis=(1, 2)) > windows.min(axis=(1, 2))] if len(at) else at
    unique, first, times = np.unique(hashes[at[:, 0], at[:, 1]], return_index=True, return_counts=True)
    once = times == 1
    return unique[once], at[first[once]]


def overlapping_pairs(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Find the pairs of images that show the same pixels, moved or not; equal images are such a pair.

    Pixels must be equal: overlaps of tiles that were saved as JPEG are not found.

    Args:
        parts: N × what `window_hashes` returns, with the same `one_in`.
        shapes: N × height and width.
    """
    if not parts:
        return []
    hashes = np.concatenate([x for x, _ in parts])
    owner = np.repeat(np.arange(len(parts)), [len(x) for x, _ in parts])
    places = np.concatenate([at for _, at in parts])
    order = np.lexsort((owner, hashes))
    hashes, owner, places = hashes[order], owner[order], places[order]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, int)
    shifts: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for start, end in zip(starts, np.r_[starts[1:], len(hashes)], strict=True):
        if not 2 <= end - start <= _MOST_IMAGES:
            continue
        for i in range(start, end):
            for j in range(i + 1, end):
                shifts[owner[i], owner[j]].append(tuple(places[i] - places[j]))
    pairs = []
    for (i, j), found in shifts.items():
        shift = max(set(found), key=found.count)
        expected = _in_overlap(parts[i][1], shapes[i], shapes[j], shift)
        if found.count(shift) >= max(_LEAST_SHARED, _SHARED * expected):
            pairs.append((int(i), int(j)))
    return pairs


def _in_overlap(
    places: np.ndarray, shape: tuple[int, ...], other: tuple[int, ...], shift: tuple[int, int]
) -> int:
    """Count the windows of an image, at `places` (M, 2), that are in another image moved by `shift`."""
    low = np.maximum(0, shift)
    high = np.minimum(shape, np.add(other, shift)) - _WINDOW
    return int(((places >= low) & (places <= high)).all(axis=1).sum())


def thumbnail(grey: np.ndarray) -> np.ndarray:
    """Shrink an image (H, W) to 24 × 24 means, float64."""
    size = (_THUMBNAIL, _THUMBNAIL)
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float64)


def likeness(thumbnails: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the median correlation of neighbours, and of images drawn at random.

    Args:
        thumbnails: (N, h, w), N ≥ 2, in the order of their names.
        rng: draws the pairs.
    """
    flat = thumbnails.reshape(len(thumbnails), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9
    others = rng.integers(0, len(flat), (2, 4 * len(flat)))
    others = others[:, np.abs(others[0] - others[1]) > max(1, len(flat) // 10)]
    neighbours = (flat[1:] * flat[:-1]).sum(axis=1)
    at_random = (flat[others[0]] * flat[others[1]]).sum(axis=1)
    return float(np.median(neighbours)), float(np.median(at_random)) if at_random.size else 0.0
