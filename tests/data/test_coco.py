from __future__ import annotations

import json

import pytest

from focal_d2 import UserError
from focal_d2.data.coco import load_coco


def load_changed(data, change):
    coco = json.loads(data.annotations.read_text())
    changed = change(coco)
    data.annotations.write_text(json.dumps(coco if changed is None else changed))
    return load_coco(str(data.annotations), str(data.images), data.name)


def test_good_file_is_read(coco_dataset):
    records = load_changed(coco_dataset(images=2, classes=3), lambda coco: None)
    assert [len(r["annotations"]) for r in records] == [3, 3]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: [], 'no list "images"'),
        (lambda c: {}, 'no list "images"'),
        (lambda c: c.pop("categories"), "no list .categories"),
        (lambda c: c["images"].clear(), "no images"),
        (lambda c: c["images"][0].pop("width"), r"images\[0\] has no width"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] has no bbox"),
        (lambda c: c["categories"][0].pop("name"), r"categories\[0\] has no name"),
        (lambda c: c["annotations"][1].update(id=1), "ids must be different"),
        (lambda c: c["annotations"][0].update(category_id=99), r"\(id 1\) has an unknown category_id: 99"),
        (lambda c: c["annotations"][0].update(image_id=99), "unknown image_id: 99"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"has the bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "has the bbox"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "has the bbox"),
    ],
)  # fmt: skip
def test_bad_file_is_named_with_its_item(coco_dataset, change, match):
    data = coco_dataset(images=2)

    def changed(coco):
        result = change(coco)
        return result if result in ([], {}) and not isinstance(result, type(None)) else None

    with pytest.raises(UserError, match=match) as error:
        load_changed(data, changed)
    assert str(data.annotations) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_named(coco_dataset, content):
    data = coco_dataset(images=1)
    data.annotations.write_bytes(content)
    with pytest.raises(UserError, match="not readable as JSON"):
        load_coco(str(data.annotations), str(data.images), data.name)
