"""What names of images show: tiles of one picture, frames of a video, copies of one image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Roboflow's exports: the name of the image, and a hash for each augmented copy.
_COPY = re.compile(r"^(.*)\.rf\.[0-9A-Za-z]{16,}$")
_TWO_NUMBERS = re.compile(r"^(.*?)(\d+)([^\d/]{1,6})(\d+)$")
_ONE_NUMBER = re.compile(r"^(.*?)(\d+)$")
# Names speak for the whole set if so many of its images follow a pattern.
_MOST = 0.8
# Images of a group, on average, from which a pattern is one.
_LEAST = 3
# Numbers of tiles are pixels, not rows and columns, if they are on average so far apart.
_PIXELS = 8


class NamedPlaces(NamedTuple):
    """Images that belong together by their names.

    Attributes:
        kind: "tiles" (two numbers end the name), "frames" (one), "copies" or "none".
        groups: (N,) the name that the images of a group share.
        numbers: (N, 2) float64, the two numbers of a tile, or the number of a frame and 0; NaN without.
        pixels: whether the numbers of tiles are offsets in pixels.
    """

    kind: str
    groups: list[str]
    numbers: np.ndarray
    pixels: bool = False


def read_names(stems: Sequence[str]) -> NamedPlaces:
    """Find the pattern that most of the names follow.

    Args:
        stems: (N) paths of the images without endings, relative to their folder.

    Examples:
        >>> read_names(["a_0_0", "a_0_1", "a_1_0", "a_1_1"]).kind
        'tiles'
        >>> read_names(["film1_001", "film1_002", "film1_003", "film2_001", "film2_002", "film2_003"]).groups
        ['film1_', 'film1_', 'film1_', 'film2_', 'film2_', 'film2_']
    """
    copies = [_COPY.match(stem) for stem in stems]
    bases = [match[1] if match else stem for match, stem in zip(copies, stems, strict=True)]
    for kind, pattern in (("tiles", _TWO_NUMBERS), ("frames", _ONE_NUMBER)):
        matches = [pattern.match(base) for base in bases]
        if sum(x is not None for x in matches) < _MOST * len(stems):
            continue
        groups = [x[1] if x else base for x, base in zip(matches, bases, strict=True)]
        numbers = np.full((len(stems), 2), np.nan)
        for i, x in enumerate(matches):
            if x:
                numbers[i] = (float(x[2]), float(x[4])) if kind == "tiles" else (float(x[2]), 0)
        if kind == "tiles":
            groups = [f"{x[1]}*{x[3]}*" if x else base for x, base in zip(matches, bases, strict=True)]
            if not _are_grids(groups, numbers):
                continue
        elif len(stems) < _LEAST * len(set(groups)):
            continue
        return NamedPlaces(kind, groups, numbers, kind == "tiles" and _are_pixels(groups, numbers))
    if len(set(bases)) < len(stems):
        return NamedPlaces("copies", bases, np.full((len(stems), 2), np.nan))
    return NamedPlaces("none", list(stems), np.full((len(stems), 2), np.nan))


def _rows_of(groups: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return rows


def _are_grids(groups: Sequence[str], numbers: np.ndarray) -> bool:
    """Tell whether most images are in groups in which both numbers occur again, each pair once."""
    of_grids = 0
    for rows in _rows_of(groups).values():
        pairs = numbers[rows]
        pairs = pairs[~np.isnan(pairs).any(axis=1)]
        first, second = (len(set(column)) for column in pairs.T.tolist())
        unique = len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
        if unique and len(pairs) >= 4 and max(first, second) < len(pairs) <= first * second:
            of_grids += len(rows)
    return of_grids >= _MOST * len(groups)


def _are_pixels(groups: Sequence[str], numbers: np.ndarray) -> bool:
    """Tell whether neighbours' numbers differ by pixels; rows and columns differ by 1."""
    steps: list[float] = []
    for rows in _rows_of(groups).values():
        for column in numbers[rows].T:
            steps += np.diff(np.unique(column[~np.isnan(column)])).tolist()
    return bool(steps) and float(np.median(steps)) >= _PIXELS


def largest_share(groups: Sequence[str]) -> float:
    """Return the share of the images that are in the largest group."""
    return max(Counter(groups).values()) / len(groups)
