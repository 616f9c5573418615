from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, register_coco_datasets
from focal_d2.data.mapper import build_augmentations
from tests.conftest import make_cfg


@pytest.fixture
def record(coco_dataset):
    data = coco_dataset(images=1, size=64)
    register_coco_datasets([data.entry])
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


@pytest.mark.parametrize("key", ["VERTICAL_FLIP", "ROTATE_90"])
def test_boxes_follow_the_picture(record, key):
    mapper = FocalDatasetMapper(make_cfg(**{f"INPUT__FOCAL__{key}": True}), is_train=True)
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


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", None])
def test_unreadable_image_is_named(record, content):
    path = record["file_name"]
    if content is None:
        import os

        os.remove(path)
    else:
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(UserError, match=path):
        FocalDatasetMapper(make_cfg(), is_train=True)(record)


def test_image_of_another_size_than_annotated_is_named(record):
    with pytest.raises(UserError, match=record["file_name"]):
        FocalDatasetMapper(make_cfg(), is_train=True)({**record, "width": 65})


def test_huge_image_is_named(record, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=record["file_name"]):
        FocalDatasetMapper(make_cfg(), is_train=True)(record)


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
