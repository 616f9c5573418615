"""COCO's precision and recall arrays, from columns of boxes, by one of two libraries.

N images, K classes, B ground-truth boxes, D detections, M limits on detections an image.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_d2.config import check_choice
from focal_d2.errors import UserError

# COCO's ranges of a box's area, square pixels, in the order of the arrays' third axis from the right.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
IOUS = np.linspace(0.5, 0.95, 10)


class Truth(NamedTuple):
    """The ground truth of a dataset.

    Attributes:
        images: N.
        classes: K.
        image: (B,) int64 in [0, N), the position of the image among ascending image ids.
        boxes: (B, 4) float64, left, top, width, height in pixels.
        labels: (B,) int64 in [0, K).
        areas: (B,) float64, square pixels.
        ignored: (B,) bool: crowds and difficult objects.
    """

    images: int
    classes: int
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray


class Detections(NamedTuple):
    """The detections of a dataset. Of equal scores in an image, the earlier detection counts first.

    Attributes:
        image: (D,) int64 in [0, N).
        boxes: (D, 4) float64, left, top, width, height in pixels.
        labels: (D,) int64 in [0, K).
        scores: (D,) float64.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class Curves(NamedTuple):
    """pycocotools' arrays; -1 where a class has no box of that size.

    Attributes:
        precision: (10, 101, K, 4, M) at each of `IOUS`, recall 0 to 1, class, area of `AREAS`, limit.
        recall: (10, K, 4, M), the highest that is reached.
    """

    precision: np.ndarray
    recall: np.ndarray


def coco_curves(truth: Truth, detections: Detections, *, backend: str, max_dets: Sequence[int]) -> Curves:
    """Match detections with boxes as COCO does, and count.

    Args:
        truth: what there is.
        detections: what was found.
        backend: a key of `BACKENDS`; they give the same arrays.
        max_dets: (M,) ascending limits on detections of a class in an image.
    """
    evaluator = BACKENDS[backend](truth, detections)
    evaluator.params.maxDets = list(max_dets)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    return Curves(np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"]))


def _hotcoco(truth: Truth, detections: Detections) -> Any:
    import hotcoco  # only where it is chosen

    api = hotcoco.COCO.from_arrays(
        *_images_and_categories(truth),
        truth.image,
        truth.labels + 1,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.ignored.astype(np.int64),
    )
    results = api.load_res(
        np.column_stack([detections.image, detections.boxes, detections.scores, detections.labels + 1])
    )
    return hotcoco.COCOeval(api, results, "bbox")


def _pycocotools(truth: Truth, detections: Detections) -> Any:
    areas = detections.boxes[:, 2] * detections.boxes[:, 3]
    images, categories = _images_and_categories(truth)
    results = _indexed(images, categories, detections, areas, "score", detections.scores)
    return COCOeval(as_coco(truth, range(truth.images)), results, "bbox")


def as_coco(truth: Truth, image_ids: Sequence[Any]) -> COCO:
    """Return pycocotools' object of the boxes; the id of a class is its label + 1.

    Args:
        truth: the boxes.
        image_ids: N, of the images.
    """
    images, categories = _images_and_categories(truth)
    for image, image_id in zip(images, image_ids, strict=True):
        image["id"] = image_id
    return _indexed(images, categories, truth, truth.areas, "iscrowd", truth.ignored.astype(int))


def _indexed(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    columns: Truth | Detections,
    areas: np.ndarray,
    key: str,
    values: np.ndarray,
) -> COCO:
    keys = ("image_id", "category_id", "bbox", "area", key)
    image_ids = [images[i]["id"] for i in columns.image.tolist()]
    rows = (x.tolist() for x in (columns.labels + 1, columns.boxes, areas, values))
    annotations = [
        {"id": i, "iscrowd": 0, **dict(zip(keys, row, strict=True))}
        for i, row in enumerate(zip(image_ids, *rows, strict=True), 1)
    ]
    api = COCO()
    api.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def _images_and_categories(truth: Truth) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    # The libraries sort by id. Sizes and names play no part.
    images = [{"id": i, "file_name": "", "height": 0, "width": 0} for i in range(truth.images)]
    return images, [{"id": k + 1, "name": str(k)} for k in range(truth.classes)]


BACKENDS: dict[str, Callable[[Truth, Detections], Any]] = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}


def check_backend(name: str) -> str:
    """Return `name` if that library can be used.

    Raises:
        UserError: for an unknown name, or a library that is not installed.
    """
    check_choice("TEST.FOCAL.EVAL_BACKEND", name, BACKENDS)
    if importlib.util.find_spec(name) is None:
        others = ", ".join(x for x in BACKENDS if x != name)
        raise UserError(
            f"TEST.FOCAL.EVAL_BACKEND is {name}, which is not installed: pip install {name}, or {others}"
        )
    return name
