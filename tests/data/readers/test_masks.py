from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as masks

from focal_d2.data.readers.masks import mask_box


def test_polygons_have_the_extent_of_all_parts():
    assert mask_box([[1, 2, 5, 2, 5, 9], [4.5, 1, 7, 3, 6, 3]]) == [1, 1, 6, 8]


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_have_pycocotools_extent(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    pixels = np.zeros((height, width), np.uint8, order="F")
    top, left = rng.integers(0, (height, width))
    pixels[top : top + rng.integers(1, 30), left : left + rng.integers(1, 30)] = 1
    pixels[rng.random(pixels.shape) < 0.3 * (seed % 2)] = 0
    compressed = masks.encode(pixels)
    text = compressed["counts"].decode()
    changes = np.flatnonzero(np.diff(pixels.ravel("F"), prepend=0)).tolist()
    runs = np.diff([0, *changes, pixels.size]).tolist()
    expected = masks.toBbox(compressed).tolist()
    assert mask_box({"size": [int(height), int(width)], "counts": text}) == expected
    assert mask_box({"size": [int(height), int(width)], "counts": runs}) == expected


def test_long_runs_are_decoded():
    pixels = np.zeros((2000, 3000), np.uint8, order="F")
    pixels[100:1900, 700:2900] = 1
    encoded = masks.encode(pixels)
    assert mask_box({**encoded, "counts": encoded["counts"].decode()}) == [700, 100, 2200, 1800]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [4, 4], "counts": [3, 4]},
        {"size": [4, 4], "counts": [-1, 17]},
        {"size": [4, 4], "counts": []},
        {"size": [2**70, 4], "counts": [1]},
        {"size": [4], "counts": [16]},
        {"size": [0, 0], "counts": [0]},
        {"size": [4, 4], "counts": "o" * 100},
        {"size": [4, 4], "counts": "é"},
        {"size": [4, 4], "counts": None},
        [[1, 2, 3]],
        [[]],
        [1, 2],
        "x",
        7,
    ],
)
def test_what_is_no_mask_has_no_box(segmentation):
    assert mask_box(segmentation) is None
