from __future__ import annotations

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from focal_d2 import UserError
from focal_d2.data import (
    announce,
    check_datasets,
    count_classes,
    ground_truth,
    load_table,
    register_datasets,
)
from focal_d2.data.checks.run import annotation_warnings
from focal_d2.data.readers.texts import class_names
from focal_d2.ops.common import ANY_CLASS
from tests.conftest import make_cfg
from tests.test_annotations import RECORDS


def test_register_makes_coco_data_usable_by_name(coco_dataset):
    data = coco_dataset(images=3, classes=2)
    register_datasets([data.entry])
    records = DatasetCatalog.get(data.name)
    assert [len(r["annotations"]) for r in records] == [2, 2, 2]
    assert MetadataCatalog.get(data.name).thing_classes == ["class0", "class1"]


def test_register_again_replaces(coco_dataset):
    first, second = coco_dataset("a", images=1), coco_dataset("b", images=2)
    register_datasets([first.entry])
    register_datasets([{**second.entry, "NAME": first.name}])
    assert len(DatasetCatalog.get(first.name)) == 2


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"NAME": "coco_2017_val"}, r"DATASETS.FOCAL\[0\].NAME .*another dataset"),
        ({"FOLDER": "x"}, r"DATASETS.FOCAL\[0\] has FOLDER; of format coco .* NAME, FORMAT, IMAGES"),
        ({"ROWS": "polygons"}, "has ROWS; of format coco"),
        ({"IMAGES": 3}, "IMAGES is 3; it must be a text"),
        ({"ANNOTATIONS": None}, "ANNOTATIONS is None; it must be a text"),
        ({"FORMAT": "xml"}, r'FORMAT is "xml"; legal values: coco, csv, voc, yolo'),
        ({"CLASSES": 3}, "CLASSES is 3; it must be a list of names, or a file"),
        ({"OUTSIDE": "yes"}, r"FOCAL\[0\].OUTSIDE is 'yes'; it must be true or false"),
        ({"NAMES": "short"}, r'FOCAL\[0\].NAMES is "short"; legal values: path, basename'),
        ({"KEEP": 3}, "KEEP is 3; it must be a list of names, or a file"),
        ({"OTHERS": "ignored"}, "has OTHERS, but KEEP names no classes"),
        ({"KEEP": ["x"], "OTHERS": "none"}, 'OTHERS is "none"; legal values: background, ignored'),
        ({"COLUMNS": {}}, "has COLUMNS; of format coco"),
        ({"COLUMNS": ["x"], "FORMAT": "csv"}, "COLUMNS is .* it must be a mapping"),
        (
            {"COLUMNS": {"x0": "xmin"}, "FORMAT": "csv"},
            'COLUMNS has a column that is "x0"; legal values: image',
        ),
        ({"ROWS": "pose", "FORMAT": "yolo"}, 'ROWS is "pose"; legal values: polygons, keypoints'),
        (
            {"ANNOTATIONS": "data.yaml", "FORMAT": "yolo"},
            "has IMAGES; of format yolo with a data.yaml .* SPLIT",
        ),
        ({"OUTSIDE": True, "FORMAT": "yolo"}, "has OUTSIDE; of format yolo it can have"),
    ],
)
def test_register_refuses(coco_dataset, changes, match):
    with pytest.raises(UserError, match=match):
        register_datasets([{**coco_dataset().entry, **changes}])


@pytest.mark.parametrize("name", ["x\0y", "x" * 300, "é" * 101, "x\ny", "x\x1b[31m", "x\ud800"])
def test_a_name_can_be_the_name_of_a_folder(coco_dataset, name):
    with pytest.raises(UserError, match=r"FOCAL\[0\]\.NAME is .* printable characters, at most 200 bytes"):
        register_datasets([{**coco_dataset().entry, "NAME": name}])


def test_a_name_may_have_any_letters(coco_dataset):
    register_datasets([{**coco_dataset(images=1).entry, "NAME": "Äpfel und 梨 (1)"}])
    assert len(load_table("Äpfel und 梨 (1)")) == 1


@pytest.mark.parametrize("name", ["a/b", "../a", ".."])
def test_a_name_is_no_path(coco_dataset, name):
    with pytest.raises(UserError, match="it can have no slash"):
        register_datasets([{**coco_dataset().entry, "NAME": name}])


def test_two_entries_of_one_name_are_refused(coco_dataset):
    first, second = coco_dataset("a"), coco_dataset("b")
    with pytest.raises(UserError, match=r"FOCAL\[1\].NAME .* is already the name of an earlier entry"):
        register_datasets([first.entry, {**second.entry, "NAME": first.name}])


def test_ten_thousand_names_are_no_work():
    names = [f"class {i}" for i in range(10_000)]
    assert class_names(names) == tuple(names)
    with pytest.raises(UserError, match='"class 5" is there twice'):
        class_names([*names, "class 5"])


def test_absent_classes_have_numbers_of_their_own(coco_dataset):
    data = coco_dataset(classes=2)
    register_datasets([{**data.entry, "CLASSES": ["x", "class0", "y", "class1"]}])
    assert load_table(data.name).category_ids == (3, 1, 4, 2)


def test_ground_truth_has_no_crowds(coco_dataset):
    data = coco_dataset(images=1, classes=2)
    content = json.loads(data.annotations.read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["images"].insert(0, {"id": 7, "file_name": "none.png", "width": 9, "height": 9})
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    truth = ground_truth(data.name)
    records = DatasetCatalog.get(data.name)
    DatasetCatalog.register("records", lambda: records)
    for name in (data.name, "records"):
        assert [len(boxes) for boxes in ground_truth(name).values()] == [1, 0]
    x, y, width, height = content["annotations"][1]["bbox"]
    assert truth[data.images / "0.png"].tolist() == [[x, y, x + width, y + height]]
    assert list(ground_truth("records")) == list(truth)


def test_classes_are_counted_in_the_training_set_first(coco_dataset):
    train, test = coco_dataset("a", classes=2), coco_dataset("b", classes=3)
    register_datasets([train.entry, test.entry])
    cfg = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=(test.name,))
    assert count_classes(cfg, "MODEL.RETINANET.NUM_CLASSES") == 2
    train.annotations.write_text("{")
    register_datasets([train.entry])
    assert count_classes(cfg, "MODEL.RETINANET.NUM_CLASSES") == 3


@pytest.mark.parametrize("entry", ["mine", {}, {"NAME": "mine"}])
def test_register_refuses_what_is_no_dataset(entry):
    with pytest.raises(UserError, match=r"DATASETS.FOCAL\[0\]"):
        register_datasets([entry])


def test_files_are_read_once(coco_dataset, monkeypatch):
    data = coco_dataset()
    register_datasets([data.entry])
    first = load_table(data.name)
    assert load_table(data.name) is first
    register_datasets([data.entry])
    assert load_table(data.name) is not first


def test_classes_may_be_a_file(coco_dataset, tmp_path):
    data = coco_dataset(classes=2)
    for name, text in (("names.txt", "class1\nclass0\n"), ("data.yaml", "names: {1: class0, 0: class1}")):
        (tmp_path / name).write_text(text)
        register_datasets([{**data.entry, "CLASSES": str(tmp_path / name)}])
        assert load_table(data.name).classes == ("class1", "class0")


def test_predictions_get_the_files_own_category_ids(coco_dataset):
    data = coco_dataset(classes=2)
    register_datasets([{**data.entry, "CLASSES": ["class1", "class0"]}])
    DatasetCatalog.get(data.name)
    assert MetadataCatalog.get(data.name).thing_dataset_id_to_contiguous_id == {2: 0, 1: 1}


def test_what_reading_made_of_a_dataset_is_logged_once(coco_dataset, caplog):
    data = coco_dataset(images=1)
    content = json.loads(data.annotations.read_text())
    content["annotations"][0]["ignore"] = 1
    content["annotations"][1]["bbox"] = [5, 6, 0, 30]
    content["annotations"][2]["bbox"] = [64, 6, 20, 30]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    with caplog.at_level(logging.INFO, logger="focal_d2"):
        for _ in range(2):
            announce(data.name)
            (record,) = DatasetCatalog.get(data.name)
    assert [a["category_id"] for a in record["annotations"]] == [0]
    note, warning, outside = caplog.messages
    assert '1 of 3 annotations have "ignore": 1' in note
    assert warning == (
        f'dataset "{data.name}": 1 of 3 boxes have no area and are left out of training and evaluation; the '
        f"first (left, top, width, height): {data.images / '0.png'}: [5.0, 6.0, 0.0, 30.0]"
    )
    assert outside == (
        f'dataset "{data.name}": 1 of 3 boxes are outside their image and are left out of training and '
        f"evaluation; the first (left, top, width, height): {data.images / '0.png'}: [64.0, 6.0, 20.0, 30.0]"
    )
    announce("coco_2017_val")  # detectron2's own datasets have nothing to log


def test_tables_of_other_datasets_come_from_their_records():
    DatasetCatalog.register("other", lambda: RECORDS)
    MetadataCatalog.get("other").thing_classes = ["x", "y"]
    assert load_table("other").boxes.tolist() == [[1.5, 2, 3, 4], [0, 0, 10.25, 10]]


def test_check_accepts_what_fits(coco_dataset):
    data = coco_dataset(classes=3)
    register_datasets([data.entry])
    cfg = make_cfg(DATASETS__TRAIN=(data.name,), DATASETS__TEST=(data.name,))
    check_datasets(cfg, training=True)


@pytest.mark.parametrize("change", ["none", "crowds", "ignore", "flat"])
@pytest.mark.parametrize("registered_by", ["focal_d2", "detectron2"])
def test_a_test_set_without_a_box_is_refused_before_training(coco_dataset, change, registered_by):
    train, test = coco_dataset("train"), coco_dataset("test")
    content = json.loads(test.annotations.read_text())
    for annotation in content["annotations"]:
        annotation.update({"crowds": {"iscrowd": 1}, "ignore": {"ignore": 1}}.get(change, {}))
        if change == "flat":
            annotation["bbox"][2] = 0
    if change == "none":
        content["annotations"] = []
    test.annotations.write_text(json.dumps(content))
    register_datasets([train.entry])
    if registered_by == "focal_d2":
        register_datasets([test.entry])
    else:
        register_coco_instances(test.name, {}, str(test.annotations), str(test.images))
        MetadataCatalog.get(test.name).thing_classes = ["class0", "class1", "class2"]
    cfg = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=(test.name,))
    check_datasets(cfg, training=False)
    if registered_by == "detectron2" and change in ("ignore", "flat"):
        check_datasets(cfg, training=True)  # in pycocotools these are boxes
        return
    with pytest.raises(UserError, match=f'TEST: dataset "{test.name}" has no box to test on, so that AP'):
        check_datasets(cfg, training=True)


def test_a_program_s_test_set_without_a_box_is_refused(coco_dataset):
    train = coco_dataset()
    register_datasets([train.entry])
    records = [{**record, "annotations": []} for record in RECORDS]
    DatasetCatalog.register("empty", lambda: records)
    MetadataCatalog.get("empty").thing_classes = ["class0", "class1", "class2"]
    cfg = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=("empty",))
    with pytest.raises(UserError, match='dataset "empty" has no box to test on'):
        check_datasets(cfg, training=True)
    records[:] = [{"file_name": "a.png"}]  # not annotated at all: predictions are written
    check_datasets(cfg, training=True)


def test_a_test_set_without_annotations_may_be_there_for_its_predictions(coco_dataset):
    train, test = coco_dataset("train"), coco_dataset("test")
    content = json.loads(test.annotations.read_text())
    del content["annotations"]
    test.annotations.write_text(json.dumps(content))
    register_datasets([train.entry, {**test.entry, "NAME": "ours"}])
    register_coco_instances(test.name, {}, str(test.annotations), str(test.images))
    MetadataCatalog.get(test.name).thing_classes = ["class0", "class1", "class2"]
    cfg = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=(test.name, "ours"))
    check_datasets(cfg, training=True)
    cfg_of_ours = make_cfg(DATASETS__TRAIN=(train.name,), DATASETS__TEST=("ours",))
    lines = " ".join(annotation_warnings(cfg_of_ours, training=True))
    assert "class-rare" in lines
    assert "ours" not in lines
    assert "class-not-in-test" not in lines
    test.annotations.write_text('{"annotations": 3}')
    with pytest.raises(UserError, match="annotations.json.*cannot be read"):
        check_datasets(cfg, training=True)


def test_check_counts_categories_where_nobody_named_classes():
    DatasetCatalog.register("nameless", lambda: [{"annotations": [{"category_id": 4}]}])
    cfg = make_cfg(DATASETS__TEST=("nameless",), MODEL__RETINANET__NUM_CLASSES=3)
    with pytest.raises(UserError, match="has 5 classes.*NUM_CLASSES is 3"):
        check_datasets(cfg, training=False)


def test_check_finds_other_classes_in_test(coco_dataset):
    train, test = coco_dataset("a", classes=2), coco_dataset("b", classes=2)
    register_datasets([train.entry, {**test.entry, "CLASSES": ["class1", "class0"]}])
    cfg = make_cfg(
        DATASETS__TRAIN=(train.name,), DATASETS__TEST=(test.name,), MODEL__RETINANET__NUM_CLASSES=2
    )
    with pytest.raises(
        UserError, match=r"TEST: .* has the classes class1, class0 \(2\), DATASETS.TRAIN: .*same"
    ):
        check_datasets(cfg, training=True)
    # Evaluation alone would count one class as the other, too.
    with pytest.raises(UserError, match="TEST: .* has the classes class1, class0, DATASETS.TRAIN: .*same"):
        check_datasets(cfg, training=False)


def test_check_finds_missing_images(coco_dataset):
    data = coco_dataset(images=3)
    (data.images / "1.png").unlink()
    register_datasets([data.entry])
    cfg = make_cfg(DATASETS__TRAIN=(data.name,), DATASETS__TEST=())
    with pytest.raises(UserError, match=r"1 of 3 images are missing; the first is .*1\.png"):
        check_datasets(cfg, training=True)


def test_check_evaluation_ignores_the_training_set():
    cfg = make_cfg(DATASETS__TRAIN=("no such",), DATASETS__TEST=())
    check_datasets(cfg, training=False)
    with pytest.raises(UserError, match="DATASETS.TRAIN"):
        check_datasets(cfg, training=True)


def test_check_training_needs_data():
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg(DATASETS__TRAIN=()), training=True)


@pytest.mark.parametrize(
    "records", [[{"annotations": [{"bbox": [0, 0, 1, 1]}]}], [{"file_name": "a.png"}], None]
)
def test_broken_datasets_of_a_program_are_one_line(records):
    DatasetCatalog.register("program", lambda: records)
    MetadataCatalog.get("program").json_file = "their.json"
    with pytest.raises(UserError, match=r'dataset "program" \(their.json\) cannot be read: \w+Error'):
        load_table("program")


def test_a_set_without_annotations_can_be_tested_on_only(coco_dataset):
    data = coco_dataset(images=2, classes=1)
    content = json.loads(data.annotations.read_text())
    del content["annotations"]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    cfg = make_cfg(DATASETS__TEST=(data.name,), MODEL__RETINANET__NUM_CLASSES=1)
    check_datasets(cfg, training=False)
    cfg = make_cfg(DATASETS__TRAIN=(data.name,), MODEL__RETINANET__NUM_CLASSES=1)
    with pytest.raises(
        UserError, match="DATASETS.TRAIN: dataset .* has no annotations: it can be in DATASETS.T"
    ):
        check_datasets(cfg, training=True)


def test_keep_makes_the_other_classes_background_or_ignored_regions(coco_dataset):
    data = coco_dataset(images=1, classes=3)
    for others, boxes in (({}, 1), ({"OTHERS": "background"}, 1), ({"OTHERS": "ignored"}, 3)):
        register_datasets([{**data.entry, "KEEP": ["class1"], **others}])
        (record,) = DatasetCatalog.get(data.name)
        assert len(record["annotations"]) == boxes
        assert [x["category_id"] for x in record["annotations"]].count(0) == 1
        assert [x["category_id"] for x in record["annotations"]].count(ANY_CLASS) == boxes - 1
        assert sum(x["iscrowd"] for x in record["annotations"]) == boxes - 1
        assert MetadataCatalog.get(data.name).thing_classes == ["class1"]
        assert MetadataCatalog.get(data.name).thing_dataset_id_to_contiguous_id == {2: 0}
    register_datasets([{**data.entry, "KEEP": ["klass1"]}])
    with pytest.raises(
        UserError, match=r"KEEP: klass1: none of these is a class of the data \(class0, class1"
    ):
        load_table(data.name)


@pytest.mark.parametrize("root", [".", "~"])
@pytest.mark.parametrize("style", [{"FORMAT": "yolo"}, {}])
def test_a_data_file_is_an_entry_without_images(tmp_path, monkeypatch, root, style):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train/images").mkdir(parents=True)
    (tmp_path / "train/labels").mkdir()
    cv2.imwrite(str(tmp_path / "train/images/a.png"), np.zeros((20, 40, 3), np.uint8))
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(f"path: {root}\ntrain: train/images\nnames: [x]\n")
    entry = {
        "NAME": "yolo_train",
        **style,
        "ANNOTATIONS": str(tmp_path / "data.yaml"),
        "SPLIT": "train",
    }
    register_datasets([entry])
    cfg = make_cfg(DATASETS__TRAIN=("yolo_train",), DATASETS__TEST=(), MODEL__RETINANET__NUM_CLASSES=1)
    check_datasets(cfg, training=True)
    assert load_table("yolo_train").boxes.tolist() == [[10, 5, 20, 10]]
    del entry["SPLIT"]
    with pytest.raises(
        UserError, match=r"FOCAL\[0\] has no SPLIT; it must be train, val, test or another key"
    ):
        register_datasets([entry])


@pytest.mark.parametrize("style", ["coco", "csv", "data.yaml"])
def test_list_chooses_images_of_a_single_file(tmp_path, style):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"images/{name}.png"), np.zeros((10, 10, 3), np.uint8))
        (tmp_path / f"labels/{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    images = [{"id": i, "file_name": f"{x}.png", "height": 10, "width": 10} for i, x in enumerate("abc")]
    boxes = [{"image_id": i, "category_id": 1, "bbox": [4, 4, 2, 2]} for i in range(3)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    rows = [f"{x}.png,4,4,6,6,x" for x in "abc"]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label", *rows]))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    folder = {"IMAGES": str(tmp_path / "images")}
    entry, prefix = {
        "coco": ({**folder, "ANNOTATIONS": str(tmp_path / "boxes.json")}, ""),
        "csv": ({**folder, "FORMAT": "csv", "ANNOTATIONS": str(tmp_path / "boxes.csv")}, ""),
        "data.yaml": ({"ANNOTATIONS": str(tmp_path / "data.yaml"), "SPLIT": "train"}, "images/"),
    }[style]
    chosen = tmp_path / "list.txt"
    chosen.write_text(f"{prefix}c.png\n{prefix}a.png\n{prefix}c.png\n")
    register_datasets([{"NAME": "listed", "LIST": str(chosen), **entry}])
    table = load_table("listed").whole()
    assert [Path(x).name for x in table.file_names] == ["a.png", "c.png"]
    assert table.boxes.tolist() == [[4, 4, 2, 2]] * 2
    chosen.write_text("d.png\n")
    register_datasets([{"NAME": "listed", "LIST": str(chosen), **entry}])
    with pytest.raises(UserError, match=r"LIST: 'd\.png' is no image of .*, at .*/d\.png"):
        load_table("listed")
