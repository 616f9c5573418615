from __future__ import annotations

import copy
import os
import re
import shutil

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
from PIL import Image

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.mapper import split_ignored, transform_boxes
from focal_d2.data.pixels import FORMATS
from focal_d2.engine import FocalTrainer
from tests.conftest import make_cfg
from tests.data.hostile_images import FOREIGN

BACKENDS = pytest.mark.parametrize("backend", ["pil", "opencv"])


@pytest.fixture
def record(coco_dataset):
    data = coco_dataset(images=1, size=64)
    register_datasets([data.entry])
    return DatasetCatalog.get(data.name)[0]


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
def test_image_above_the_limit_is_named(record, backend):
    size = record["height"] * record["width"]
    cfg = make_cfg(INPUT__FOCAL__BACKEND=backend, INPUT__FOCAL__MAX_PIXELS=size - 1)
    message = f"{record['file_name']}: it has 64 × 64 pixels, more than INPUT.FOCAL.MAX_PIXELS {size - 1}"
    with pytest.raises(UserError, match=message):
        FocalDatasetMapper(cfg, is_train=True)(record)
    cfg.INPUT.FOCAL.MAX_PIXELS = size
    FocalDatasetMapper(cfg, is_train=True)(record)
    cfg.INPUT.FOCAL.MAX_PIXELS = 0
    with pytest.raises(UserError, match="MAX_PIXELS is 0; it must be at least 1"):
        FocalDatasetMapper(cfg, is_train=True)


AUGMENTED = {
    "INPUT__MIN_SIZE_TRAIN": (40, 64, 100),
    "INPUT__CROP__ENABLED": True,
    "INPUT__FOCAL__VERTICAL_FLIP": True,
    "INPUT__FOCAL__ROTATE_90": True,
    "INPUT__FOCAL__SCALE_JITTER": (0.5, 1.5),
    "INPUT__FOCAL__BOX_CROP__SIZE": (50, 60),
    "INPUT__FOCAL__BOX_CROP__MIN_VISIBLE": 0.5,
}


@BACKENDS
@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (1, 1)])
@pytest.mark.parametrize(
    "settings", [{}, {"INPUT__CROP__ENABLED": True}, {"INPUT__FOCAL__SCALE_JITTER": [0.1, 1]}]
)
def test_very_long_and_very_small_images_keep_a_pixel(record, backend, size, settings):
    cv2.imwrite(record["file_name"], np.zeros((*size, 3), np.uint8))
    record |= {"height": size[0], "width": size[1]}
    settings |= {"INPUT__CROP__SIZE": [0.3, 0.3], "INPUT__MIN_SIZE_TRAIN": [800], "INPUT__MIN_SIZE_TEST": 800}
    cfg = make_cfg(INPUT__FOCAL__BACKEND=backend, **settings)
    for is_train in (True, False):
        image = FocalDatasetMapper(cfg, is_train=is_train)(record)["image"]
        assert 1 <= min(image.shape) <= max(image.shape) <= 1333


def test_pil_is_the_default_and_detectron2s(record):
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(40, 64, 100))
    np.random.seed(0)  # noqa: NPY002
    expected = [DatasetMapper(cfg, is_train=True)(record) for _ in range(5)]
    np.random.seed(0)  # noqa: NPY002
    for sample in expected:
        found = FocalDatasetMapper(cfg, is_train=True)(record)
        assert torch.equal(found["image"], sample["image"])
        assert torch.equal(found["instances"].gt_boxes.tensor, sample["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_augmented(record, image_format):
    channels = FORMATS[image_format]
    means = {"MODEL__PIXEL_MEAN": [0.0] * channels, "MODEL__PIXEL_STD": [1.0] * channels}
    geometry = {"INPUT__FOCAL__ROTATE_90": True, "INPUT__FOCAL__VERTICAL_FLIP": True}
    mapper = FocalDatasetMapper(
        make_cfg(INPUT__FORMAT=image_format, INPUT__MIN_SIZE_TRAIN=(50,), **geometry, **means), is_train=True
    )
    for _ in range(20):
        image = mapper(record)["image"]
        assert image.shape[0] == channels
        assert min(image.shape[1:]) == 50


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"INPUT__FORMAT": "CMYK"}, '"CMYK"; legal values: BGR, RGB, L, HSV, YCbCr, YUV-BT.601'),
        ({"INPUT__FORMAT": "no such"}, 'INPUT.FORMAT is "no such"; legal values: '),
        ({"MODEL__PIXEL_MEAN": [1.0]}, "INPUT.FORMAT is BGR, which has 3 channels, but MODEL.PIXEL_MEAN "
         "has 1 numbers and MODEL.PIXEL_STD 3: give both 3"),
        ({"INPUT__FORMAT": "L", "MODEL__PIXEL_MEAN": [1.0]}, "MODEL.PIXEL_STD 3: give both 1"),
        ({"INPUT__FORMAT": "HSV", "INPUT__FOCAL__CONTRAST": 0.1}, '"HSV"; legal values: BGR, RGB, L'),
    ],
)  # fmt: skip
def test_formats_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FocalDatasetMapper(make_cfg(**settings), is_train=True)


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
        assert torch.equal(found["ignored_boxes"], expected["ignored_boxes"])
    assert len({x["image"].shape for x in samples["opencv"]}) > 3
    assert {len(x["ignored_boxes"]) for x in samples["opencv"]} >= {0, 1}


@pytest.mark.parametrize(
    "key, value", [("BRIGHTNESS", 0.3), ("CONTRAST", 0.3), ("SATURATION", 0.3), ("HUE", 90.0)]
)
def test_backends_agree_on_colours(record, key, value):
    samples = []
    for backend in ("pil", "opencv"):
        cfg = make_cfg(**{f"INPUT__FOCAL__{key}": value, "INPUT__FOCAL__BACKEND": backend})
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


def moved_by(
    transforms: list, annotations: list, min_visible: float | None, new_size: tuple[int, int]
) -> tuple:
    objects, ignored = split_ignored(
        annotations, T.TransformList(transforms), (100, 100), new_size, min_visible
    )
    assert ignored.dtype == torch.float32
    return objects, ignored.tolist()


def test_split_ignored_takes_crowds():
    crowd = box(BoxMode.XYWH_ABS, [10, 20, 40, 40], iscrowd=1)
    plain = box(BoxMode.XYXY_ABS, [0.0, 0.0, 5.0, 5.0])
    # Twice as large: x 20 to 100, y 40 to 120; the crop starts at (30, 50) and ends at (80, 110).
    moves = [T.ResizeTransform(100, 100, 200, 200), T.CropTransform(30, 50, 50, 60)]
    assert moved_by(moves, [crowd, plain], None, (60, 50)) == ([plain], [[0, 0, 50, 60]])
    gone = box(BoxMode.XYWH_ABS, [60, 70, 10, 10], iscrowd=1)
    assert moved_by(moves, [gone], None, (60, 50)) == ([], [])
    assert moved_by([], [], None, (60, 50)) == ([], [])


@pytest.mark.parametrize("min_visible, cut", [(0.0, 0), (0.24, 0), (0.26, 1), (0.49, 1), (0.51, 2), (1.0, 2)])
def test_split_ignored_takes_boxes_cut_below_the_share(min_visible, cut):
    quarter = box(BoxMode.XYXY_ABS, [10.0, 10.0, 30.0, 30.0])  # 10 of 20 pixels are left on each side
    half = box(BoxMode.XYXY_ABS, [60.0, 10.0, 70.0, 30.0])  # 10 of 20 rows
    whole = box(BoxMode.XYXY_ABS, [40.0, 40.0, 50.0, 50.0])
    gone = box(BoxMode.XYXY_ABS, [0.0, 0.0, 10.0, 10.0])
    moves = [T.CropTransform(20, 20, 80, 80), T.RotationTransform(80, 80, 90)]
    objects, ignored = moved_by(moves, [quarter, half, whole, gone], min_visible, (80, 80))
    assert [x for x in objects if x is not gone] == [quarter, half, whole][cut:]
    # Turned left by 90 degrees: (x, y) to (y, 80 - x). The quarter was at (0, 0, 10, 10) in the crop.
    np.testing.assert_allclose(ignored, [[0, 70, 10, 80], [0, 30, 10, 40]][:cut], atol=1e-4)


def test_split_ignored_takes_the_share_of_what_was_in_the_image():
    # 10 of 40 columns lie in the image, and stay in the crop.
    outside = box(BoxMode.XYXY_ABS, [90.0, 0.0, 130.0, 20.0])
    assert moved_by([T.CropTransform(50, 0, 50, 50)], [outside], 0.9, (50, 50)) == ([outside], [])


@BACKENDS
def test_training_samples_have_ignored_boxes(record, backend):
    cfg = make_cfg(INPUT__FOCAL__BACKEND=backend, INPUT__RANDOM_FLIP="none")
    mapper = FocalDatasetMapper(cfg, is_train=True)
    assert mapper(record)["ignored_boxes"].shape == (0, 4)
    assert mapper({**record, "annotations": []})["ignored_boxes"].shape == (0, 4)
    first, *rest = record["annotations"]
    sample = mapper({**record, "annotations": [{**first, "iscrowd": 1}, *rest]})
    x, y, w, h = first["bbox"]
    assert sample["ignored_boxes"].tolist() == [[x, y, x + w, y + h]]
    assert len(sample["instances"]) == len(rest)
    record.pop("annotations")
    sample = mapper(record)
    assert sample["ignored_boxes"].shape == (0, 4)
    assert "instances" not in sample
    assert "ignored_boxes" not in FocalDatasetMapper(cfg, is_train=False)(record)


def test_masks_go_through_detectron2_and_keep_their_ignored_regions(record):
    for annotation in record["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    record["annotations"][0]["iscrowd"] = 1
    cfg = make_cfg(MODEL__MASK_ON=True, INPUT__RANDOM_FLIP="none")
    expected = DatasetMapper(cfg, is_train=True)(record)
    found = FocalDatasetMapper(cfg, is_train=True)(record)
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
    np.testing.assert_array_equal(
        found["instances"].gt_masks.polygons, expected["instances"].gt_masks.polygons
    )
    x, y, w, h = record["annotations"][0]["bbox"]
    assert found["ignored_boxes"].tolist() == [[x, y, x + w, y + h]]


@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
def test_no_program_is_started_where_detectron2_reads(record, programs, key):
    whole, path = record["file_name"], f"{record['file_name']}.jpg"
    record |= {"sem_seg_file_name": whole, key: path}
    with open(path, "wb") as file:
        file.write(FOREIGN["EPS"])
    with pytest.raises(UserError, match=f"cannot read image {path}: not an image of a format that is read"):
        FocalDatasetMapper(make_cfg(MODEL__MASK_ON=True), is_train=True)(record)
    assert not programs.exists()
    shutil.copy(whole, path)
    assert FocalDatasetMapper(make_cfg(MODEL__MASK_ON=True), is_train=True)(record)["sem_seg"].shape


@BACKENDS
def test_16_bit_images_train(record, backend):
    pixels = cv2.imread(record["file_name"], cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(record["file_name"], pixels.astype(np.uint16) * 256 + 9)
    sample = FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND=backend), is_train=False)(record)
    np.testing.assert_array_equal(sample["image"].numpy(), np.stack([pixels] * 3))


@BACKENDS
def test_floating_point_images_are_named(record, backend):
    path = record["file_name"]
    Image.fromarray(np.zeros((64, 64), np.float32)).save(path, "TIFF")
    with pytest.raises(UserError, match=f"cannot read image {path}: its pixels are floating-point numbers"):
        FocalDatasetMapper(make_cfg(INPUT__FOCAL__BACKEND=backend), is_train=True)(record)
