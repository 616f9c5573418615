from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import yaml
from scipy.optimize import OptimizeResult

from focal_d2 import UserError
from focal_d2.analysis.anchors import fit
from focal_d2.analysis.anchors.coverage import best_anchors, grids_of
from focal_d2.analysis.anchors.fit import (
    AnchorSettings,
    compare_anchors,
    fit_anchors,
    kmeans_iou,
    replace_anchors,
    score,
)
from focal_d2.modeling.anchors import build_layout
from tests.conftest import make_cfg
from tests.data.test_resolution import make_table


@pytest.fixture
def small_search(monkeypatch):
    monkeypatch.setattr(fit, "_GENERATIONS", 8)
    monkeypatch.setattr(fit, "_POPULATION", 8)


def scene(seed, *, images=40, size=24.0, ratio=2.0, each=4):
    """A table of boxes of one area and shape, off by some per cent, in 200 × 200 images."""
    rng = np.random.default_rng(seed)
    factor = np.exp(rng.normal(0, 0.1, (images * each, 2)))
    sides = factor * [size / ratio**0.5, size * ratio**0.5]
    corners = rng.random((images * each, 2)) * (200 - sides)
    image = np.repeat(np.arange(images), each)
    return make_table(np.concatenate([corners, sides], axis=1), sizes=[(200, 200)] * images, image=image)


def compare(cfg, train, tests=None, *, num_sizes=None, num_ratios=None, seed=0):
    return compare_anchors(
        cfg, build_layout(cfg), train, tests or {}, num_sizes=num_sizes, num_ratios=num_ratios, seed=seed
    )


def test_kmeans_finds_the_shapes_that_boxes_have():
    rng = np.random.default_rng(0)
    shapes = np.array([[10.0, 20], [40, 20], [60, 60]])
    sides = np.concatenate([shape * np.exp(rng.normal(0, 0.02, (200, 2))) for shape in shapes])
    np.testing.assert_allclose(kmeans_iou(rng.permutation(sides), 3), shapes, rtol=0.01)


def test_kmeans_measures_by_iou_not_by_distance():
    # It starts from (2, 2) and (20, 20). (8, 8) is nearer to the first, but shares 4 / 64 with it and
    # 64 / 400 with the second, whose centre is then (14, 14).
    assert kmeans_iou(np.array([[8.0, 8], [20, 20], [2, 2]]), 2).tolist() == [[2, 2], [14, 14]]


def test_kmeans_of_fewer_boxes_than_clusters():
    assert kmeans_iou(np.array([[4.0, 9]]), 3).tolist() == [[4, 9]] * 3


def test_score_by_hand():
    # Half of the boxes reach 0.5; the mean is 0.5: 3 · 0.5 + 0.5.
    assert score(np.array([0.8, 0.2]), 0.5) == pytest.approx(2)


@pytest.mark.parametrize("num_sizes, num_ratios", [(1, 1), (2, 3)])
def test_fit_beats_the_paper_s_anchors_on_small_boxes(num_sizes, num_ratios, small_search):
    cfg = make_cfg()
    grids = grids_of(build_layout(cfg))
    table = scene(0)
    boxes = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], axis=1)
    where = boxes, table.image, table.sizes, grids
    found = fit_anchors(*where, num_sizes=num_sizes, num_ratios=num_ratios, threshold=0.5, seed=0)
    assert np.shape(found.sizes) == (5, num_sizes)
    assert len(found.ratios) == num_ratios
    assert np.all(np.diff(found.sizes, axis=0) > 0)
    before = best_anchors(*where).iou
    after = best_anchors(*where[:3], replace_anchors(found, grids)).iou
    assert score(after, 0.5) > score(before, 0.5) + 0.2


def test_one_shape_is_found(small_search):
    cfg = make_cfg()
    table = scene(0, size=40.0, ratio=2.0)
    boxes = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], axis=1)
    arguments = {"num_sizes": 1, "num_ratios": 1, "threshold": 0.5, "seed": 0}
    found = fit_anchors(boxes, table.image, table.sizes, grids_of(build_layout(cfg)), **arguments)
    assert found.ratios[0] == pytest.approx(2, rel=0.15)  # height / width
    assert min(abs(np.log(level[0] / 40)) for level in found.sizes) < 0.15


def test_same_seed_same_anchors(small_search):
    cfg = make_cfg()
    first, again = (compare(cfg, [scene(1)], seed=3) for _ in range(2))
    assert first == again


def test_comparison_adds_up(small_search):
    cfg = make_cfg()
    result = compare(cfg, [scene(0), scene(1)], {"forest": scene(2, images=7)}, num_sizes=1)
    assert {name: fit.boxes for name, fit in result.before.items()} == {
        "fitted": 160, "held out": 160, "forest": 28
    }  # fmt: skip
    assert result.better
    assert result.chosen is result.proposed
    assert result.after["held out"].recall[0] > result.before["held out"].recall[0]
    for fits, settings in ((result.before, result.current), (result.after, result.proposed)):
        cells = 28 * 28 + 14 * 14 + 7 * 7 + 4 * 4 + 2 * 2  # 200 pixels are padded to 224
        fit = fits["forest"]
        assert fit.missed == round(fit.boxes * (1 - fit.recall[0]))
        positives = fit.positives_per_box * 28
        anchors = 7 * cells * len(settings.sizes[0]) * len(settings.ratios)
        assert positives * (1 + fit.negatives_per_positive) <= anchors
        assert positives * (1 + fit.negatives_per_positive) > 0.9 * anchors
    text = result.as_text()
    assert "forest, 28 boxes" in text
    assert "now 9 (3 sizes × 3 ratios), proposed 3 (1 sizes × 3 ratios)" in text
    assert "keep the current anchors" not in text


def test_comparison_with_atss_counts_its_positives_and_says_so(small_search):
    train = [scene(0, images=4)]
    by_iou, by_atss = (
        compare(make_cfg(MODEL__FOCAL__ASSIGNER__NAME=name), train, num_sizes=1) for name in ("iou", "atss")
    )
    assert by_iou.proposed == by_atss.proposed
    assert by_iou.before["fitted"].positives_per_box != by_atss.before["fitted"].positives_per_box
    line = "MODEL.FOCAL.ASSIGNER.NAME is atss: positives and negatives are those of atss, all other columns"
    assert line in by_atss.as_text()
    assert "ASSIGNER" not in by_iou.as_text()


def test_yaml_is_a_config(small_search):
    result = compare(make_cfg(), [scene(0)])
    cfg = make_cfg()
    for key, value in yaml.safe_load(result.chosen.as_yaml())["MODEL"]["ANCHOR_GENERATOR"].items():
        cfg.merge_from_list([f"MODEL.ANCHOR_GENERATOR.{key}", value])
    again = grids_of(build_layout(cfg)).shapes
    for a, b in zip(
        again, replace_anchors(result.proposed, grids_of(build_layout(make_cfg()))).shapes, strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_worse_proposal_is_not_taken(monkeypatch):
    # A search that ends at anchors of 8 pixels, far from boxes of 24.
    far = np.array([np.log(8), np.log(1.5), 0.0])
    monkeypatch.setattr(fit, "differential_evolution", lambda *_, **__: OptimizeResult(x=far))
    current = [[24.0], [48.0], [96.0], [192.0], [384.0]]
    ratios = [[2.0]]
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__SIZES=current, MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=ratios)
    result = compare(cfg, [scene(0)])
    assert not result.better
    assert result.chosen == AnchorSettings(current, [2.0])
    assert "keep the current anchors" in result.as_text()
    assert yaml.safe_load(result.as_text().split("\n\n")[1])["MODEL"]["ANCHOR_GENERATOR"]["SIZES"] == current


def test_a_fall_on_other_images_is_said(monkeypatch):
    # Anchors of 24 pixels fit the training set; the test set's boxes of 96 had theirs before.
    near = np.array([np.log(24), np.log(1.2), 0.0])
    monkeypatch.setattr(fit, "differential_evolution", lambda *_, **__: OptimizeResult(x=near))
    cfg = make_cfg(
        MODEL__ANCHOR_GENERATOR__SIZES=[[96.0], [110.0], [130.0], [150.0], [170.0]],
        MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]],
    )
    table = scene(0)
    large = dataclasses.replace(table, boxes=table.boxes * [0, 0, 0, 0] + [40, 40, 96, 96])
    small = dataclasses.replace(table, boxes=table.boxes * [1, 1, 0, 0] + [0, 0, 24, 24])
    result = compare(cfg, [small], {"large": large})
    assert result.better
    assert [line for line in result.losses() if "held out" in line] == []
    assert "Careful: large: recall at IoU 0.5 falls from 100.0 to 0.0 %." in result.as_text()


def test_a_single_image_has_nothing_held_out(small_search):
    result = compare(make_cfg(), [scene(0, images=1)], {"empty": make_table([])})
    assert list(result.before) == ["fitted"]


def test_images_of_two_sets_are_different_images(small_search):
    result = compare(make_cfg(), [scene(0, images=1), scene(1, images=1)])
    assert {name: fit.boxes for name, fit in result.before.items()} == {"fitted": 4, "held out": 4}


def test_turned_images_count_too(small_search):
    cfg = make_cfg(INPUT__FOCAL__ROTATE_90=True)
    result = compare(cfg, [scene(0, ratio=3.0)], num_sizes=1, num_ratios=2)
    assert result.before["fitted"].boxes == 160
    # Boxes 3 times as high as wide; turned, as wide as high.
    assert result.proposed.ratios == pytest.approx([1 / 3, 3], rel=0.35)
    upright = compare(make_cfg(), [scene(0, ratio=3.0)], num_sizes=1, num_ratios=2)
    assert upright.before["fitted"].boxes == 80
    assert min(upright.proposed.ratios) > 1


def test_ignored_boxes_are_no_boxes():
    table = make_table([[10, 10, 20, 20]], ignored=[True])
    with pytest.raises(UserError, match=r"DATASETS.TRAIN has no box"):
        compare(make_cfg(), [table])


def test_one_list_may_stand_for_all_levels(small_search):
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__SIZES=[[24.0, 48.0]])
    assert compare(cfg, [scene(0)]).current.sizes == [[24.0, 48.0]] * 5


def test_ratios_that_differ_from_level_to_level_are_refused():
    ratios = [[0.5, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0], [1.0, 2.0]]
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=ratios)
    with pytest.raises(UserError, match="ASPECT_RATIOS differ from level to level"):
        compare(cfg, [scene(0)])
