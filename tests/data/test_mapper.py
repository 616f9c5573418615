from __future__ import annotations

import copy
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    annotations_to_instances,
    filter_empty_instances,
    transform_instance_annotations,
)
from detectron2.structures import BoxMode

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.mapper import build_augmentations, transform_boxes
from focal_d2.engine import FocalTrainer
from tests.conftest import make_cfg

BACKENDS = pytest.mark.parametrize("backend", ["pil", "opencv"])


@pytest.fixture
def record(coco_dataset):
    data = coco_dataset(images=1, size=64)
    register_datasets([data.entry])
    return DatasetCatalog.get(data.name)[0]


def test_default_adds_no_augmentation():
    assert build_augmentations(make_cfg().INPUT.FOCAL) == []


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("VERTICAL_FLIP", True, T.RandomFlip),
        ("ROTATE_90", True, T.RandomRotation),
        ("BRIGHTNESS", 0.2, T.RandomBrightness),
        ("CONTRAST", 0.2, T.RandomContrast),
    ],
)
def test_each_key_adds_its_augmentation_in_training_only(record, key, value, kind):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": value})
    trained = FocalDatasetMapper(cfg, is_train=True).augmentations.augs
    assert kind in {type(a) for a in trained[2:]}  # after detectron2's resize and horizontal flip
    tested = FocalDatasetMapper(cfg, is_train=False).augmentations.augs
    assert [type(a) for a in tested] == [T.ResizeShortestEdge]


@BACKENDS
@pytest.mark.parametrize("key", ["VERTICAL_FLIP", "ROTATE_90"])
def test_boxes_follow_the_picture(record, key, backend):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": True, "INPUT__FOCAL__BACKEND": backend})
    mapper = FocalDatasetMapper(cfg, is_train=True)
    pictures = set()
    for _ in range(20):
        sample = mapper(record)
        pixels = sample["image"].numpy()
        pictures.add(pixels.tobytes())
        boxes = sample["instances"].gt_boxes.tensor.round().int().tolist()
        for box, label in zip(boxes, sample["instances"].gt_classes.tolist(), strict=True):
            x0, y0, x1, y1 = box
            assert (x1 - x0, y1 - y0) == (24, 24)
            # The square of class k is 255 in channel k, unless a later one covers it.
            assert (pixels[label, y0:y1, x0:x1] == 255).mean() > 0.3
    assert len(pictures) > 2


@pytest.mark.parametrize("key", ["BRIGHTNESS", "CONTRAST"])
@pytest.mark.parametrize("value", [-0.5, 1.0])
def test_ranges_beyond_0_to_1_are_refused(key, value):
    with pytest.raises(UserError, match=f"INPUT.FOCAL.{key} is {value}"):
        build_augmentations(make_cfg(**{f"INPUT__FOCAL__{key}": value}).INPUT.FOCAL)


@BACKENDS
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", "half", "half a JPEG", None])
def test_unreadable_image_is_named(record, content, backend):
    path = record["file_name"]
    if content is None:
        os.remove(path)
    else:
        if isinstance(content, str):
            whole = cv2.imencode(".jpg" if "JPEG" in content else ".png", cv2.imread(path))[1].tobytes()
            content = whole[: len(whole) // 2]
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(UserError, match=f"cannot read image {path}: "):
        FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND=backend), is_train=True)(record)


@BACKENDS
def test_image_of_another_size_than_annotated_is_named(record, backend):
    with pytest.raises(UserError, match=f"cannot read image {record['file_name']}: Mismatched image shape"):
        FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND=backend), is_train=True)({**record, "width": 65})


@BACKENDS
def test_huge_image_is_named(record, monkeypatch, backend):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=record["file_name"]):
        FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND=backend), is_train=True)(record)


def test_contrast_stays_within_its_range(record):
    mapper = FocalDatasetMapper(make_cfg(INPUT__FOCAL__CONTRAST=0.2), is_train=True)
    plain = FocalDatasetMapper(make_cfg(), is_train=False)(record)["image"].float()
    ratios = [(mapper(record)["image"].float().std() / plain.std()).item() for _ in range(20)]
    assert 0.75 <= min(ratios) < 0.95 < max(ratios) <= 1.22


def test_brightness_stays_within_its_range(record):
    mapper = FocalDatasetMapper(make_cfg(INPUT__FOCAL__BRIGHTNESS=0.2), is_train=True)
    plain = FocalDatasetMapper(make_cfg(), is_train=False)(record)["image"].float()
    ratios = [mapper(record)["image"].float().median() / plain.median() for _ in range(20)]
    assert 0.78 <= min(ratios) < 0.95 < 1.05 < max(ratios) <= 1.22
    assert np.ptp(ratios) > 0.1


AUGMENTED = {
    "INPUT__MIN_SIZE_TRAIN": (40, 64, 100),
    "INPUT__CROP__ENABLED": True,
    "INPUT__FOCAL__VERTICAL_FLIP": True,
    "INPUT__FOCAL__ROTATE_90": True,
}


def test_pil_is_the_default_and_detectron2s(record):
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(40, 64, 100))
    np.random.seed(0)  # noqa: NPY002
    expected = [DatasetMapper(cfg, is_train=True)(record) for _ in range(5)]
    np.random.seed(0)  # noqa: NPY002
    for sample in expected:
        found = FocalDatasetMapper(cfg, is_train=True)(record)
        assert torch.equal(found["image"], sample["image"])
        assert torch.equal(found["instances"].gt_boxes.tensor, sample["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_backends_draw_alike(record, image_format):
    before = copy.deepcopy(record)
    samples = {}
    for backend in ("pil", "opencv"):
        cfg = make_cfg(**AUGMENTED, INPUT__FORMAT=image_format, INPUT__FOCAL__BACKEND=backend)
        mapper = FocalDatasetMapper(cfg, is_train=True)
        np.random.seed(0)  # noqa: NPY002
        samples[backend] = [mapper(record) for _ in range(40)]
    assert record == before
    for expected, found in zip(samples["pil"], samples["opencv"], strict=True):
        assert found.keys() == expected.keys()
        assert found["image"].shape == expected["image"].shape
        assert found["image"].is_contiguous()
        assert (found["image"].int() - expected["image"].int()).abs().max() <= 2
        assert torch.equal(found["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
        assert torch.equal(found["instances"].gt_classes, expected["instances"].gt_classes)
    assert len({x["image"].shape for x in samples["opencv"]}) > 3


@pytest.mark.parametrize("key", ["BRIGHTNESS", "CONTRAST"])
def test_backends_agree_on_colours(record, key):
    samples = []
    for backend in ("pil", "opencv"):
        cfg = make_cfg(**{f"INPUT__FOCAL__{key}": 0.3, "INPUT__FOCAL__BACKEND": backend})
        np.random.seed(0)  # noqa: NPY002
        samples.append(FocalDatasetMapper(cfg, is_train=True)(record)["image"])
    assert torch.equal(*samples)


def test_backend_holds_for_evaluation_and_in_workers(coco_dataset):
    data = coco_dataset(images=2, size=64)
    register_datasets([data.entry])
    images = {}
    for backend, workers in (("pil", 0), ("opencv", 0), ("opencv", 1)):
        cfg = make_cfg(
            INPUT__MIN_SIZE_TEST=100, INPUT__FOCAL__BACKEND=backend, DATALOADER__NUM_WORKERS=workers
        )
        samples = [x for batch in FocalTrainer.build_test_loader(cfg, data.name) for x in batch]
        assert all("annotations" not in x and (x["height"], x["width"]) == (64, 64) for x in samples)
        images[backend, workers] = torch.stack([x["image"] for x in samples]).int()
    assert torch.equal(images["opencv", 0], images["opencv", 1])
    assert 0 < (images["opencv", 0] - images["pil", 0]).abs().max() <= 1


def test_backend_leaves_one_thread_to_a_worker(record, monkeypatch):
    limits: list[int] = []
    monkeypatch.setattr("cv2.setNumThreads", limits.append)
    mapper = FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND="opencv"), is_train=True)
    mapper(record)
    assert limits == []
    monkeypatch.setattr("focal_d2.data.mapper.get_worker_info", lambda: "a worker")
    mapper(record)
    assert limits == [0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"INPUT__FOCAL__BACKEND": "cv2"}, 'INPUT.FOCAL.BACKEND is "cv2"; legal values: pil, opencv'),
        ({"INPUT__FORMAT": "L"}, 'INPUT.FOCAL.BACKEND opencv, INPUT.FORMAT is "L"; legal values: BGR, RGB'),
        ({"INPUT__FORMAT": "YUV-BT.601"}, 'INPUT.FORMAT is "YUV-BT.601"; legal values: BGR, RGB'),
        ({"MODEL__MASK_ON": True}, "BACKEND opencv knows boxes only: MODEL.MASK_ON must be False"),
        ({"MODEL__KEYPOINT_ON": True}, "MODEL.KEYPOINT_ON must be False"),
        ({"MODEL__LOAD_PROPOSALS": True}, "MODEL.LOAD_PROPOSALS must be False"),
    ],
)
def test_backend_refuses_what_it_cannot_do(settings, message):
    cfg = make_cfg(**{"INPUT__FOCAL__BACKEND": "opencv", **settings})
    for is_train in (True, False):
        with pytest.raises(UserError, match=message):
            FocalDatasetMapper(cfg, is_train=is_train)


def box(mode: BoxMode, values: list, **more: int) -> dict:
    return {"bbox": values, "bbox_mode": mode, "category_id": len(values), **more}


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [T.ResizeTransform(300, 400, 123, 164), T.HFlipTransform(164), T.VFlipTransform(123)],
        [T.ResizeTransform(300, 400, 801, 1067), T.RotationTransform(801, 1067, 90)],
        [T.CropTransform(50, 60, 111, 77), T.ResizeTransform(77, 111, 300, 432)],
    ],
)
def test_transform_boxes_gives_detectron2s(transforms):
    rng = np.random.default_rng(0)
    annotations = [
        box(BoxMode.XYWH_ABS, [316, 368, 19, 18]),  # integers: detectron2 rounds these down
        box(BoxMode.XYWH_ABS, [31, 36, 190, 18.5]),
        box(BoxMode.XYXY_ABS, [3, 4, 50, 60]),
        box(BoxMode.XYXY_ABS, np.float32([3.3, 4.4, 50, 60])),
        box(BoxMode.XYWH_ABS, [1.5, 2.5, 3.5, 4.5], iscrowd=1),
        box(BoxMode.XYWH_ABS, [-20.0, -20.0, 5.0, 5.0]),  # nothing of it is in the image
        *(box(BoxMode.XYWH_ABS, rng.uniform(0, 200, 4).tolist()) for _ in range(30)),
        *(box(BoxMode.XYXY_ABS, np.sort(rng.uniform(0, 300, (2, 2)), 0).ravel().tolist()) for _ in range(30)),
    ]
    size = (1067, 801)
    moved = T.TransformList(transforms)
    one_by_one = [
        transform_instance_annotations(dict(x), moved, size) for x in annotations if not x.get("iscrowd")
    ]
    expected = filter_empty_instances(annotations_to_instances(one_by_one, size))
    found = transform_boxes(annotations, moved, size)
    assert 20 < len(found) < len(annotations) - 1
    assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert torch.equal(found.gt_classes, expected.gt_classes)
    assert found.image_size == expected.image_size


def test_transform_boxes_of_an_image_without_boxes():
    crowd = box(BoxMode.XYWH_ABS, [1.5, 2.5, 3.5, 4.5], iscrowd=1)
    for objects in ([], [crowd]):
        found = transform_boxes(objects, T.TransformList([]), (30, 40))
        assert found.gt_boxes.tensor.shape == (0, 4)
        assert found.gt_classes.dtype == torch.int64
