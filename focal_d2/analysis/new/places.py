"""Which images belong together: tiles of one picture, frames of a sequence, copies of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from focal_d2.analysis.new.names import NamedPlaces

# Images are a sequence if neighbours by number are so much alike, and so much more than others are; or if all
# are alike, as those of a camera that does not move.
_ALIKE, _MORE_ALIKE, _ALL_ALIKE = 0.6, 0.2, 0.9
# Of a sequence, the share of frames that is left out at each border between two sides.
_GAP = 0.02


class Places(NamedTuple):
    """N images in groups that are not divided, or only along known positions.

    Attributes:
        groups: (N,) int64; images of a group show one place, or one time.
        extents: (N, 4) float64, (low, low, high, high) of each image on the two axes of its group. Images
            whose extents overlap show, or may show, the same. NaN: unknown.
        axes: on which of the two axes a group may be cut.
        shared: pairs of images with the same pixels.
        reason: what shows it, a sentence.
        upright: False if images are tiles of larger pictures, as of the ground seen from above; else None.
    """

    groups: np.ndarray
    extents: np.ndarray
    axes: tuple[int, ...]
    shared: list[tuple[int, int]]
    reason: str
    upright: bool | None = None


def find_places(
    names: NamedPlaces,
    sizes: np.ndarray,
    *,
    shared: Sequence[tuple[int, int]] = (),
    alike: tuple[float, float] | None = None,
    on_map: np.ndarray | None = None,
    exact: bool = True,
    classes: Sequence[frozenset[int]] = (),
) -> Places:
    """Put together what names, pixels and coordinates show.

    Args:
        names: of the N images.
        sizes: (N, 2) height and width.
        shared: pairs of images with the same pixels.
        alike: see `focal_d2.analysis.new.pixels.likeness`; None: not measured.
        on_map: (N, 4) extents on a map, of georeferenced images; None: not all are.
        exact: whether equal pixels would be found: no image is a JPEG.
        classes: of each image's boxes; (): unknown.
    """
    places = _by_name(names, sizes, alike, exact=exact, classes=classes)
    if on_map is not None:
        reason = "the images have positions on a map"
        groups = _connected(len(sizes), _touching(on_map))
        places = Places(groups, on_map, (0, 1), [], reason, upright=False)
    return _with_shared(places, shared)


def _by_name(
    names: NamedPlaces,
    sizes: np.ndarray,
    alike: tuple[float, float] | None,
    *,
    exact: bool,
    classes: Sequence[frozenset[int]],
) -> Places:
    count = len(sizes)
    unknown = np.full((count, 4), np.nan)
    alone = Places(np.arange(count), unknown, (), [], "names and pixels show no images that belong together")
    _, groups = np.unique(names.groups, return_inverse=True)
    number = int(groups.max()) + 1
    if names.kind == "tiles":
        side = sizes.max(axis=1, keepdims=True).astype(np.float64)
        what = f"names end in two numbers, as tiles of {_count(number, 'picture')} do"
        if names.pixels:
            extents = np.hstack([names.numbers, names.numbers + side])
            return Places(
                groups, extents, (0, 1), [], f"{what}: positions in pixels, tiles of {side.max():g}", False
            )
        # Equal pixels show the overlaps of tiles; where they can't be found, neighbours may overlap.
        margin = 0.0 if exact else 0.5
        extents = np.hstack([names.numbers - margin, names.numbers + 1 + margin])
        return Places(groups, extents, (0,), [], f"{what}: rows and columns", False)
    if names.kind == "frames":
        if number > 1 and _are_classes(groups, classes):
            return alone._replace(reason="names show classes, and no images that belong together")
        is_sequence = alike is not None and _is_sequence(*alike)
        measured = (
            "" if alike is None else f"neighbours correlate by {alike[0]:.2f}, others by {alike[1]:.2f}"
        )
        if number == 1 and not is_sequence:
            return alone._replace(
                reason=f"numbers in the names show no sequence: {measured}" if measured else alone.reason
            )
        rank = _ranks(groups, names.numbers[:, 0])
        gap = max(1.0, round(_GAP * count / number)) if is_sequence else 0.0
        extents = np.column_stack([rank, np.zeros(count), rank + 1 + gap, np.ones(count)])
        reason = f"names are those of {_count(number, 'sequence')}, with a number for each image"
        return Places(groups, extents, (0,), [], f"{reason}{'; ' if measured else ''}{measured}")
    if names.kind == "copies":
        return Places(groups, unknown, (), [], f"names show augmented copies of {_count(number, 'image')}")
    return alone


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_sequence(neighbours: float, others: float) -> bool:
    return neighbours >= _ALIKE and (neighbours >= others + _MORE_ALIKE or others >= _ALL_ALIKE)


def _are_classes(groups: np.ndarray, classes: Sequence[frozenset[int]]) -> bool:
    """Tell whether each group's boxes are of one class, which no other group has."""
    if not classes:
        return False
    of_group: dict[int, set[int]] = {}
    for group, labels in zip(groups.tolist(), classes, strict=True):
        of_group.setdefault(group, set()).update(labels)
    single = [next(iter(x)) for x in of_group.values() if len(x) == 1]
    return len(single) == len(of_group) == len(set(single))


def _ranks(groups: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the place of each image in the order of its group, from 0."""
    ranks = np.zeros(len(groups))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        ranks[rows[np.argsort(numbers[rows], kind="stable")]] = np.arange(len(rows))
    return ranks


def _with_shared(places: Places, shared: Sequence[tuple[int, int]]) -> Places:
    """Join the groups of images that share pixels."""
    if not shared:
        return places
    count = len(places.groups)
    _, firsts = np.unique(places.groups, return_index=True)
    members = [(int(firsts[places.groups[i]]), i) for i in range(count)]
    groups = _connected(count, [*members, *shared])
    extents = places.extents.copy()
    for group in np.unique(groups):  # positions are those within a picture
        rows = groups == group
        if len(np.unique(places.groups[rows])) > 1:
            extents[rows] = np.nan
    reason = f"{places.reason}; {_count(len(shared), 'pair')} of images share pixels"
    upright = False if _moved(shared, count) else places.upright
    return places._replace(groups=groups, extents=extents, shared=[*shared], reason=reason, upright=upright)


def _moved(shared: Sequence[tuple[int, int]], count: int) -> bool:
    """Tell whether so many images share pixels that they are tiles, not copies that slipped in."""
    return len({i for pair in shared for i in pair}) > count / 2


def _connected(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Number the connected parts of a graph of `count` nodes, (count,) int64 from 0."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j in pairs:
        parent[root(i)] = root(j)
    return np.unique([root(i) for i in range(count)], return_inverse=True)[1]


def _touching(extents: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of extents (N, 4) that overlap or touch."""
    return [
        (i, int(j))
        for i in range(len(extents))
        for j in np.flatnonzero(overlaps(extents, extents[i], touching=True))
        if i < j
    ]


def overlaps(extents: np.ndarray, other: np.ndarray, *, touching: bool = False) -> np.ndarray:
    """Tell which extents (N, 4) overlap another (4,); unknown ones do not."""
    low, high = np.maximum(extents[:, :2], other[:2]), np.minimum(extents[:, 2:], other[2:])
    return ((high >= low) if touching else (high > low)).all(axis=1)
