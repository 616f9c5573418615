from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog

from focal_d2.data import load_table, register_datasets
from focal_d2.data.checks import annotation_warnings
from tests.conftest import make_cfg


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


@pytest.mark.parametrize("split", ["train", "test", "other"])
def test_the_tree_crowns_give_no_line(split):
    name = f"neon_trees_{split}"
    try:
        load_table(name)
    except ValueError as error:
        pytest.skip(str(error))
    cfg = make_cfg(DATASETS__TEST=(name,), MODEL__RETINANET__NUM_CLASSES=1)
    assert annotation_warnings(cfg, training=False) == []


def test_a_kind_is_one_line_with_its_count_and_first_examples(sides):
    train, test = sides
    change_boxes(train, [[70, 5, 10, 10], [80, 5, 10, 10], [90, 5, 10, 10]])
    change_boxes(test, [[0, 70, 10, 10]])
    outside, more = annotation_warnings(config_of(sides), training=True)
    assert outside == (
        f"box-outside: {train.name}: 3 of 36 (8.3 %) boxes are outside their image; {test.name}: 1 of 36 "
        f"(2.8 %) boxes are outside their image (first: {train.images / '0.png'}: box 70 5 10 10; "
        f"{train.images / '0.png'}: box 80 5 10 10; …)"
    )
    assert more.startswith("tools/doctor.py says more")


def test_without_training_only_the_test_sets_count(sides):
    change_boxes(sides[0], [[70, 5, 10, 10]])
    cfg = config_of(sides)
    assert len(annotation_warnings(cfg, training=True)) == 2
    assert annotation_warnings(cfg, training=False) == []


def test_boxes_without_area_are_left_to_their_own_warning(sides):
    change_boxes(sides[0], [[5, 5, 0, 10]])
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
    assert others.startswith("and 3 other kinds: class-unused, ")
    assert more.startswith("tools/doctor.py")


def test_datasets_of_records_are_not_read(sides, monkeypatch):
    cfg = config_of(sides)
    DatasetCatalog.register("of_a_program", lambda: pytest.fail("read"))
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, "of_a_program")
    change_boxes(sides[1], [[0, 70, 10, 10]])
    register_datasets([data.entry for data in sides])
    line, _ = annotation_warnings(cfg, training=True)
    assert line.startswith("box-outside")
