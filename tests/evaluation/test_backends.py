from __future__ import annotations

import contextlib
import copy
import io
import runpy
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from focal_d2.errors import UserError
from focal_d2.evaluation import backends
from focal_d2.evaluation.backends import AREAS, BACKENDS, Detections, Truth, check_backend, coco_curves
from tests.evaluation.scenes import random_scene


def test_areas_are_cocos():
    coco = Params(iouType="bbox")
    assert dict(zip(coco.areaRngLbl, map(tuple, coco.areaRng), strict=True)) == AREAS


def pycocotools_alone(content, found, limits=(1, 10, 100)):
    """As its own demonstration does it."""
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = copy.deepcopy(content)
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
        if limits[-1] == 100:
            evaluation.summarize()
    return evaluation


def columns(content, found):
    images = sorted(x["id"] for x in content["images"])
    numbers = sorted(x["id"] for x in content["categories"])

    def column(items, make, dtype):
        return np.array([make(x) for x in items], dtype=dtype)

    def common(items):
        return (
            column(items, lambda x: images.index(x["image_id"]), np.int64),
            column(items, lambda x: x["bbox"], np.float64).reshape(-1, 4),
            column(items, lambda x: numbers.index(x["category_id"]), np.int64),
        )

    annotations = content["annotations"]
    truth = Truth(
        len(images),
        len(numbers),
        *common(annotations),
        column(annotations, lambda x: x["area"], np.float64),
        column(annotations, lambda x: x["iscrowd"], bool),
    )
    return truth, Detections(*common(found), column(found, lambda x: x["score"], np.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limits", [(1, 10, 100), (2, 5), (1, 10, 150)])
def test_curves_are_pycocotools_on_200_random_scenes(backend, limits):
    # A fifth of them for the reference's own wrapper, which is slow.
    for seed in range(200 if backend == "hotcoco" and limits[-1] == 100 else 40):
        content, found = random_scene(seed)
        expected = pycocotools_alone(content, found, limits).eval
        curves = coco_curves(*columns(content, found), backend=backend, max_dets=limits)
        np.testing.assert_allclose(
            curves.precision, expected["precision"], rtol=0, atol=1e-9, err_msg=str(seed)
        )
        np.testing.assert_allclose(curves.recall, expected["recall"], rtol=0, atol=1e-9, err_msg=str(seed))


def one_image(boxes, found, ignored=False):
    """One class; of boxes (left, top, width, height), and of found with the score at the end."""
    boxes, found = np.array(boxes, float).reshape(-1, 4), np.array(found, float).reshape(-1, 5)
    zeros = np.zeros(len(boxes), np.int64)
    truth = Truth(1, 1, zeros, boxes, zeros, boxes[:, 2:].prod(1), np.full(len(boxes), ignored))
    zeros = np.zeros(len(found), np.int64)
    return truth, Detections(zeros, found[:, :4], zeros, found[:, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_of_equal_scores_count_the_earlier_first(backend):
    hit, miss = [0, 0, 10, 10, 0.5], [50, 50, 10, 10, 0.5]
    for found, precision in (([hit, miss], 1.0), ([miss, hit], 0.5)):
        curves = coco_curves(*one_image([hit[:4]], found), backend=backend, max_dets=(100,))
        assert curves.precision[0, :, 0, 0, 0] == pytest.approx(precision)


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_of_a_crowded_scene_need_a_higher_limit(backend):
    # 150 boxes in a row, all found: 100 of them count at the limit 100, all at 150.
    boxes = [[20 * i, 0, 10, 10] for i in range(150)]
    found = [[*box, 0.9] for box in boxes]
    curves = coco_curves(*one_image(boxes, found), backend=backend, max_dets=(1, 100, 150))
    assert curves.recall[0, 0, 0].tolist() == pytest.approx([1 / 150, 100 / 150, 1])
    # Recall 0, 0.01 to 0.66 of the 101 points are reached.
    assert curves.precision[0, :, 0, 0].mean(0).tolist() == pytest.approx([1 / 101, 67 / 101, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_without_boxes_or_without_detections(backend):
    box, found = [0, 0, 10, 10], [0, 0, 10, 10, 0.9]
    for boxes, detections, precision in (([box], [], 0), ([], [found], -1), ([], [], -1)):
        curves = coco_curves(*one_image(boxes, detections), backend=backend, max_dets=(1, 100))
        assert (curves.precision[:, :, :, 0] == precision).all()
        assert (curves.recall[:, :, 0] == precision).all()
    curves = coco_curves(*one_image([box], [found], ignored=True), backend=backend, max_dets=(100,))
    assert (curves.precision == -1).all()


def test_check_backend_names_the_choices(monkeypatch):
    with pytest.raises(
        UserError, match='TEST.FOCAL.EVAL_BACKEND is "coco"; legal values: hotcoco, pycocotools'
    ):
        check_backend("coco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "hotcoco" else object())
    with pytest.raises(UserError, match="not installed: pip install hotcoco, or pycocotools"):
        check_backend("hotcoco")
    assert check_backend("pycocotools") == "pycocotools"


def test_pycocotools_works_where_hotcoco_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    module = runpy.run_path(backends.__file__)
    scene = one_image([[0, 0, 9, 9]], [[0, 0, 9, 9, 1]])
    assert module["coco_curves"](*scene, backend="pycocotools", max_dets=[1]).recall[0, 0, 0, 0] == 1
    with pytest.raises(ImportError):
        module["coco_curves"](*scene, backend="hotcoco", max_dets=[1])
