from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from focal_d2.annotations import Table
from focal_d2.data import register_datasets
from focal_d2.data.datasets import register_table
from focal_d2.errors import UserError
from focal_d2.evaluation.ground_truth import read_ground_truth
from tests.evaluation.scenes import random_scene

# The classes 9 and 4 have the labels 0 and 1. The second image has the lower id.
TABLE = Table(
    classes=("a", "b"),
    category_ids=(9, 4),
    file_names=["1.png", "2.png"],
    image_ids=np.array([30, 8]),
    sizes=np.full((2, 2), 50),
    image=np.array([0, 0, 1, 1]),
    boxes=np.array([[1.5, 2, 3, 4], [60, 60, 5, 5], [0, 0, 7, 7], [9, 9, 2, 2]]),
    labels=np.array([0, 0, -1, 1]),
    ignored=np.array([False, False, True, False]),
    areas=np.array([10.25, 25, 49, 4]),
)


def columns(truth):
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in truth._asdict().items()}


def test_a_table_becomes_columns_without_records(monkeypatch):
    register_table("columns", lambda: TABLE)
    monkeypatch.setattr(Table, "records", None)
    ids, labels, truth = read_ground_truth("columns")
    assert (ids, labels) == ([8, 30], {9: 0, 4: 1})
    # The second box is outside its image. The region of any class is one of each.
    assert columns(truth) == {
        "images": 2,
        "classes": 2,
        "image": [1, 0, 0, 0],
        "boxes": [[1.5, 2, 3, 4], [0, 0, 7, 7], [0, 0, 7, 7], [9, 9, 2, 2]],
        "labels": [0, 0, 1, 1],
        "areas": [10.25, 49, 49, 4],
        "ignored": [False, True, True, False],
    }
    assert MetadataCatalog.get("columns").thing_classes == ["a", "b"]


def test_a_table_and_its_records_give_the_same_columns():
    register_table("table", lambda: TABLE)
    DatasetCatalog.register("records", lambda: TABLE.records())
    MetadataCatalog.get("records").set(
        thing_classes=["a", "b"], thing_dataset_id_to_contiguous_id={9: 0, 4: 1}
    )
    (ids, labels, truth), other = read_ground_truth("table"), read_ground_truth("records")
    assert (ids, labels, columns(truth)) == (*other[:2], columns(other.truth))


@pytest.mark.parametrize("seed", range(5))
def test_a_file_and_its_records_give_the_same_boxes(tmp_path, seed):
    content, _ = random_scene(seed)
    (tmp_path / "file.json").write_text(json.dumps(content))
    MetadataCatalog.get("file").set(json_file=str(tmp_path / "file.json"))
    ids, labels, truth = read_ground_truth("file")
    assert ids == sorted(x["id"] for x in content["images"])
    assert labels == {k: i for i, k in enumerate(sorted(x["id"] for x in content["categories"]))}
    records = [
        {
            "image_id": i,
            "annotations": [
                {**a, "bbox_mode": BoxMode.XYWH_ABS, "category_id": labels[a["category_id"]]}
                for a in content["annotations"]
                if a["image_id"] == i
            ],
        }
        for i in ids
    ]
    DatasetCatalog.register("records", lambda: records)
    MetadataCatalog.get("records").set(
        thing_classes=list(map(str, labels)), thing_dataset_id_to_contiguous_id=labels
    )
    other = read_ground_truth("records")
    assert other[:2] == (ids, labels)
    order = np.argsort(truth.image, kind="stable")  # records are image by image
    for name in ("image", "boxes", "labels", "areas", "ignored"):
        np.testing.assert_array_equal(getattr(truth, name)[order], getattr(other.truth, name))


def test_a_dataset_without_annotations_has_no_truth(tmp_path):
    register_table("table", lambda: dataclasses.replace(TABLE, annotated=False))
    DatasetCatalog.register("records", lambda: [{"image_id": 8}, {"image_id": 30}])
    for name, content in (("absent", {}), ("null", {"annotations": None})):
        content |= {"images": [{"id": 30}, {"id": 8}], "categories": []}
        (tmp_path / name).write_text(json.dumps(content))
        MetadataCatalog.get(name).set(json_file=str(tmp_path / name))
    for name in ("table", "records", "absent", "null"):
        ids, _, truth = read_ground_truth(name)
        assert (ids, truth) == ([8, 30], None)


def test_what_cannot_be_read_is_refused(coco_dataset):
    data = coco_dataset(images=2)
    content = json.loads(data.annotations.read_text())
    content["annotations"][0]["bbox"] = [0, 0, -1, 5]
    content["annotations"][4]["bbox"] = [0, 0, -1, 5]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    with pytest.raises(UserError, match=r"annotations\[0\].* has the bbox .*; and 1 more"):
        read_ground_truth(data.name)
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    DatasetCatalog.register("records", lambda: [{"image_id": 1, "annotations": [box]}])
    MetadataCatalog.get("records").set(thing_classes=["a", "b"])
    with pytest.raises(UserError, match='dataset "records": a box has class 2, but there are 2 classes'):
        read_ground_truth("records")
