from __future__ import annotations

import json

import pytest

from focal_d2 import UserError
from focal_d2.data.readers import read_coco


def read_changed(data, change, **options):
    coco = json.loads(data.annotations.read_text())
    change(coco)
    data.annotations.write_text(json.dumps(coco))
    return read_coco(str(data.annotations), str(data.images), **options)


def test_good_file_is_read(coco_dataset):
    table = read_changed(coco_dataset(images=2, classes=3), lambda coco: None)
    assert table.image.tolist() == [0, 0, 0, 1, 1, 1]
    assert table.classes == ("class0", "class1", "class2")
    assert table.category_ids == (1, 2, 3)
    assert not table.problems


def test_images_come_by_id_and_boxes_as_in_the_file(coco_dataset):
    def change(coco):
        coco["images"].reverse()
        coco["annotations"].reverse()

    table = read_changed(coco_dataset(images=2, classes=3), change)
    assert table.image_ids.tolist() == [0, 1]
    assert table.labels.tolist() == [2, 1, 0, 2, 1, 0]


def test_areas_and_crowds_are_the_files(coco_dataset):
    def change(coco):
        coco["annotations"][0].update(area=100.5, iscrowd=1)
        coco["annotations"][1].pop("area")
        coco["annotations"][2].pop("iscrowd")

    table = read_changed(coco_dataset(images=1), change)
    assert table.areas.tolist() == [100.5, 576, 576]
    assert table.ignored.tolist() == [True, False, False]


def test_ignore_makes_ignored_regions(coco_dataset):
    def change(coco):
        for annotation, flag in zip(coco["annotations"], (1, 0, True, None, False, 1), strict=True):
            annotation["ignore"] = flag
        coco["annotations"][5]["iscrowd"] = 1

    data = coco_dataset(images=2)
    table = read_changed(data, change)
    assert table.ignored.tolist() == [True, False, True, False, False, True]
    assert [a["iscrowd"] for r in table.records() for a in r["annotations"]] == [1, 0, 1, 0, 0, 1]
    (note,) = table.notes
    assert '3 of 6 annotations have "ignore": 1: they are ignored regions' in note
    assert not read_changed(data, lambda c: [a.pop("ignore") for a in c["annotations"]]).notes
    table = read_changed(data, lambda c: c["annotations"][0].update(ignore="no"))
    assert "has the ignore 'no'; it must be 0 or 1" in table.problems[0]


def test_a_set_of_crowds_alone_is_noted(coco_dataset):
    """CVAT exports masks so."""
    table = read_changed(coco_dataset(images=1), lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    assert table.ignored.all()
    assert "all 3 annotations have iscrowd 1" in table.notes[0]


def test_classes_set_the_order_and_may_be_absent_from_the_file(coco_dataset):
    table = read_changed(
        coco_dataset(images=1), lambda c: None, classes=["class2", "new", "class0", "class1"]
    )
    assert table.labels.tolist() == [2, 3, 0]
    assert table.category_ids == (3, 4, 1, 2)


def test_slow_path_reads_the_same(coco_dataset):
    """A wrong item makes the file be read item by item: the others come out alike, under their own places."""
    data = coco_dataset(images=2)
    whole = read_changed(data, lambda c: None)
    table = read_changed(data, lambda c: c["annotations"].insert(2, {"id": "x"}))
    assert table.boxes.tolist() == whole.boxes.tolist()
    assert len(table.problems) == 1
    assert "annotations[2] (id 'x') has no image_id, category_id, bbox" in table.problems[0]
    table = read_changed(data, lambda c: c["annotations"][5].update(category_id=9))
    assert "annotations[5] (id 5) has an unknown category_id: 9" in table.problems[1]


def test_problems_name_the_file(coco_dataset):
    data = coco_dataset(images=1)
    table = read_changed(data, lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]))
    assert all(problem.startswith(str(data.annotations)) for problem in table.problems)
    assert len(table.problems) == 1


def test_all_annotations_may_be_absent(coco_dataset):
    table = read_changed(coco_dataset(images=2), lambda c: c["annotations"].clear())
    assert len(table) == 2
    assert table.boxes.shape == (0, 4)
    assert [r["annotations"] for r in table.records()] == [[], []]


def test_ids_may_be_whole_floats_and_annotations_may_share_one(coco_dataset):
    data = coco_dataset(images=2)
    whole = read_changed(data, lambda c: None)

    def change(coco):
        for annotation in coco["annotations"]:
            annotation.update(
                id=7.5, image_id=float(annotation["image_id"]), category_id=1.0 * annotation["category_id"]
            )

    table = read_changed(data, change)
    assert not table.problems
    assert (table.image.tolist(), table.labels.tolist()) == (whole.image.tolist(), whole.labels.tolist())
    table = read_changed(data, lambda c: c["annotations"][0].update(image_id=0.5))
    assert "annotations[0] (id 7.5) has the image_id 0.5; it must be the id of an image" in table.problems[0]


def test_annotations_with_one_id_are_read(coco_dataset):
    table = read_changed(coco_dataset(images=2), lambda c: [a.update(id=1) for a in c["annotations"]])
    assert not table.problems
    assert len(table.boxes) == 6


def test_nothing_good_says_what_was_wrong(coco_dataset):
    with pytest.raises(UserError, match=r"json: no images in it: .*images\[0\] has no id"):
        read_changed(coco_dataset(images=1), lambda c: c["images"][0].pop("id"))


def test_what_other_tools_leave_out_or_write_differently_is_read(coco_dataset):
    data = coco_dataset(images=2)
    whole = read_changed(data, lambda c: None)

    def change(coco):
        for i, annotation in enumerate(coco["annotations"]):
            annotation.pop("id")
            annotation.update(iscrowd=None, image_id=str(annotation["image_id"]))
            x, y, w, h = annotation.pop("bbox")
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotation["segmentation"] = [corners] if i % 2 else [corners[:4] + corners[4:6], corners[2:]]
            annotation["category_id"] = str(annotation["category_id"])
        for image, sides in zip(coco["images"], ({}, {"width": 0, "height": None}), strict=True):
            del image["width"], image["height"]
            image.update(sides, id=str(image["id"]))
        coco["categories"].append(coco["categories"][0])
        coco["categories"][1]["id"] = "2"

    table = read_changed(data, change)
    assert not table.problems
    assert table.image_ids.tolist() == whole.image_ids.tolist()
    assert table.sizes.tolist() == whole.sizes.tolist()
    assert table.boxes.tolist() == whole.boxes.tolist()
    assert table.labels.tolist() == whole.labels.tolist()
    assert table.classes == whole.classes
    assert not table.ignored.any()


def test_annotations_without_ids_in_a_good_file(coco_dataset):
    """Nothing else is unusual: the file is read at once."""
    table = read_changed(
        coco_dataset(images=2),
        lambda c: [a.pop("id") or a.update(iscrowd=None) for a in c["annotations"][1:]],
    )
    assert len(table.boxes) == 6
    assert not table.problems


def test_texts_that_are_not_clearly_one_number_are_no_ids(coco_dataset):
    table = read_changed(
        coco_dataset(images=1),
        lambda c: [
            a.update(category_id=x) for a, x in zip(c["annotations"], ("01", "1.0", "x"), strict=True)
        ],
    )
    assert len(table.problems) == 3
    assert (
        "annotations[0] (id 1) has the category_id '01'; it must be the id of a category" in table.problems[0]
    )


def test_an_image_that_is_not_there_has_no_size(coco_dataset):
    table = read_changed(
        coco_dataset(images=2),
        lambda c: c["images"][0].pop("width") and c["images"][0].update(file_name="q.png"),
    )
    assert len(table.problems) == 1
    assert "images[0] (id 0) has no size: cannot read the image" in table.problems[0]


def test_a_file_without_annotations_is_a_test_set(coco_dataset):
    data = coco_dataset(images=2)
    table = read_changed(data, lambda c: c.pop("annotations"))
    assert not table.annotated
    assert not table.problems
    assert ["annotations" in record for record in table.records()] == [False, False]
    assert read_changed(data, lambda c: c.update(annotations=[])).annotated


@pytest.mark.parametrize(
    "sections, match",
    [(("images",), "no images in it"), (("categories",), "no categories in it"),
     (("images", "categories"), "no images and no categories in it")],
)  # fmt: skip
def test_an_empty_section_is_named(coco_dataset, sections, match):
    with pytest.raises(UserError, match=rf"json: {match}$"):
        read_changed(coco_dataset(images=1), lambda c: c.update({x: [] for x in (*sections, "annotations")}))


@pytest.mark.parametrize(
    "segmentation", [[[1, 2, 3]], [["x", 1]], {"size": [9, 9]}, {"size": [9, 9], "counts": "x"}, "x"]
)
def test_a_mask_of_no_kind_is_named(coco_dataset, segmentation):
    def change(coco):
        coco["annotations"][0].update(segmentation=segmentation)
        del coco["annotations"][0]["bbox"]

    (problem,) = read_changed(coco_dataset(images=1), change).problems
    assert "annotations[0] (id 1) has no bbox, and its segmentation is neither polygons nor RLE" in problem


ESCAPED = json.dumps("annotations").replace("t", "\\u0074")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("}]}", '}], "annotations": []}', "annotations"),
        ("}]}", f"}}], {ESCAPED}: []}}", "annotations"),
        ("}]}", f"}}], {ESCAPED} \n : null}}", "annotations"),
        ("}]}", '}], "categories": [{"id": 1, "name": "x"}]}', "categories"),
        ('"images":', '"images": [], "images":', "images"),
        ('"bbox":', '"bbox": [0, 0, 1, 1], "bbox":', "bbox"),
        ('"bbox":', '"\\u0062box": [0, 0, 1, 1], "bbox":', "bbox"),
        ('"image_id":', '"image_id": 1, "image_id":', "image_id"),
        ('"iscrowd":', '"iscrowd": 1, "iscrowd":', "iscrowd"),
        ('"file_name":', '"file_name": "b.png", "file_name":', "file_name"),
    ],
)
def test_key_that_stands_twice_is_refused(coco_dataset, old, new, key):
    data = coco_dataset(images=2, classes=2)
    text = data.annotations.read_text()
    assert old in text
    start, _, end = text.rpartition(old)
    data.annotations.write_text(f"{start}{new}{end}")
    with pytest.raises(UserError, match=rf"the key \'{key}\' is twice in an object.*; remove one"):
        read_coco(str(data.annotations), str(data.images))


def test_names_of_keys_in_values_are_no_keys(coco_dataset):
    def change(coco):
        coco["info"] = {"images": ["annotations", "bbox"], "description": "annotations", "\u00e4": 1}
        coco["images"][0]["bbox"] = "bbox"

    assert len(read_changed(coco_dataset(images=2), change)) == 2
