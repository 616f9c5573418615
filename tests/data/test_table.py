from __future__ import annotations

import numpy as np
import pytest
from detectron2.structures import BoxMode

from focal_d2.data.table import Table

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
    assert table.has_area.tolist() == [True, False, False, False, True]
    assert table.objects.tolist() == [True, False, False, False, False]
    kept = [[a["category_id"] for a in record["annotations"]] for record in table.records()]
    assert kept == [[0], [4]]
