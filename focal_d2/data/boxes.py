"""Boxes and the window they are seen through."""

from __future__ import annotations

import numpy as np


def clip_to_window(boxes: np.ndarray, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to a window.

    Args:
        boxes: (M, 4) XYXY with positive areas.
        window: left, top, right, bottom in the same pixels.

    Returns:
        The clipped boxes (M, 4), and the share of each box's area that is left (M,).
    """
    low, high = np.array(window[:2] * 2), np.array(window[2:] * 2)
    clipped = np.clip(boxes, low, high)
    return clipped, _areas(clipped) / _areas(boxes)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
