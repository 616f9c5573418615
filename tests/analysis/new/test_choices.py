from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from focal_d2.analysis.new.choices import (
    anchor_shape,
    batches,
    choose_batch,
    choose_flips,
    choose_limits,
    choose_negatives,
    choose_rate,
    choose_resolution,
    choose_schedule,
    choose_tiles,
    lowest_loss,
)
from focal_d2.analysis.new.facts import Direction, Facts

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.95)


def facts(*, small=20.0, large=60.0, height=200, width=300, count=10, boxes=100, **changes) -> Facts:
    sides = dict(zip(QUANTILES, np.linspace(small, large, 6).tolist(), strict=True)) | {0.1: small}
    made = Facts(
        images=count,
        boxes=boxes,
        negatives=0,
        counts={"tree": boxes},
        heights=np.full(count, height),
        widths=np.full(count, width),
        side=sides,
        longest=sides,
        share={q: x / min(height, width) for q, x in sides.items()},
        longest_share={q: x / min(height, width) for q, x in sides.items()},
        spread=(0.3, 0.5),
        aspect=(0.7, 1.4),
        most_boxes=12,
    )
    return replace(made, **changes)


def test_small_images_come_whole_as_they_are():
    chosen = choose_resolution(facts(), "cpu")
    assert (chosen.scale, chosen.crop, chosen.first_level) == (1.0, None, 3)
    assert chosen.choice.keys == {
        "INPUT.MIN_SIZE_TRAIN": [175, 188, 200, 212, 225],
        "INPUT.MAX_SIZE_TRAIN": 338,  # 200 × 1.125 × 300 / 200, rounded up
        "INPUT.MIN_SIZE_TEST": 0,
    }
    assert "200 × 300 pixels (medians), boxes of 20 to 60 pixels" in chosen.choice.reason


def test_images_of_different_sizes_keep_their_scale():
    chosen = choose_resolution(facts(heights=np.array([100, 200]), widths=np.array([150, 300])), "cpu")
    assert chosen.choice.keys["INPUT.MIN_SIZE_TRAIN"] == [0]
    assert chosen.choice.keys["INPUT.FOCAL.SCALE_JITTER"] == [0.875, 1.0]


@pytest.mark.parametrize(
    "small, scale, level",
    [
        (16.0, 1.0, 3),  # two cells of P3
        (12.8, 1.25, 3),  # two cells of P3, enlarged
        (8.0, 1.0, 2),  # two cells of P2
        (5.0, 1.6, 2),  # two cells of P2, enlarged
        (2.0, 2.0, 2),  # no more than this
    ],
)
def test_tiny_objects_get_a_larger_scale_or_p2(small, scale, level):
    chosen = choose_resolution(facts(small=small, height=100, width=100), "cpu")
    assert chosen.scale == pytest.approx(scale)
    assert chosen.first_level == level
    keys = chosen.choice.keys
    assert keys.get("MODEL.FOCAL.FPN.LEVELS") == ("p2-p6" if level == 2 else None)
    assert ("smaller ones will be missed" in chosen.choice.reason) == (small == 2.0)
    if scale > 1:
        assert keys["INPUT.MIN_SIZE_TEST"] == round(100 * scale)


def test_large_images_of_large_objects_are_reduced():
    # Boxes of 100 pixels may shrink to 24: images of 1000 pixels to 256.
    chosen = choose_resolution(facts(small=100.0, large=300.0, height=1000, width=1000), "cpu")
    assert (chosen.scale, chosen.crop) == (0.256, None)
    assert chosen.choice.keys["INPUT.MIN_SIZE_TEST"] == 256
    assert choose_resolution(facts(small=80.0, large=300.0, height=1000, width=1000), "cuda").scale == 1.0


def test_large_images_of_small_objects_are_cropped():
    # 100 boxes in 10 images of 1000 × 1000: a crop of 256 holds 0.66 of them.
    sparse = choose_resolution(facts(height=1000, width=1000), "cpu")
    assert (sparse.scale, sparse.crop) == (1.0, 256)
    assert sparse.choice.keys["INPUT.FOCAL.BOX_CROP.SIZE"] == [256, 256]
    assert sparse.choice.keys["INPUT.MIN_SIZE_TEST"] == 0
    assert "half of them around a box (others hold 0.66 boxes" in sparse.choice.reason
    dense = choose_resolution(facts(height=1000, width=1000, boxes=1000), "cpu")
    assert dense.choice.keys["INPUT.CROP.SIZE"] == [256, 256]
    assert dense.choice.keys["INPUT.MIN_SIZE_TRAIN"] == [224, 240, 256, 272, 288]  # as the demo has


def test_large_images_are_evaluated_in_tiles():
    crops = choose_resolution(facts(height=3000, width=3000), "cpu")
    assert choose_tiles(2048, crops, 60.0).keys == {}
    assert choose_tiles(3000, crops, 150.0).keys == {
        "TEST.FOCAL.TILES.ENABLED": True,
        "TEST.FOCAL.TILES.WINDOW": 512,
        "TEST.FOCAL.TILES.OVERLAP": 160,
    }
    assert choose_tiles(3000, choose_resolution(facts(), "cpu"), 60.0).keys == {}


def test_photographs_of_many_sizes_are_brought_to_one():
    # Boxes are a tenth to a half of the shorter edge, whose median is 600: 60 pixels or more. They may shrink
    # to 24, and images of 600 × 800 to 240 × 320.
    heights, widths = np.array([300, 600, 3000]), np.array([400, 800, 4000])
    shares = dict(zip(QUANTILES, (0.1, 0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    photographs = facts(
        small=30.0,
        large=1500.0,
        heights=heights,
        widths=widths,
        share=shares,
        longest_share=shares,
        spread=(1.2, 0.4),
    )
    chosen = choose_resolution(photographs, "cpu")
    assert (chosen.scale, chosen.crop) == (0.4, None)
    assert chosen.choice.keys["INPUT.MIN_SIZE_TEST"] == 240
    assert "boxes vary less in shares of their images than in pixels" in chosen.choice.reason
    # Where sides in pixels vary less, such as in pictures from above, the scale is kept, and crops are taken.
    sides = dict.fromkeys(QUANTILES, 24.0)
    pictures = replace(photographs, spread=(0.3, 1.0), side=sides, longest=sides)
    kept = choose_resolution(pictures, "cpu")
    assert (kept.scale, kept.crop, kept.choice.keys["INPUT.MIN_SIZE_TEST"]) == (1.0, 256, 0)
    # Unless they need another scale, which only a length of the edge can give.
    reduced = choose_resolution(replace(photographs, spread=(0.3, 1.0)), "cpu")
    assert (reduced.scale, reduced.crop) == (0.4, None)
    assert "images of different sizes get one shorter edge" in reduced.choice.reason


def test_crops_hold_the_largest_objects():
    chosen = choose_resolution(facts(small=30.0, large=900.0, height=3000, width=3000), "cpu")
    assert chosen.crop == 512
    assert chosen.scale == pytest.approx(512 / 900)


@pytest.mark.parametrize(
    "names, direction, from_above, flips",
    [
        (["tree"], Direction(50, 0.1, -0.1), True, ("horizontal", True)),
        (["tree"], Direction(50, 0.1, -0.1), False, ("horizontal", False)),
        (["tree"], Direction(50, 0.9, -0.1), True, ("horizontal", False)),
        (["tree"], Direction(50, 0.1, 0.5), True, ("horizontal", False)),
        (["tree"], None, True, ("horizontal", False)),
        (["3", "7"], Direction(50, 0.1, 0.0), True, ("none", False)),
        (["turn left", "turn right"], Direction(50, 0.1, 0.0), False, ("none", False)),
        (["bright", "x"], Direction(50, 0.1, 0.0), False, ("horizontal", False)),
    ],
)
def test_flips_follow_names_and_directions(names, direction, from_above, flips):
    horizontal, vertical = choose_flips(
        facts(counts=dict.fromkeys(names, 5)),
        direction,
        from_above=from_above,
        evidence="tiles of 2 pictures",
    )
    assert (horizontal.keys["INPUT.RANDOM_FLIP"], vertical.keys["INPUT.FOCAL.VERTICAL_FLIP"]) == flips
    assert "(a guess)" in horizontal.reason
    assert ("tiles of 2 pictures" in vertical.reason) == from_above


def test_images_without_boxes_are_trained_on():
    assert choose_negatives(facts()).keys == {}
    chosen = choose_negatives(facts(negatives=3))
    assert chosen.keys == {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}
    assert chosen.reason.startswith("3 of 10 images")


def test_limits_follow_the_fullest_image():
    assert choose_limits(100).keys == {}
    assert choose_limits(101).keys == {
        "TEST.DETECTIONS_PER_IMAGE": 200,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1000,
    }
    assert choose_limits(300).keys["MODEL.RETINANET.TOPK_CANDIDATES_TEST"] == 2500


def test_long_objects_get_aspect_ratios():
    assert anchor_shape(facts(aspect=(0.5, 2.0)))[:2] == (3, 1)
    assert anchor_shape(facts(aspect=(0.4, 2.0)))[:2] == (2, 3)


def test_the_batch_fits_into_half_of_the_memory():
    sizes = {batch: batch * 10**9 for batch in batches("cuda")}
    assert batches("cpu") == [2, 4]
    assert list(sizes) == [2, 4, 8, 16]

    def batch(available, images=100, device="cuda"):
        return choose_batch(sizes, available, images, device).keys["SOLVER.IMS_PER_BATCH"]

    assert batch(80 * 10**9) == 16
    assert batch(17 * 10**9) == 8
    assert batch(10**9) == 2
    assert batch(None) == 16
    assert batch(80 * 10**9, images=5) == 4
    assert batch(80 * 10**9, device="cpu") == 4


def test_the_rate_is_the_recipes_unless_the_test_is_lower():
    rates = [1e-5 * 1.3**i for i in range(30)]  # to 0.02
    falling = np.linspace(4, 1, 30).tolist()
    assert choose_rate(rates, falling, 1e-3).keys["SOLVER.BASE_LR"] == 1e-3
    # It rises after step 19, whose rate is 0.00146: a third; or after step 14, 0.0004: a fifth of 0.001.
    assert choose_rate(rates, [*falling[:20], 9.0], 1e-3).keys["SOLVER.BASE_LR"] == 4.9e-4
    chosen = choose_rate(rates, [*falling[:15], *[9.0] * 7], 1e-3)
    assert chosen.keys["SOLVER.BASE_LR"] == 2e-4
    assert "a range test of 22 steps from 1e-05 up" in chosen.reason


def test_a_short_test_says_nothing_of_the_rate():
    chosen = choose_rate([1e-5, 1e-4, 1e-3], [4.0, 1.0, 9.0], 1e-3)
    assert chosen.keys["SOLVER.BASE_LR"] == 1e-3
    assert "3 steps are too few" in chosen.reason


def test_the_lowest_loss_is_that_of_a_moving_average():
    assert lowest_loss([3.0]) == 0
    # Averages: 2, (0.16 · 2 + 0.2 · 1) / 0.36 = 1.44, …, 1.62: a single outlier moves it little.
    assert lowest_loss([2.0, 1.0, 2.0]) == 1
    assert lowest_loss([2.0, 1.0, 1.0, 1.0, 9.0]) == 3


def schedule(**changes):
    values = {"minutes": 10, "seconds": 0.5, "batch": 4, "images": 1000, "evaluation": 2.0, "timed": "timed"}
    return choose_schedule(**{**values, **changes})


def test_iterations_fill_the_minutes():
    # 600 s less 20 for the start and 10 evaluations of 2 s are 560 s: 1,120 iterations; two digits stay.
    keys = schedule().keys
    assert keys["SOLVER.MAX_ITER"] == 1100
    assert keys["SOLVER.WARMUP_ITERS"] == 55
    assert keys["TEST.EVAL_PERIOD"] == keys["SOLVER.CHECKPOINT_PERIOD"] == 110
    assert keys["SOLVER.FOCAL.EMA"] == 0.9909


def test_slow_evaluations_are_fewer():
    # They may take a tenth of 580 s: one of 40 s. 540 s are left.
    keys = schedule(evaluation=40.0).keys
    assert (keys["SOLVER.MAX_ITER"], keys["TEST.EVAL_PERIOD"]) == (1000, 1000)


def test_small_sets_are_not_learnt_by_heart():
    chosen = schedule(images=40, minutes=100)
    assert chosen.keys["SOLVER.MAX_ITER"] == 3000  # 300 passes
    assert "no more than 300 passes over 40 images" in chosen.reason
    assert schedule(images=4, minutes=100).keys["SOLVER.MAX_ITER"] == 1000


def test_too_few_iterations_are_said():
    chosen = schedule(minutes=1, seconds=2.0)
    assert chosen.keys["SOLVER.MAX_ITER"] < 200
    assert "give more --minutes" in chosen.reason
    assert "SOLVER.FOCAL.EMA" not in chosen.keys
    assert schedule(minutes=0.01, seconds=100.0).keys["SOLVER.MAX_ITER"] == 1
