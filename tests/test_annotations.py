from __future__ import annotations

import numpy as np
import pytest
from detectron2.structures import BoxMode

from focal_d2 import UserError
from focal_d2.annotations import Table
from focal_d2.ops.common import ANY_CLASS

XYWH = BoxMode.XYWH_ABS
RECORDS = [
    {
        "file_name": "a.png",
        "image_id": 7,
        "height": 20,
        "width": 30,
        "annotations": [
            {"bbox": [1.5, 2, 3, 4], "category_id": 1, "bbox_mode": XYWH, "area": 5, "iscrowd": 1},
            {"bbox": [0, 0, 10.25, 10], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0},
        ],
    },
    {"file_name": "b.png", "image_id": 3, "height": 5, "width": 6, "annotations": []},
]  # fmt: skip


def test_records_come_back():
    table = Table.from_records(RECORDS, ["x", "y"])
    assert table.boxes.tolist() == [[1.5, 2, 3, 4], [0, 0, 10.25, 10]]
    assert table.areas.tolist() == [5.0, 102.5]
    assert table.ignored.tolist() == [True, False]
    first, second = table.records()
    assert (first["image_id"], first["height"], first["width"]) == (7, 20, 30)
    assert [a["category_id"] for a in first["annotations"]] == [1, 0]
    assert {type(x) for a in first["annotations"] for x in a["bbox"]} == {float}
    assert second["annotations"] == []
    again = Table.from_records(table.records(), ["x", "y"])
    assert all(
        np.array_equal(getattr(again, k), getattr(table, k)) for k in ("boxes", "areas", "sizes", "image")
    )


@pytest.mark.parametrize("records", [[], RECORDS[1:]])
def test_nothing_has_no_boxes(records):
    table = Table.from_records(records, ["x"])
    assert table.boxes.shape == (0, 4)
    assert table.sizes.shape == (len(records), 2)
    assert len(table.records()) == len(table) == len(records)


def test_names_for_image_ids_become_numbers():
    table = Table.from_records([{**RECORDS[1], "image_id": "b"}, {**RECORDS[1], "image_id": "c"}], ["x"])
    assert table.image_ids.tolist() == [0, 1]


def test_by_name_moves_images_with_their_boxes():
    table = Table.from_records([RECORDS[1], RECORDS[0]], ["x", "y"]).by_name()
    expected = Table.from_records(RECORDS, ["x", "y"])
    assert table.records() == expected.records()
    assert [r["file_name"] for r in table.records()] == ["a.png", "b.png"]


def test_boxes_without_area_are_no_records():
    boxes = [[0, 0, 5, 5], [1, 1, 0, 4], [1, 1, 4, 1e-9], [1, float("nan"), 4, 4], [2, 2, 3, 3]]
    annotations = [{"bbox": box, "bbox_mode": XYWH, "category_id": k} for k, box in enumerate(boxes)]
    annotations[4]["iscrowd"] = 1
    records = [{**RECORDS[0], "annotations": annotations[:2]}, {**RECORDS[1], "annotations": annotations[2:]}]
    table = Table.from_records(records, "abcde")
    assert table.has_area.tolist() == table.usable.tolist() == [True, False, False, False, True]
    assert table.objects.tolist() == [True, False, False, False, False]
    kept = [[a["category_id"] for a in record["annotations"]] for record in table.records()]
    assert kept == [[0], [4]]


def test_boxes_outside_their_image_are_no_records():
    """The image is 30 pixels wide and 20 high."""
    boxes = [[30, 2, 5, 5], [-5, 2, 5, 5], [2, 20, 5, 5], [2, -5, 5, 5], [29.9, 2, 5, 5], [-1e300, 2, 5, 5]]
    annotations = [{"bbox": box, "bbox_mode": XYWH, "category_id": k} for k, box in enumerate(boxes)]
    table = Table.from_records([{**RECORDS[0], "annotations": annotations}], "abcdef")
    assert table.has_area.all()
    assert table.objects.tolist() == table.usable.tolist() == [False, False, False, False, True, False]
    assert [a["category_id"] for a in table.records()[0]["annotations"]] == [4]


@pytest.mark.parametrize("ignore_others", [False, True])
def test_keep_takes_some_classes_and_the_others_are_background_or_ignored(ignore_others):
    table = Table(
        classes=("cat", "dog", "cow"),
        category_ids=(1, 5, 9),
        file_names=["a", "b"],
        image_ids=np.array([1, 2]),
        sizes=np.full((2, 2), 50),
        image=np.array([0, 0, 1]),
        boxes=np.array([[0.0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]]),
        labels=np.array([0, 2, 1]),
        ignored=np.array([False, True, False]),
        areas=np.array([1.0, 4, 9]),
    )
    kept = table.keep(["cow", "bird", "cat"], ignore_others=ignore_others)
    assert kept.classes == ("cow", "bird", "cat")
    assert kept.category_ids == (9, 10, 1)
    assert kept.notes == ["KEEP: no class of the data is called bird"]
    assert kept.file_names == ["a", "b"]
    others = 1 if ignore_others else 0  # a detection of any class is ignored there
    assert kept.image.tolist() == [0, 0] + [1] * others
    assert kept.labels.tolist() == [2, 0] + [ANY_CLASS] * others
    assert kept.ignored.tolist() == [False, True] + [True] * others
    assert kept.areas.tolist() == [1, 4] + [9] * others
    with pytest.raises(
        UserError, match=r"KEEP: bird: none of these is a class of the data \(cat, dog, cow\)"
    ):
        table.keep(["bird"], ignore_others=False)


def test_some_images_keep_their_boxes():
    records = [{**RECORDS[0], "file_name": name, "image_id": i} for i, name in enumerate("abc")]
    records[1]["annotations"] = RECORDS[0]["annotations"][:1]
    table = Table.from_records(records, ["x", "y"]).of_images([2, 1])
    assert table.records() == Table.from_records([records[2], records[1]], ["x", "y"]).records()
    assert table.image.tolist() == [0, 0, 1]
    assert len(table.of_images([]).boxes) == len(table.of_images([])) == 0


def test_joined_tables_share_classes_by_name():
    def labelled(*labels):
        boxes = [
            {"bbox": [0, 0, 9, 9], "bbox_mode": XYWH, "category_id": k, "iscrowd": k < 0} for k in labels
        ]
        return [{**RECORDS[0], "annotations": boxes}, RECORDS[1]]

    # Of two classes, 2 is none.
    first = Table.from_records(labelled(0, 1, ANY_CLASS, 2), ["x", "y"])
    second = Table.from_records(labelled(0, 1), ["z", "x"])
    table = Table.joined([first, second, first])
    assert table.classes == ("x", "y", "z")
    assert table.labels.tolist() == [0, 1, ANY_CLASS, 3, 2, 0, 0, 1, ANY_CLASS, 3]
    assert table.image.tolist() == [0] * 4 + [2] * 2 + [4] * 4
    assert table.file_names == ["a.png", "b.png"] * 3
    assert (table.image_ids.tolist(), table.sizes.tolist()) == ([7, 3] * 3, [[20, 30], [5, 6]] * 3)
    assert table.ignored.tolist() == [k == ANY_CLASS for k in table.labels.tolist()]
    assert table.boxes.tolist() == [[0, 0, 9, 9]] * 10
    assert table.areas.tolist() == [81] * 10
