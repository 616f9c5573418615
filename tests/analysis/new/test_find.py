from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.analysis.new.find import find_sources, split_of
from focal_d2.data.entries import read_entry

XML = (
    "<annotation><filename>{}</filename><size><width>8</width><height>8</height></size><object><name>x</name>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"
)
LABEL = "0 0.5 0.5 0.25 0.25\n"
TABLE = "image_path,xmin,ymin,xmax,ymax,label\n{},1,1,3,3,x\n"


def coco(name):
    return json.dumps(
        {
            "images": [{"id": 1, "file_name": name, "width": 8, "height": 8}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}],
            "categories": [{"id": 1, "name": "x"}],
        }
    )


@pytest.fixture
def folder(tmp_path):
    def make(files):
        for name, text in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
            else:
                path.write_text(text)
        return str(tmp_path / "data")

    return make


LAYOUTS = {
    "coco: images beside, folders of splits (Roboflow)": (
        {
            "train/a.jpg": None,
            "valid/a.jpg": None,
            "train/_annotations.coco.json": coco("a.jpg"),
            "valid/_annotations.coco.json": coco("a.jpg"),
        },
        {"train": "train/a.jpg", "val": "valid/a.jpg"},
    ),
    "coco: names of splits, one folder of images": (
        {
            "images/a.jpg": None,
            "images/b.jpg": None,
            "annotations/instances_train2017.json": coco("a.jpg"),
            "annotations/instances_val2017.json": coco("b.jpg"),
        },
        {"train": "images/a.jpg", "val": "images/b.jpg"},
    ),
    "coco: paths of another machine": (
        {"images/a.jpg": None, "boxes.json": coco("C:\\data\\a.jpg")},
        {None: "images/a.jpg"},
    ),
    "voc: subfolders": (
        {
            "JPEGImages/s/a.jpg": None,
            "JPEGImages/t/a.jpg": None,
            "Annotations/s/a.xml": XML.format("a.jpg"),
            "Annotations/t/a.xml": XML.format("a.jpg"),
        },
        {None: "JPEGImages/s/a.jpg JPEGImages/t/a.jpg"},
    ),
    "voc: ImageSets": (
        {
            "JPEGImages/a.jpg": None,
            "JPEGImages/b.jpg": None,
            "Annotations/a.xml": XML.format("a.jpg"),
            "Annotations/b.xml": XML.format("b.jpg"),
            "ImageSets/Main/train.txt": "a\n",
            "ImageSets/Main/val.txt": "b\n",
            "ImageSets/Main/trainval.txt": "a\nb\n",
        },
        {"train": "JPEGImages/a.jpg", "val": "JPEGImages/b.jpg"},
    ),
    "yolo: data.yaml": (
        {
            "images/train/a.jpg": None,
            "images/val/b.jpg": None,
            "labels/train/a.txt": LABEL,
            "labels/val/b.txt": LABEL,
            "data.yaml": "train: images/train\nval: images/val\ntest: ''\nnames: [x]\n",
        },
        {"train": "images/train/a.jpg", "val": "images/val/b.jpg"},
    ),
    "yolo: folders of splits, labels of negatives empty": (
        {
            "train/images/a.jpg": None,
            "train/images/n.jpg": None,
            "test/images/a.jpg": None,
            "train/labels/a.txt": "",
            "train/labels/n.txt": LABEL,
            "test/labels/a.txt": LABEL,
            "classes.txt": "x\n",
        },
        {"train": "train/images/a.jpg train/images/n.jpg", "test": "test/images/a.jpg"},
    ),
    "yolo: labels beside images, with other texts": (
        {"a.jpg": None, "a.txt": LABEL, "README.txt": "labels of mine", "classes.txt": "x\n"},
        {None: "a.jpg"},
    ),
    "csv: beside another table": (
        {
            "images/a.jpg": None,
            "boxes.csv": TABLE.format("a.jpg"),
            "weather.csv": "day,a,b,c,d,e\n1,2,3,4,5,6\n",
        },
        {None: "images/a.jpg"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_find_sources_knows_a_layout(folder, name):
    files, expected = LAYOUTS[name]
    root = folder(files)
    found = find_sources(root)
    tables = {source.split: read_entry(source.entry).whole() for source in found.sources}
    assert {k: " ".join(x.file_names) for k, x in tables.items()} == {
        k: " ".join(f"{root}/{x}" for x in names.split()) for k, names in expected.items()
    }
    assert all(table.objects.any() for table in tables.values())


@pytest.mark.parametrize(
    "files, match",
    [
        ({"a.json": coco("a.jpg")}, r"data: no images in it \(.bmp"),
        ({"a.jpg": None}, "data: no annotations that can be read .a COCO JSON, VOC XML"),
        (
            {"a.jpg": None, "a.json": '{"shapes": [], "imagePath": "a.jpg"}'},
            r"a\.json is labelme's JSON: convert it",
        ),
        (
            {"a.jpg": None, "a.xml": XML.format("a.jpg"), "all.json": coco("a.jpg")},
            r"annotations in 2 formats \(.*voc: a\.xml.*: choose with --annotations",
        ),
        (
            {"a.jpg": None, "all.json": coco("b.jpg")},
            "all.json: none of its 1 images is under .*data; .* b.jpg",
        ),
        (
            {"a.jpg": None, "x.yaml": "train: .\nnames: [x]\n", "y.yaml": "train: .\nnames: [x]\n"},
            r"several YOLO dataset files \(x.yaml, y.yaml\)",
        ),
    ],
)
def test_find_sources_refuses(folder, files, match):
    with pytest.raises(UserError, match=match):
        find_sources(folder(files))


def test_find_sources_takes_the_annotations_that_are_chosen(folder):
    root = folder({"a.jpg": None, "voc/a.xml": XML.format("a.jpg"), "all.json": coco("a.jpg")})
    (source,) = find_sources(root, [f"{root}/all.json"]).sources
    assert source.entry["FORMAT"] == "coco"
    (source,) = find_sources(root, [f"{root}/voc"]).sources
    assert (source.entry["FORMAT"], source.entry["IMAGES"]) == ("voc", root)
    with pytest.raises(UserError, match="--annotations .*/no.json: no such file or folder under"):
        find_sources(root, [f"{root}/no.json"])


def test_find_sources_says_what_is_in_no_split(folder):
    names = {"a.jpg": None, "b.jpg": None, "train.json": coco("a.jpg"), "other.json": coco("b.jpg")}
    found = find_sources(folder(names))
    assert [source.split for source in found.sources] == ["train"]
    assert found.notes == ["left out: other.json, whose name says no split"]


def test_split_of_reads_the_innermost_name():
    assert [split_of(x) for x in ("train/val.json", "Valid/a.xml", "contest/a", "trainval.json")] == [
        "val",
        "val",
        None,
        "train",
    ]
