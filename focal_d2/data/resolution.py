"""The resolution at which the network sees images and boxes in training, computed from sizes alone.

Sizes are (height, width) in pixels, as in detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode

from focal_d2.annotations import SHORTEST_SIDE, Table

# Share of the training samples that show more of an image than `large_windows` says.
_LARGER = 0.1


class NetworkInputs(NamedTuple):
    """The sizes of N images at the input of the network."""

    scales: np.ndarray  # (N,) float64: by how much sides are multiplied, but for rounding to whole pixels
    sizes: np.ndarray  # (N, 2) int64: what the network sees, cropped and resized
    whole: np.ndarray  # (N, 2) int64: the whole image at that scale; `sizes` if nothing is cropped


class TrainingBoxes(NamedTuple):
    """M boxes at training resolution, on whole images, in the order of a table."""

    rows: np.ndarray  # (M,) int64: positions in the table
    image: np.ndarray  # (M,) int64, ascending
    boxes: np.ndarray  # (M, 4) float64, XYXY absolute pixels
    sizes: np.ndarray  # (N, 2) int64: the images at that resolution


def training_boxes(cfg: CfgNode, table: Table) -> TrainingBoxes:
    """Scale a table's boxes as training does, without crops and turns.

    Boxes that are no objects (see `Table.objects`) are left out; others are clipped to their image.
    """
    sizes = training_inputs(cfg, table.sizes).whole
    rows = np.flatnonzero(table.objects)
    image = table.image[rows]
    corners = table.boxes[rows]
    corners[:, 2:] += corners[:, :2]
    # Along each axis by the ratio of whole pixels, as images are resized.
    corners *= np.tile((sizes / table.sizes)[image, ::-1], 2)
    corners = corners.clip(0, np.tile(sizes[image, ::-1], 2))
    kept = (corners[:, 2:] - corners[:, :2] > SHORTEST_SIDE).all(axis=1)
    return TrainingBoxes(rows[kept], image[kept], corners[kept], sizes)


def training_inputs(cfg: CfgNode, sizes: np.ndarray) -> NetworkInputs:
    """Return the sizes at which training shows images to the network.

    That is up to `INPUT.CROP`, `MIN_SIZE_TRAIN`, `MAX_SIZE_TRAIN`, `FOCAL.SCALE_JITTER`, `FOCAL.BOX_CROP`.

    Where training draws at random, the middle of what it may draw is taken: the median of a list (the lower
    of two), the mean of a range.

    Args:
        cfg: full config.
        sizes: (N, 2) as annotated, each at least 1.
    """
    inputs = cfg.INPUT
    edges = sorted(inputs.MIN_SIZE_TRAIN)
    if inputs.MIN_SIZE_TRAIN_SAMPLING == "range":
        edge = (edges[0] + edges[-1]) // 2
    else:
        edge = edges[(len(edges) - 1) // 2]
    return network_inputs(
        sizes,
        crop_type=_crop_type(cfg),
        crop_size=inputs.CROP.SIZE,
        short_edge=edge,
        max_size=inputs.MAX_SIZE_TRAIN,
        factor=sum(inputs.FOCAL.SCALE_JITTER) / 2,
        last_crop=inputs.FOCAL.BOX_CROP.SIZE or None,
    )


def large_windows(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """Return the size of a large crop of each image: one in ten training samples shows more of it.

    The crop of `INPUT.CROP` is taken at that share of its draws, and what follows at that share of the sizes
    of `MIN_SIZE_TRAIN` and factors of `SCALE_JITTER`.

    Args:
        cfg: full config.
        sizes: (N, 2) as annotated, each at least 1.

    Returns:
        (N, 2) float64, height and width in pixels of the image as annotated; `sizes` if nothing is cropped.

    """
    inputs, crop_type, edges = cfg.INPUT, _crop_type(cfg), sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    if inputs.MIN_SIZE_TRAIN_SAMPLING == "range":
        edges = np.linspace(edges[0], edges[-1], 11)[1:].astype(int).tolist()  # each tenth of the draws
    low, high = inputs.FOCAL.SCALE_JITTER
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    crops = sizes
    if crop_type is not None:
        # Height and width are drawn each by itself.
        at = 1 - _LARGER**0.5
        crops = _crop(sizes, crop_type, np.asarray(inputs.CROP.SIZE, dtype=np.float64), at=at)
    last_crop = inputs.FOCAL.BOX_CROP.SIZE
    if not last_crop:
        return crops.astype(np.float64)
    windows = np.zeros(crops.shape)
    for i, edge in enumerate(edges, 1):
        # Of all draws, that share has this size or a smaller one, and this factor or a smaller one.
        smaller = _LARGER * len(edges) / i
        if smaller > 1:
            continue
        resized = network_inputs(
            crops,
            crop_type=None,
            crop_size=(),
            short_edge=edge,
            max_size=inputs.MAX_SIZE_TRAIN,
            factor=low + smaller * (high - low),
            last_crop=None,
        ).sizes
        windows = np.maximum(windows, crops * np.minimum(1, np.asarray(last_crop) / resized))
    return windows


def _crop_type(cfg: CfgNode) -> str | None:
    crop = cfg.INPUT.CROP
    return str(crop.TYPE) if crop.ENABLED else None


def network_inputs(
    sizes: np.ndarray,
    *,
    crop_type: str | None,
    crop_size: Sequence[float],
    short_edge: int,
    max_size: int,
    factor: float,
    last_crop: Sequence[int] | None,
) -> NetworkInputs:
    """Crop, resize and crop, by the arithmetic of `RandomCrop`, `ResizeShortestEdge` and our `ResizeAndCrop`.

    Args:
        sizes: (N, 2), each at least 1.
        crop_type: detectron2's; None: no crop.
        crop_size: what that type wants. Of a range the middle is taken.
        short_edge: pixels of the shorter side after resizing, unless the longer is then above `max_size`;
            0: nothing is resized.
        max_size: most pixels of the longer side.
        factor: multiplies what the resize gives, after rounding.
        last_crop: most height and width after that; None: all.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    crops = sizes
    if crop_type is not None:
        crops = _crop(sizes, crop_type, np.asarray(crop_size, dtype=np.float64), at=0.5)
    resized = _resize(crops, short_edge, max_size) if short_edge else crops.astype(np.float64)
    scales = factor * resized[:, 0] / crops[:, 0]
    seen = np.maximum(1, (resized + 0.5).astype(np.int64))
    if factor != 1:
        seen = np.maximum(1, (seen * factor).round().astype(np.int64))
    whole = seen
    if crop_type is not None:
        whole = np.maximum(1, (sizes * scales[:, None] + 0.5).astype(np.int64))
    return NetworkInputs(scales, seen if last_crop is None else np.minimum(seen, last_crop), whole)


def _crop(sizes: np.ndarray, kind: str, size: np.ndarray, *, at: float) -> np.ndarray:
    """Return sizes (N, 2) int64 after the crop; `at`, 0 to 1, is a position between the ends of a range."""
    if kind == "absolute":
        return np.minimum(sizes, size.astype(np.int64))
    if kind == "absolute_range":
        low, high = np.minimum(sizes, size[0]), np.minimum(sizes, size[1])
        return np.floor(low + at * (high - low)).astype(np.int64)
    share = size if kind == "relative" else size + at * (1 - size)
    return np.maximum(1, (sizes * share + 0.5).astype(np.int64))


def _resize(sizes: np.ndarray, short_edge: int, max_size: int) -> np.ndarray:
    """Sizes (N, 2) float64, not yet rounded, in the order of operations of `get_output_shape`."""
    shorter = sizes.min(axis=1, keepdims=True)
    resized = np.where(sizes == shorter, float(short_edge), short_edge / shorter * sizes)
    longer = resized.max(axis=1, keepdims=True)
    return np.where(longer > max_size, resized * (max_size / longer), resized)
