from __future__ import annotations

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.inference.tiles import (
    TileDetections,
    Tiling,
    check_tiling,
    detect_in_tiles,
    join_tiles,
)

NOTHING = TileDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def detections(*rows):
    """Of (x0, y0, x1, y1, score) or with a class after it."""
    table = np.array([(*row, 0)[:6] for row in rows], np.float32).reshape(-1, 6)
    return TileDetections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


@pytest.mark.parametrize(
    "height, width, expected",
    [
        # Window 8, overlap 2: a tile starts every 6 pixels, until one reaches the edge.
        (5, 8, [(0, 0, 8, 5)]),
        (8, 9, [(0, 0, 8, 8), (6, 0, 9, 8)]),
        (8, 14, [(0, 0, 8, 8), (6, 0, 14, 8)]),
        (15, 8, [(0, 0, 8, 8), (0, 6, 8, 14), (0, 12, 8, 15)]),
        (1, 1, [(0, 0, 1, 1)]),
    ],
)
def test_tiles_by_hand(height, width, expected):
    assert [tuple(tile) for tile in Tiling(height, width, 8, 2)] == expected


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_every_pixel_and_no_part_is_narrower_than_the_overlap(seed):
    rng = np.random.default_rng(seed)
    window = int(rng.integers(2, 40))
    overlap = int(rng.integers(0, window // 2 + 1))
    height, width = (int(x) for x in rng.integers(1, 150, 2))
    tiling = Tiling(height, width, window, overlap)
    seen = np.zeros((height, width), int)
    for tile in tiling:
        seen[tile.y0 : tile.y1, tile.x0 : tile.x1] += 1
        assert tile.x1 - tile.x0 > overlap or tiling.columns == 1
        assert tile.y1 - tile.y0 > overlap or tiling.rows == 1
    assert seen.min() == 1
    assert seen.max() <= 4


def scene(seed, *, tiling, largest, count=60):
    """Boxes (n, 4) of whole numbers that are apart from each other, and classes."""
    rng = np.random.default_rng(seed)
    boxes: list[np.ndarray] = []
    for _ in range(5000):
        size = rng.integers(10, largest, 2)
        corner = rng.integers(0, [tiling.width, tiling.height])
        box = np.array([*corner, *np.minimum(corner + size, [tiling.width, tiling.height])])
        apart = all(box[0] > b[2] or b[0] > box[2] or box[1] > b[3] or b[1] > box[3] for b in boxes)
        if (box[2:] - box[:2]).min() >= 10 and apart:
            boxes.append(box)
        if len(boxes) == count:
            break
    return np.array(boxes, np.float32), rng.integers(0, 2, len(boxes)), rng


def seen_in(tile, boxes, classes, rng, *, jitter=0.0):
    """What a detector that never errs finds in a tile: the visible parts, of at least 9 pixels a side."""
    edges = np.array(tile, np.float32)
    low, high = np.maximum(boxes[:, :2], edges[:2]), np.minimum(boxes[:, 2:], edges[2:])
    visible = ((high - low) >= 9).all(1)
    parts = np.concatenate([low, high], 1)[visible]
    parts = np.clip(
        parts + rng.uniform(-jitter, jitter, parts.shape), np.tile(edges[:2], 2), np.tile(edges[2:], 2)
    )
    scores = rng.uniform(0.5, 1.0, len(parts))
    return TileDetections(
        (parts - np.tile(edges[:2], 2)).astype(np.float32), scores.astype(np.float32), classes[visible]
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("largest", [32, 80], ids=["within the overlap", "up to 2.5 overlaps"])
def test_every_object_is_found_once_and_whole(seed, largest):
    tiling = Tiling(430, 610, 128, 32)
    boxes, classes, rng = scene(seed, tiling=tiling, largest=largest)
    joined = join_tiles(tiling, [seen_in(tile, boxes, classes, rng) for tile in tiling])
    found = {(*box, k) for box, k in zip(joined.boxes.tolist(), joined.classes.tolist(), strict=True)}
    assert len(found) == len(joined.boxes)
    assert found == {(*box, k) for box, k in zip(boxes.tolist(), classes.tolist(), strict=True)}
    assert (np.diff(joined.scores) <= 0).all()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_inexact_boxes_of_one_object_become_one(seed, fuse):
    tiling = Tiling(430, 610, 128, 32)
    boxes, classes, rng = scene(seed, tiling=tiling, largest=32)
    joined = join_tiles(
        tiling, [seen_in(tile, boxes, classes, rng, jitter=1.0) for tile in tiling], fuse=fuse
    )
    assert len(joined.boxes) == len(boxes)
    for box in boxes:
        assert np.abs(joined.boxes - box).max(1).min() <= 2.0


def test_the_higher_score_or_the_mean_of_both_is_left():
    # Two tiles, 0 to 128 and 96 to 224: both own the centre 112 within the margin.
    tiling = Tiling(64, 224, 128, 32)
    parts = [detections((104, 10, 120, 26, 0.9)), detections((8 + 2, 10, 24 + 2, 26, 0.3))]
    best = join_tiles(tiling, parts)
    np.testing.assert_allclose(best.boxes, [[104, 10, 120, 26]])
    fused = join_tiles(tiling, parts, fuse=True)
    np.testing.assert_allclose(
        fused.boxes, [[104.5, 10, 120.5, 26]], rtol=1e-6
    )  # (0.9 · 104 + 0.3 · 106) / 1.2
    assert fused.scores.tolist() == best.scores.tolist() == pytest.approx([0.9])
    # Another class is another object, and so is a box of less IoU.
    other = [parts[0], detections((10, 10, 26, 26, 0.3, 1))]
    assert len(join_tiles(tiling, other).boxes) == 2
    assert len(join_tiles(tiling, parts, iou=0.9).boxes) == 2


def test_a_whole_box_is_left_of_a_pair_of_which_the_other_is_cut_off():
    tiling = Tiling(64, 224, 128, 32)
    # 34 pixels wide, from 95 to 129: whole to within a pixel in both tiles, but it ends at their edges.
    parts = [detections((95, 10, 122, 40, 0.4)), detections((0, 10, 26, 40, 0.9))]
    joined = join_tiles(tiling, parts)
    np.testing.assert_allclose(joined.boxes, [[95, 10, 122, 40]])
    assert joined.scores.tolist() == pytest.approx([0.4])


def test_an_object_of_four_tiles_is_joined():
    tiling = Tiling(224, 224, 128, 32)
    box = np.array([[60.0, 70.0, 170.0, 180.0]], np.float32)  # larger than the overlap, around the corner
    rng = np.random.default_rng(0)
    parts = [seen_in(tile, box, np.array([3]), rng) for tile in tiling]
    assert [len(part.boxes) for part in parts] == [1, 1, 1, 1]
    joined = join_tiles(tiling, parts)
    np.testing.assert_array_equal(joined.boxes, box)
    assert joined.scores[0] == max(part.scores[0] for part in parts)


def test_an_object_longer_than_a_window_is_joined():
    tiling = Tiling(64, 500, 128, 32)
    box = np.array([[20.0, 10.0, 480.0, 50.0]], np.float32)
    rng = np.random.default_rng(0)
    joined = join_tiles(tiling, [seen_in(tile, box, np.array([0]), rng) for tile in tiling])
    np.testing.assert_array_equal(joined.boxes, box)


def test_tiles_are_read_in_batches():
    picture = np.arange(64 * 200, dtype=np.float32).reshape(64, 200, 1)
    tiling = Tiling(64, 200, 64, 32)
    sizes, done = [], []

    def detect(images):
        sizes.append(len(images))
        return [detections((1, 1, 10, 10, float(x[0, 0, 0] / 1e5))) for x in images]

    def read(tile):
        return picture[tile.y0 : tile.y1, tile.x0 : tile.x1]

    result = detect_in_tiles(tiling, read, detect, batch=3, progress=done.append)
    assert sizes == [3, 3]
    assert done == [3, 6]
    # A centre that is 5 pixels from the left edge belongs to the tile before, but for the first.
    np.testing.assert_array_equal(result.boxes, [[1, 1, 10, 10]])


def test_no_detections_and_no_overlap():
    tiling = Tiling(100, 100, 32, 0)
    joined = join_tiles(tiling, [NOTHING] * len(list(tiling)))
    assert [x.shape for x in joined] == [(0, 4), (0,), (0,)]
    one = [NOTHING] * len(list(tiling))
    one[5] = detections((10, 10, 20, 20, 0.5))
    np.testing.assert_array_equal(join_tiles(tiling, one).boxes, [[42, 42, 52, 52]])


@pytest.mark.parametrize(
    "window, overlap, message",
    [
        (100, 0, "T.WINDOW is 100; it must be a multiple of the coarsest stride, 32"),
        (0, 0, "T.WINDOW is 0"),
        (128, 16, "T.OVERLAP is 16"),
        (128, 96, "at most half of WINDOW, 128"),
        (128, -32, "T.OVERLAP is -32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(window, overlap, message):
    with pytest.raises(UserError, match=message):
        check_tiling(window, overlap, 32, keys="T")
    check_tiling(128, 64, 32, keys="T")
