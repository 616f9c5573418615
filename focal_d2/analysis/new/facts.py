"""What is measured of a dataset before anything is chosen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from focal_d2.analysis.new.pixels import HASHES, likeness, overlapping_pairs, thumbnail, window_hashes
from focal_d2.annotations import Table
from focal_d2.data.image_files import UNREADABLE, open_image, open_image_file
from focal_d2.data.pixels import read_with_pillow

# Of so many images the pixels are looked at, for an upright direction and for sequences.
_SAMPLE = 150
# Shared pixels are searched for if all images together have at most so many: some 20 seconds on a core.
_MOST_PIXELS = 3 * 10**8
_LEAST_IMAGES = 8  # from which the direction of images is judged
_SIDES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.95)
_LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")
_PIXEL_SCALE, _TIE_POINT = 33550, 33922  # tags of GeoTIFF


@dataclass(frozen=True)
class Direction:
    """Signs that images have an upright direction; all are near 0 without one.

    Attributes:
        images: of which the pixels were looked at.
        brightness: the mean difference between the upper and the lower third, in standard deviations of the
            image's thumbnail; sky makes it positive.
        perspective: the correlation of a box's place in its image, from top to bottom, with the logarithm of
            its side; nearer objects are lower and larger.
    """

    images: int
    brightness: float
    perspective: float


@dataclass(frozen=True)
class Facts:
    """The images and boxes to train on, in numbers; sides in pixels of the files."""

    images: int
    boxes: int
    negatives: int  # images without boxes
    counts: dict[str, int]  # boxes of each class
    heights: np.ndarray = field(repr=False)  # (N,)
    widths: np.ndarray = field(repr=False)  # (N,)
    side: dict[float, float]  # quantile -> √(width · height) of the boxes
    longest: dict[float, float]  # quantile -> the longer side
    share: dict[float, float]  # quantile -> the side divided by the shorter edge of its image
    longest_share: dict[float, float]  # quantile -> the longer side divided by that edge
    spread: tuple[float, float]  # standard deviations of the logarithms of sides, and of these shares
    aspect: tuple[float, float]  # 5 and 95 % quantiles of height / width
    most_boxes: int  # in an image

    @property
    def short_edge(self) -> int:
        """The median of the images' shorter sides."""
        return int(np.median(np.minimum(self.heights, self.widths)))

    @property
    def long_edge(self) -> int:
        """The median of the images' longer sides."""
        return int(np.median(np.maximum(self.heights, self.widths)))

    @property
    def longest_edge(self) -> int:
        """The longest side of an image."""
        return int(max(self.heights.max(), self.widths.max()))

    @property
    def uniform(self) -> bool:
        """Whether all images have nearly the same shorter side."""
        shorter = np.minimum(self.heights, self.widths)
        return bool(shorter.max() <= 1.1 * shorter.min())

    @property
    def scale_free(self) -> bool:
        """Whether boxes vary less in shares of their images than in pixels, as in photographs."""
        return not self.uniform and self.spread[1] < self.spread[0]

    @property
    def boxes_per_pixel(self) -> float:
        """Boxes divided by the area of all images."""
        return float(self.boxes / (self.heights.astype(float) * self.widths).sum())

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {
            "images": self.images,
            "boxes": self.boxes,
            "images_without_boxes": self.negatives,
            "classes": self.counts,
            "short_edge": self.short_edge,
            "long_edge": self.long_edge,
            "longest_edge": self.longest_edge,
            "side": {f"{q:g}": round(x, 2) for q, x in self.side.items()},
            "longer_side": {f"{q:g}": round(x, 2) for q, x in self.longest.items()},
            "share_of_shorter_edge": {f"{q:g}": round(x, 4) for q, x in self.share.items()},
            "aspect": [round(x, 3) for x in self.aspect],
            "most_boxes": self.most_boxes,
        }


def facts_of(table: Table) -> Facts:
    """Measure a table with at least one box."""
    objects = table.objects
    extent = table.boxes[objects, 2:]
    side, aspect = np.sqrt(extent.prod(axis=1)), extent[:, 1] / extent[:, 0]
    longest = extent.max(axis=1)
    edge = table.sizes[table.image[objects]].min(axis=1)
    per_image = np.bincount(table.image[objects], minlength=len(table))
    labels = np.bincount(table.labels[objects], minlength=len(table.classes))
    low, high = np.quantile(aspect, (0.05, 0.95)).tolist()
    return Facts(
        images=len(table),
        boxes=int(objects.sum()),
        negatives=int((per_image == 0).sum()),
        counts=dict(zip(table.classes, labels.tolist(), strict=True)),
        heights=table.sizes[:, 0],
        widths=table.sizes[:, 1],
        side=dict(zip(_SIDES, np.quantile(side, _SIDES).tolist(), strict=True)),
        longest=dict(zip(_SIDES, np.quantile(longest, _SIDES).tolist(), strict=True)),
        share=dict(zip(_SIDES, np.quantile(side / edge, _SIDES).tolist(), strict=True)),
        longest_share=dict(zip(_SIDES, np.quantile(longest / edge, _SIDES).tolist(), strict=True)),
        spread=(float(np.log(side).std()), float(np.log(side / edge).std())),
        aspect=(low, high),
        most_boxes=int(per_image.max()),
    )


@dataclass(frozen=True)
class Looked:
    """What the pixels of images say.

    Attributes:
        shared: pairs of images with equal pixels, moved or not.
        searched: whether moved pixels were searched for; False if the images are too large for that.
        exact: whether images are of formats that keep pixels, so that pairs can be found.
        alike: see `likeness`; None for less than three images.
        brightness: see `Direction`; NaN without images.
        images: of which the pixels were looked at.
    """

    shared: list[tuple[int, int]]
    searched: bool
    exact: bool
    alike: tuple[float, float] | None
    brightness: float
    images: int


def look(table: Table, *, search: bool, max_pixels: int | None, seed: int = 0) -> Looked:
    """Read images of a table: all if they are to be compared, else some hundred.

    Images that cannot be read are passed over: the doctor names them.

    Args:
        table: of the images, in the order of their names.
        search: whether to search for images that share pixels.
        max_pixels: of an image; larger ones are passed over.
        seed: of the pairs that are compared at random.
    """
    pixels = table.sizes.astype(float).prod(axis=1)
    whole = search
    search = search and pixels.sum() <= _MOST_PIXELS
    sample = np.unique(np.linspace(0, len(table) - 1, min(len(table), _SAMPLE)).astype(int)).tolist()
    # Neighbours in the sample must be neighbours by name.
    block = list(range(min(len(table), _SAMPLE)))
    looked_at = {*sample, *block}
    one_in = max(1, int(np.median(pixels)) // HASHES)
    chosen = range(len(table)) if whole else sorted(looked_at)
    hashes = [(np.zeros(0, np.uint64), np.zeros((0, 2), np.int64))] * len(table)
    shapes = [(0, 0)] * len(table)
    thumbnails: dict[int, np.ndarray] = {}
    first: dict[bytes, int] = {}  # of the images with the same pixels
    equal: list[tuple[int, int]] = []
    for i in chosen:
        try:
            grey = read_with_pillow(table.file_names[i], "L", max_pixels=max_pixels)[..., 0]
        except UNREADABLE:
            continue
        if whole:
            key = str(grey.shape).encode()
            digest = hashlib.blake2b(grey.tobytes(), digest_size=16, key=key).digest()
            if first.setdefault(digest, i) != i:
                equal.append((first[digest], i))
        if i in looked_at:
            thumbnails[i] = thumbnail(grey)
        if search:
            hashes[i], shapes[i] = window_hashes(grey, one_in), (grey.shape[0], grey.shape[1])
    overlapping = overlapping_pairs(hashes, shapes) if search else []
    in_order = [thumbnails[i] for i in block if i in thumbnails]
    rng = np.random.default_rng(seed)
    seen = [thumbnails[i] for i in sample if i in thumbnails]
    lossy = [x.lower().endswith(_LOSSY) for x in table.file_names]
    return Looked(
        shared=sorted({*equal, *overlapping}),
        searched=search,
        exact=search and not any(lossy),
        alike=likeness(np.array(in_order), rng) if len(in_order) > 2 else None,
        brightness=_brightness(seen),
        images=len(seen),
    )


def _brightness(thumbnails: Sequence[np.ndarray]) -> float:
    if not thumbnails:
        return float("nan")
    third = len(thumbnails[0]) // 3
    return float(np.mean([(x[:third].mean() - x[-third:].mean()) / (x.std() + 1e-9) for x in thumbnails]))


def direction_of(table: Table, looked: Looked) -> Direction | None:
    """Return the signs of an upright direction; None if there are too few images."""
    objects = table.objects
    boxes, image = table.boxes[objects], table.image[objects]
    if looked.images < _LEAST_IMAGES or len(boxes) < _LEAST_IMAGES:
        return None
    middle = (boxes[:, 1] + boxes[:, 3] / 2) / table.sizes[image, 0]
    side = np.log(np.sqrt(boxes[:, 2:].prod(axis=1)))
    varies = middle.std() > 0 and side.std() > 0
    perspective = float(np.corrcoef(middle, side)[0, 1]) if varies else 0.0
    return Direction(looked.images, looked.brightness, perspective)


def map_extents(table: Table) -> np.ndarray | None:
    """Return the extents (N, 4) of georeferenced TIFF files on their map; None if any image has none."""
    extents = np.zeros((len(table), 4))
    for i, path in enumerate(table.file_names):
        if os.path.splitext(path)[1].lower() not in (".tif", ".tiff"):
            return None
        try:
            with open_image_file(path, None) as file, open_image(file, max_pixels=None) as image:
                tags = getattr(image, "tag_v2", {})
                scale, tie = tags.get(_PIXEL_SCALE), tags.get(_TIE_POINT)
                width, height = image.size
        except UNREADABLE:
            return None
        if not scale or not tie or len(scale) < 2 or len(tie) < 5:
            return None
        left, top = tie[3] - tie[0] * scale[0], tie[4] + tie[1] * scale[1]
        extents[i] = left, top - height * scale[1], left + width * scale[0], top
    return extents
