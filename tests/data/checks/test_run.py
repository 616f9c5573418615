from __future__ import annotations

import dataclasses
import json
import os

import pytest
from detectron2.data import DatasetCatalog

from focal_d2.data import load_table, register_datasets
from focal_d2.data.checks.overlap import check_repeats
from focal_d2.data.checks.run import annotation_warnings, check_against_config, check_dataset
from focal_d2.engine import load_config
from focal_d2.errors import UserError
from tests.conftest import REPOSITORY, make_cfg
from tests.data.test_resolution import make_table


@pytest.fixture
def sides(coco_dataset):
    """Two good datasets, each with more boxes of a class than count as few."""
    return coco_dataset("train", images=12), coco_dataset("test", images=12)


def config_of(sides, **settings):
    register_datasets([data.entry for data in sides])
    train, test = (data.name for data in sides)
    return make_cfg(DATASETS__TRAIN=(train,), DATASETS__TEST=(test,), **settings)


def change_boxes(data, boxes):
    """Give the first annotations other boxes."""
    content = json.loads(data.annotations.read_text())
    for annotation, box in zip(content["annotations"], boxes, strict=False):
        annotation["bbox"] = box
    data.annotations.write_text(json.dumps(content))


def test_good_annotations_give_no_line(sides):
    cfg = config_of(sides)
    assert annotation_warnings(cfg, training=True) == []
    assert annotation_warnings(cfg, training=False) == []


def test_the_demo_s_trees_give_no_line():
    try:
        load_table("neon_trees_train")
    except UserError as error:
        pytest.skip(str(error))
    config = REPOSITORY / "configs/neon_trees/focal_retinanet_R_18_FPN_plain.yaml"
    assert annotation_warnings(load_config(str(config)), training=True) == []


def test_a_kind_is_one_line_with_its_count_and_first_examples(sides):
    train, test = sides
    change_boxes(train, [[58, 5, 10, 10], [60, 5, 10, 10], [59, 5, 10, 10]])
    change_boxes(test, [[0, 60, 10, 10]])
    beyond, more = annotation_warnings(config_of(sides), training=True)
    assert beyond == (
        f"box-beyond-edge: {train.name}: 3 of 36 (8.3 %) boxes reach beyond their image, by up to 6 pixels; "
        f"{test.name}: 1 of 36 (2.8 %) boxes reach beyond their image, by up to 6 pixels (first: "
        f"{train.images / '0.png'}: 6 pixels beyond; {train.images / '0.png'}: 5 pixels beyond)"
    )
    assert more.startswith("focal-d2 doctor says more")


def test_without_training_only_the_test_sets_count(sides):
    change_boxes(sides[0], [[60, 5, 10, 10]])
    cfg = config_of(sides)
    assert len(annotation_warnings(cfg, training=True)) == 2
    assert annotation_warnings(cfg, training=False) == []


def test_boxes_that_are_left_out_have_their_own_warning(sides):
    change_boxes(sides[0], [[5, 5, 0, 10], [70, 5, 10, 10]])
    assert annotation_warnings(config_of(sides), training=True) == []


def test_a_file_in_both_sets_is_named(sides):
    train, test = sides
    content = json.loads(test.annotations.read_text())
    content["images"][0]["file_name"] = str(train.images / "0.png")
    test.annotations.write_text(json.dumps(content))
    register_datasets([train.entry, {**test.entry, "OUTSIDE": True}])
    cfg = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=(test.name,))
    line, _ = annotation_warnings(cfg, training=True)
    assert "image-leak" in line
    assert f"the same file is in {train.name}" in line


def test_images_to_validate_on_are_neither_trained_nor_tested_on(sides, coco_dataset):
    cfg = config_of(sides)
    (train,), (test,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    cfg.DATASETS.VAL = (train,)
    line, *_ = annotation_warnings(cfg, training=True)
    assert line.startswith(f"dataset-in-both: {train}: ")
    assert annotation_warnings(cfg, training=False) == []
    cfg.DATASETS.VAL = (test,)
    line, _ = annotation_warnings(cfg, training=True)
    assert line.startswith(f"image-in-val-and-test: {test}: 12 of 12 images to validate on are also to")


def test_the_same_path_in_other_words_is_the_same_file(monkeypatch):
    table = make_table([], sizes=[(64, 64)] * 2)
    absolute = os.path.abspath
    asked = []
    monkeypatch.setattr(os.path, "abspath", lambda path: asked.append(path) or absolute(path))
    train = dataclasses.replace(table, file_names=["/data/a.jpg", os.path.join(os.getcwd(), "b.jpg")])
    test = dataclasses.replace(table, file_names=["/data/x/../a.jpg", "b.jpg"])
    (found,) = check_repeats({"train": train}, {"test": test}, {})
    assert (found.code, found.count) == ("image-leak", 2)
    assert asked == test.file_names  # it takes long for many files: only where it changes something


def test_many_kinds_are_cut_short(coco_dataset):
    data = coco_dataset(images=2)
    content = json.loads(data.annotations.read_text())
    # The classes have few boxes, and one has none; the dataset is on both sides.
    changes = [[70, 5, 10, 10], [-9, 5, 20, 20], [0, 0, 64, 64], [1, 1, 5, 5], [1, 1, 5, 5], [1, 1, 5, 5]]
    for annotation, box, label in zip(content["annotations"], changes, (1, 1, 1, 1, 1, 2), strict=True):
        annotation.update(bbox=box, category_id=label)
    content["images"].append({"id": 2, "file_name": "0.png", "width": 64, "height": 64})
    content["categories"].append({"id": 4, "name": " Class0"})
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    cfg = make_cfg(DATASETS__TRAIN=(data.name,), DATASETS__TEST=(data.name,), MODEL__RETINANET__NUM_CLASSES=4)
    *lines, others, more = annotation_warnings(cfg, training=True)
    assert len(lines) == 8
    assert others.startswith("and 2 other kinds: ")
    assert more.startswith("focal-d2 doctor")


def test_datasets_of_records_are_not_read(sides, monkeypatch):
    cfg = config_of(sides)
    DatasetCatalog.register("of_a_program", lambda: pytest.fail("read"))
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, "of_a_program")
    change_boxes(sides[1], [[0, 60, 10, 10]])
    register_datasets([data.entry for data in sides])
    line, _ = annotation_warnings(cfg, training=True)
    assert line.startswith("box-beyond-edge")


def test_a_region_of_any_class_is_one_box_and_no_wrong_label(coco_dataset):
    data = coco_dataset(images=2, classes=3)
    change_boxes(data, [[5, 5, 20, 20], [5, 5, 0, 10]])
    register_datasets([{**data.entry, "KEEP": ["class0", "class2"], "OTHERS": "ignored"}])
    found = {x.code: x.message for x in check_dataset(data.name, load_table(data.name))}
    assert found["boxes-ignored"] == "2 of 6 (33.3 %) boxes are crowds or difficult objects"
    assert found["box-degenerate"] == "1 of 6 (16.7 %) boxes have no area"
    assert "class-index" not in found


def test_images_with_more_boxes_than_the_model_returns_are_named(sides):
    train, test = sides
    settings = {"TEST__DETECTIONS_PER_IMAGE": 2, "MODEL__RETINANET__TOPK_CANDIDATES_TEST": 3}
    cfg = config_of(sides, **settings)
    line, _ = annotation_warnings(cfg, training=True)
    assert line == (
        f"boxes-above-limit: {train.name}, {test.name}: 24 of 24 images have more boxes than "
        f"TEST.DETECTIONS_PER_IMAGE 2; the most is 3 (first: {train.images / '0.png'}: 3 boxes; "
        f"{train.images / '1.png'}: 3 boxes)"
    )
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 2
    line, _ = annotation_warnings(cfg, training=False)
    assert "; test" not in line
    assert "MODEL.RETINANET.TOPK_CANDIDATES_TEST 2; the most is 3" in line
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.META_ARCHITECTURE = -1, "GeneralizedRCNN"
    found = check_against_config(cfg, {}, {test.name: load_table(test.name)})
    assert found == []  # it has another key for candidates, and -1 is no limit


def test_574_boxes_of_an_image_are_more_than_100():
    boxes = [[i % 40 * 8, i // 40 * 8, 8, 8] for i in range(576)]
    table = make_table(boxes, sizes=[(200, 400)], ignored=[False] * 574 + [True] * 2)
    cfg = make_cfg()
    (found,) = check_against_config(cfg, {"train": table}, {})
    assert (found.code, found.severity, found.count) == ("boxes-above-limit", "warning", 1)
    assert (
        found.message == "1 of 1 images have more boxes than TEST.DETECTIONS_PER_IMAGE 100; the most is 574"
    )
    assert [(fix.key, fix.value) for fix in found.fixes] == [("TEST.DETECTIONS_PER_IMAGE", 574)]
    # Training never sees all boxes of an image that it crops; the test set is seen whole.
    for settings in ({"CROP__ENABLED": True, "CROP__SIZE": [0.9, 0.9]}, {"FOCAL__BOX_CROP__SIZE": [99, 99]}):
        cropped = make_cfg(**{f"INPUT__{key}": value for key, value in settings.items()})
        assert check_against_config(cropped, {"train": table}, {}) == []
        assert [x.code for x in check_against_config(cropped, {}, {"test": table})] == ["boxes-above-limit"]
    # Most candidates of a level are removed by NMS: their number of boxes would not be enough.
    few = make_cfg(TEST__DETECTIONS_PER_IMAGE=-1, MODEL__RETINANET__TOPK_CANDIDATES_TEST=100)
    (found,) = check_against_config(few, {}, {"test": table})
    assert [(fix.key, fix.value) for fix in found.fixes] == [("", None)]
    assert "MODEL.RETINANET.TOPK_CANDIDATES_TEST: several times 574" in found.fixes[0].why


@pytest.mark.parametrize(
    "settings",
    [
        {"CROP__ENABLED": True, "CROP__TYPE": "absolute", "CROP__SIZE": [256, 256]},
        {"CROP__ENABLED": True, "CROP__TYPE": "absolute_range", "CROP__SIZE": [256, 256]},
        {"FOCAL__BOX_CROP__SIZE": [256, 256]},
        # Twice the size in a crop of twice the size.
        {"FOCAL__BOX_CROP__SIZE": [512, 512], "MIN_SIZE_TRAIN": (1280, 1600)},
    ],
)
def test_objects_of_320_pixels_fit_into_no_crop_of_256(settings):
    boxes = [[10 + 20 * i, 20, 320, 320] for i in range(11)]
    table = make_table(boxes * 2, sizes=[(640, 900)] * 2, image=[0] * 11 + [1] * 11)
    settings = {"MIN_SIZE_TRAIN": (0,), "MAX_SIZE_TRAIN": 4000, **settings}
    cfg = make_cfg(**{f"INPUT__{key}": value for key, value in settings.items()})
    (found,) = check_against_config(cfg, {"train": table}, {})
    assert (found.code, found.severity, found.count) == ("box-cropped", "warning", 22)
    assert found.message == "nine in ten crops of training are too small for 22 of 22 boxes"
    assert str(found.examples[0]) == "0.png: 320 × 320 pixels, nine in ten crops are at most 256 × 256"
    assert check_against_config(cfg, {}, {"test": table}) == []  # test images are not cropped


@pytest.mark.parametrize(
    "settings",
    [
        {"FOCAL__BOX_CROP__SIZE": [256, 256], "FOCAL__SCALE_JITTER": [0.79, 1.0]},  # 5 % of the factors
        {"CROP__ENABLED": True, "CROP__TYPE": "absolute_range", "CROP__SIZE": [256, 330]},  # 2 % of the crops
    ],
)
def test_crops_that_hold_the_boxes_in_few_draws_are_named(settings):
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(0,), **{f"INPUT__{key}": x for key, x in settings.items()})
    table = make_table([[10, 20, 320, 320]] * 3, sizes=[(640, 900)])
    assert [x.code for x in check_against_config(cfg, {"train": table}, {})] == ["box-cropped"]


def test_crops_that_can_hold_the_boxes_are_no_finding():
    boxes = [[10, 20, 320, 320]] + [[10 + 20 * i, 20, 250, 250] for i in range(30)]
    table = make_table(boxes, sizes=[(640, 900)])
    crop = {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute", "INPUT__CROP__SIZE": [256, 256]}
    assert check_against_config(make_cfg(**crop), {"train": table}, {}) == []  # 1 of 31 boxes
    # At its smallest, the jitter shows all of the image.
    jitter = {"INPUT__FOCAL__BOX_CROP__SIZE": [256, 256], "INPUT__FOCAL__SCALE_JITTER": [0.25, 2.0]}
    table = make_table([[10, 20, 320, 320]] * 3, sizes=[(640, 900)])
    assert check_against_config(make_cfg(**jitter), {"train": table}, {}) == []
    # Of a box beyond the image's edge, what lies in the image counts.
    table = make_table([[600, 20, 640, 200]] * 3, sizes=[(640, 700)])
    assert check_against_config(make_cfg(**crop), {"train": table}, {}) == []
