from __future__ import annotations

import pytest

from focal_d2 import UserError
from focal_d2.data import load_table, register_datasets
from focal_d2.data.readers.sniff import describe

FILES = {
    "pointer.json": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "Git LFS pointer",
    ),
    "roads.shp": ("\0\0\x27\x0a\0\0\0\0", "shapefile"),
    "page.json": ("<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "cvat.xml": ("<?xml version='1.0'?>\n<annotations><version>1.1</version></annotations>", "CVAT's XML"),
    "imglab.xml": ("<?xml version='1.0'?>\n<?xml-stylesheet?>\n<dataset><images/></dataset>", "dlib's XML"),
    "dota.txt": ("imagesource:GoogleEarth\ngsd:0.1\n1 2 3 2 3 4 1 4 plane 0\n", "DOTA"),
    "dota2.txt": ("2753 2408 2861 2385 2888 2468 2805 2502 small-vehicle 0\n", "DOTA"),
    "kitti.txt": (
        "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.7 -1.59\n",
        "KITTI",
    ),
    "gt.txt": ("1,1,199,813,140,268,1,1,0.83014\n", "MOTChallenge"),
    "openimages.csv": (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded\n0,x,/m/0,1,0.1,0.2,0.3,0.4,0\n",
        "Open Images",
    ),
    "makesense.csv": ("cat,10,20,30,40,a.jpg,640,480\n", "makesense's CSV"),
    "makesense2.csv": (
        "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height\n",
        "makesense's CSV",
    ),
    "wheat.csv": ('image_id,width,height,bbox,source\na,9,9,"[1, 2, 3, 4]",x\n', "boxes as text"),
    "labelme.json": (
        '{"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg", "imageData": null}',
        "labelme",
    ),
    "map.geojson": ('{"type": "FeatureCollection", "features": []}', "GeoJSON"),
    "via.json": ('{"_via_settings": {}, "_via_img_metadata": {}}', "VIA"),
    "via_export.json": ('{"a.jpg123": {"filename": "a.jpg", "size": 1, "regions": []}}', "VIA"),
    "vott.json": ('{"asset": {"name": "a.jpg"}, "regions": [], "version": "2.1.0"}', "VoTT"),
    "supervisely.json": (
        '{"description": "", "size": {"height": 9, "width": 9}, "objects": []}',
        "Supervisely",
    ),
    # The file's own keys count before those of its first entry.
    "supervisely2.json": (
        '{"description": {"shapes": [], "imagePath": "a.jpg"}, "size": {}, "objects": []}',
        "Supervisely",
    ),
    "label_studio.json": ('[{"id": 1, "annotations": [], "data": {"image": "a.jpg"}}]', "Label Studio"),
    "createml.json": ('[{"image": "a.jpg", "annotations": []}]', "CreateML"),
    "bdd.json": ('[{"name": "a.jpg", "labels": []}]', "BDD100K"),
    "results.json": (
        '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
        "COCO detections",
    ),
    "archive.zip": ("PK\x03\x04", "zip archive"),
    "boxes.xlsx": ("PK\x03\x04", "spreadsheet: save it as CSV"),
    "boxes.ods": ("PK\x03\x04", "spreadsheet: save it as CSV"),
    "boxes.npz": ("PK\x03\x04", "save the boxes as CSV"),
    "pointer.xlsx": ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "photo.jpg": (b"\xff\xd8\xff\xe0", "is an image"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("style", ["coco", "csv"])
def test_a_file_of_another_kind_is_told(tmp_path, name, style):
    data, kind = FILES[name]
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    register_datasets([{"NAME": "x", "FORMAT": style, "IMAGES": str(tmp_path), "ANNOTATIONS": str(path)}])
    with pytest.raises(UserError) as error:
        load_table("x")
    message = str(error.value)
    assert message.startswith(f"{path} ")
    assert kind in message
    assert "\n" not in message
    assert len(message.replace(str(path), "")) < 200


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_such_files_is_told(tmp_path, name):
    data, kind = FILES[name]
    for i in range(3):
        (tmp_path / f"{i}{name}").write_bytes(data if isinstance(data, bytes) else data.encode())
    for style in ("coco", "voc", "yolo"):
        message = describe(str(tmp_path), style)
        assert kind in message
        assert message.startswith(f"is a folder whose file 0{name} ")


def test_images_beside_annotations_do_not_count(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "_annotations.coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert describe(str(tmp_path), "coco") == "is a folder: name the COCO file in it"


GOOD = {
    "coco.json": ('{"images": [], "annotations": [], "categories": []}', "coco"),
    "boxes.csv": ("image,xmin,ymin,xmax,ymax,label\n", "csv"),
    "a.xml": ("<annotation><object><bndbox/></object></annotation>", "voc"),
    "a.txt": ("0 0.5 0.5 0.1 0.1\n", "yolo"),
    "dataset.yaml": ("train: x\nnames: [x]\n", "yolo"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("style", ["coco", "csv", "voc", "yolo"])
def test_files_that_are_read_are_sent_to_their_format(tmp_path, name, style):
    text, own = GOOD[name]
    (tmp_path / name).write_text(text)
    message = describe(str(tmp_path / name), style)
    if style != own:
        assert f"set FORMAT: {own}" in message
    elif name in ("a.xml", "a.txt"):
        assert message.endswith("file: set ANNOTATIONS to its folder")
    else:
        assert message is None


@pytest.mark.parametrize("name, style", [("a.xml", "voc"), ("a.txt", "yolo")])
def test_a_file_in_place_of_a_folder_exists(tmp_path, name, style):
    (tmp_path / name).write_text(GOOD[name][0])
    entry = {"NAME": "x", "FORMAT": style, "IMAGES": str(tmp_path), "ANNOTATIONS": str(tmp_path / name)}
    register_datasets([entry])
    with pytest.raises(
        UserError, match=rf"{name} is a .* file: set ANNOTATIONS to its folder \(FORMAT is {style}"
    ):
        load_table("x")
    (tmp_path / name).write_text("hello")
    with pytest.raises(UserError, match=rf"{name}: a file, where a folder is needed$"):
        load_table("x")


def folder_of(tmp_path, counts):
    """Write so many files of each kind."""
    for name, count in counts.items():
        for i in range(count):
            (tmp_path / f"{i}{name}").write_text(GOOD[name][0])
    return tmp_path


@pytest.mark.parametrize("counts", [{"a.xml": 1, "a.txt": 3}, {"a.xml": 3, "a.txt": 1}])
@pytest.mark.parametrize("style", ["voc", "yolo"])
@pytest.mark.parametrize("data_file", [True, False])
def test_a_folder_of_two_kinds_keeps_the_readers_reason(tmp_path, counts, style, data_file):
    folder = folder_of(tmp_path, counts)
    if data_file:
        (folder / "data.yaml").write_text(GOOD["dataset.yaml"][0])
    entry = {"NAME": "x", "FORMAT": style, "ANNOTATIONS": str(folder), "IMAGES": str(folder / "imagse")}
    register_datasets([entry])
    with pytest.raises(UserError, match=r"imagse: no such folder$"):
        load_table("x")
    register_datasets([{**entry, "FORMAT": "coco"}])
    with pytest.raises(UserError, match=r" is (a|the) folder of .* \(FORMAT is coco\)$"):
        load_table("x")


def test_a_folder_of_another_kind_keeps_the_readers_reason_beside_it(tmp_path):
    folder = folder_of(tmp_path, {"a.txt": 2})
    register_datasets(
        [{"NAME": "x", "FORMAT": "voc", "ANNOTATIONS": str(folder), "IMAGES": str(folder / "imagse")}]
    )
    with pytest.raises(
        UserError, match=r"set FORMAT: yolo \(FORMAT is voc; IMAGES: .*imagse: no such folder\)$"
    ):
        load_table("x")


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", "{", "hello", "<", "a,b\n", '{"a": 1}', "\xff\xfe"])
def test_what_is_not_known_is_not_guessed(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert describe(str(tmp_path / "a"), "coco") is None
    assert describe(str(tmp_path), "coco") is None
    assert describe(str(tmp_path / "no such"), "coco") is None
