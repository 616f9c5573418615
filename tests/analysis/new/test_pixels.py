from __future__ import annotations

import numpy as np

from focal_d2.analysis.new.pixels import HASHES, likeness, overlapping_pairs, thumbnail, window_hashes


def pairs_of(images):
    one_in = int(np.median([x.size for x in images])) // HASHES
    return overlapping_pairs([window_hashes(x, one_in) for x in images], [x.shape for x in images])


def test_moved_pixels_are_found():
    picture = np.random.default_rng(0).integers(0, 255, (200, 300), dtype=np.uint8)
    tiles = [picture[:96, :96], picture[:96, 70:166], picture[40:136, 150:246], picture[104:200, 200:296]]
    # 0 and 1 share 26 columns, 1 and 2 share 16 × 56 pixels, 2 and 3 share 32 × 46.
    assert sorted(pairs_of(tiles)) == [(0, 1), (1, 2), (2, 3)]
    assert pairs_of([picture[:96, :96], picture[:96, :96].copy()]) == [(0, 1)]


def test_a_common_frame_is_no_overlap():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (96, 96), dtype=np.uint8) for _ in range(4)]
    logo = rng.integers(0, 255, (24, 24), dtype=np.uint8)
    for image in images:
        image[:24, :24] = logo
        image[90:] = 7
    assert pairs_of(images) == []


def test_small_and_empty_images():
    assert len(window_hashes(np.zeros((4, 4), np.uint8), 1)[0]) == 0
    assert len(window_hashes(np.zeros((40, 40), np.uint8), 1)[0]) == 0
    assert overlapping_pairs([], []) == []


def test_likeness_of_a_moving_picture():
    picture = np.random.default_rng(0).normal(size=(60, 400)).cumsum(axis=1)
    picture = np.uint8(255 * (picture - picture.min()) / np.ptp(picture))
    frames = np.array([thumbnail(picture[:, 2 * i : 2 * i + 60]) for i in range(100)])
    neighbours, others = likeness(frames, np.random.default_rng(0))
    assert neighbours > 0.9 > others + 0.2
