"""Propose which images to train, validate and test on; images that belong together stay on one side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from focal_d2.analysis.new.places import Places, overlaps
from focal_d2.errors import UserError

TRAIN, VAL, TEST, LEFT_OUT = 0, 1, 2, -1
# From so many images, and boxes, on there is a test set, too.
_IMAGES_FOR_TEST, _BOXES_FOR_TEST = 200, 1000
_VAL_ALONE, _VAL_AND_TEST = 0.2, 0.15
_LEAST_IMAGES = 4
_TRIALS = 300
# How far from the wanted share a side may be, as a share of it, before groups are cut.
_FAR = 0.5


class Proposal(NamedTuple):
    """Sides of N images."""

    sides: np.ndarray  # (N,) int64: TRAIN, VAL, TEST or LEFT_OUT
    reason: str


def wanted_shares(images: int, boxes: int, *, test: bool) -> list[float]:
    """Return the shares of images to validate on and, if there are enough data, to test on.

    Args:
        images: their number.
        boxes: theirs.
        test: whether a test set is wanted.
    """
    if test and images >= _IMAGES_FOR_TEST and boxes >= _BOXES_FOR_TEST:
        return [_VAL_AND_TEST, _VAL_AND_TEST]
    return [_VAL_ALONE]


def propose_split(places: Places, counts: np.ndarray, shares: Sequence[float], *, seed: int) -> Proposal:
    """Divide images so that no two sides show the same.

    Whole groups are drawn many times, and the draw is taken whose sides have the shares of images and of each
    class that are wanted. Where groups are too large for that, each is cut by position, and images that reach
    over a cut are left out.

    Args:
        places: of N images.
        counts: (N, K) of each image what is to be shared out evenly, such as the boxes of each class.
        shares: of the images to validate on and, if there are two, to test on.
        seed: of the draws.

    Raises:
        UserError: if there are too few images, or all show one place that can't be cut.
    """
    images = len(counts)
    if images < _LEAST_IMAGES:
        raise UserError(f"{images} images are too few to train and to validate on; at least {_LEAST_IMAGES}")
    sides = _draw_groups(places.groups, counts, shares, seed)
    got = [(sides == side).mean() for side in range(VAL, VAL + len(shares))]
    whole = len(np.unique(places.groups)) < images
    how = f"{'whole groups' if whole else 'single images'} are drawn (seed {seed})"
    if any(abs(x - share) > _FAR * share for x, share in zip(got, shares, strict=True)):
        sides, how = _cut_groups(places, counts, shares), "each is cut by position"
        if not (sides == VAL).any() or not (sides == TRAIN).any():
            raise UserError(
                f"no validation set can be cut: {places.reason}; put it into a folder or file of its own"
            )
    left_out = int((sides == LEFT_OUT).sum())
    gap = f"; {left_out} images that reach over a cut are left out" if left_out else ""
    return Proposal(sides, f"{places.reason}: {how}{gap}")


def _draw_groups(groups: np.ndarray, counts: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Return the best of many draws of whole groups, (N,) sides."""
    _, groups = np.unique(groups, return_inverse=True)
    number = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=number)
    of_group = np.zeros((number, counts.shape[1]))
    np.add.at(of_group, groups, counts)
    rng = np.random.default_rng(seed)
    best, best_cost = np.zeros(number, dtype=np.int64), np.inf
    for _ in range(_TRIALS):
        order = rng.permutation(number)
        before = np.cumsum(sizes[order]) - sizes[order]
        limits = np.maximum(np.rint(np.cumsum(shares) * len(groups)), np.arange(1, len(shares) + 1))
        side_of_order = np.searchsorted(limits, before, side="right") + 1
        drawn = np.zeros(number, dtype=np.int64)
        drawn[order] = np.where(side_of_order > len(shares), TRAIN, side_of_order)
        cost = imbalance(drawn, sizes, of_group, shares)
        if cost < best_cost:
            best, best_cost = drawn, cost
    return best[groups]


def imbalance(sides: np.ndarray, sizes: np.ndarray, boxes: np.ndarray, shares: Sequence[float]) -> float:
    """Return how far sides are from the wanted shares of images and of each class's boxes; 0 is best.

    A class without a box to train or validate on counts as much as a side that is wholly off.

    Args:
        sides: (G,) of each group.
        sizes: (G,) images of each.
        boxes: (G, K) boxes of each class.
        shares: of the sides after TRAIN.
    """
    total = boxes.sum(axis=0)
    classes = np.flatnonzero(total)
    cost = 0.0
    for side, share in enumerate((1 - sum(shares), *shares)):
        chosen = sides == side
        cost += abs(sizes[chosen].sum() / max(sizes.sum(), 1) - share)
        if len(classes):
            of_side = boxes[chosen][:, classes].sum(axis=0)
            cost += float(np.abs(of_side / total[classes] - share).mean() + (of_side == 0).mean())
    return float(cost)


def _cut_groups(places: Places, counts: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Cut each group at one end for validation and, if wanted, at the other for the test; the best way."""
    images = len(counts)
    ways = list(itertools.product(places.axes, (False, True))) or [(0, False)]
    candidates: list[tuple[float, int, np.ndarray]] = []
    for axis, from_end in ways:
        sides = np.zeros(images, dtype=np.int64)
        for group in np.unique(places.groups):
            rows = np.flatnonzero(places.groups == group)
            sides[rows] = _cut(places, rows, axis, shares, from_end=from_end)
        sides = _leave_out(places, sides)
        kept = sides != LEFT_OUT
        cost = imbalance(sides, np.ones(images), counts, shares) + float((~kept).mean())
        candidates.append((cost, len(candidates), sides))
    return min(candidates)[2]


def _cut(
    places: Places, rows: np.ndarray, axis: int, shares: Sequence[float], *, from_end: bool
) -> np.ndarray:
    """Return the sides of a group's images (M,) by their positions on an axis."""
    positions = places.extents[rows, axis]
    if np.isnan(positions).any():
        positions = _distances(places, rows)
    if from_end:
        positions = -positions
    sides = np.zeros(len(rows), dtype=np.int64)
    values = np.unique(positions)
    for side, share in enumerate(shares, VAL):
        ordered = values if side == VAL else values[::-1]
        # As many positions as come nearest to the share, at least one, and at least one left to train on.
        within = np.array([(positions <= x if side == VAL else positions >= x).mean() for x in ordered[:-1]])
        if not within.size:
            break
        last = ordered[np.abs(within - share).argmin()]
        sides[(positions <= last if side == VAL else positions >= last) & (sides == TRAIN)] = side
    return sides


def _distances(places: Places, rows: np.ndarray) -> np.ndarray:
    """Return how many overlaps each image (M,) of a group is away from an outermost one."""
    inside = set(rows.tolist())
    neighbours: dict[int, list[int]] = {i: [] for i in inside}
    for i, j in places.shared:
        if i in inside and j in inside:
            neighbours[i].append(j)
            neighbours[j].append(i)

    def from_(start: int) -> dict[int, int]:
        distance, front = {start: 0}, [start]
        while front:
            following = [j for i in front for j in neighbours[i] if j not in distance]
            distance.update(dict.fromkeys(following, distance[front[0]] + 1))
            front = list(dict.fromkeys(following))
        return distance

    first = from_(int(rows[0]))
    outermost = max(sorted(first), key=first.__getitem__)
    distance = from_(outermost)
    if len(distance) < len(rows):  # not all are known to be neighbours: the group can't be cut
        return np.zeros(len(rows))
    return np.array([float(distance[i]) for i in rows.tolist()])


def _leave_out(places: Places, sides: np.ndarray) -> np.ndarray:
    """Leave out the images to train on that show the same as those of another side, and then of the test."""
    sides = sides.copy()
    for kept, others in ((VAL, (TRAIN, TEST)), (TEST, (TRAIN,))):
        for i in np.flatnonzero(sides == kept):
            same = overlaps(places.extents, places.extents[i]) & (places.groups == places.groups[i])
            sides[same & np.isin(sides, others)] = LEFT_OUT
        for i, j in places.shared:
            for a, b in ((i, j), (j, i)):
                if sides[a] == kept and sides[b] in others:
                    sides[b] = LEFT_OUT
    return sides
