from __future__ import annotations

import os

import pytest
from PIL import Image

from focal_d2 import UserError
from focal_d2.data.checks.run import check_dataset
from focal_d2.data.readers import read_voc
from focal_d2.data.readers.voc import read_voc_boxes

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
HEAD = "<filename>{}.png</filename><size><width>40</width><height>30</height></size>"


@pytest.fixture
def folder(tmp_path):
    for name, objects in (
        ("b", OBJECT.format("dog", 0, 1, 3, 10, 4) + OBJECT.format("cat", 1, 1, 1, 1, 1)),
        ("a", ""),
    ):
        (tmp_path / f"{name}.xml").write_text(f"<annotation>{HEAD.format(name)}{objects}</annotation>")
    return tmp_path


def test_counts_from_one_and_includes_the_last_pixel(folder):
    # Columns 1 to 10 are the ten pixels from 0 to 10, rows 3 to 4 two pixels; 1 to 1 is one pixel.
    table = read_voc(str(folder), str(folder))
    assert table.boxes.tolist() == [[0, 2, 10, 2], [0, 0, 1, 1]]
    assert read_voc_boxes(folder / "b.xml").tolist() == [[0, 2, 10, 4], [0, 0, 1, 1]]
    assert read_voc_boxes(folder / "a.xml").shape == (0, 4)


def test_difficult_objects_are_ignored_regions(folder):
    table = read_voc(str(folder), str(folder))
    assert table.ignored.tolist() == [False, True]


def test_an_empty_difficult_is_none(folder):
    (folder / "b.xml").write_text((folder / "b.xml").read_text().replace("<difficult>1<", "<difficult><"))
    table = read_voc(str(folder), str(folder))
    assert table.ignored.tolist() == [False, False]
    assert not table.problems


def test_images_and_classes_are_sorted(folder):
    table = read_voc(str(folder), str(folder))
    assert [name[-5:] for name in table.file_names] == ["a.png", "b.png"]
    assert table.classes == ("cat", "dog")
    assert table.image.tolist() == [1, 1]
    assert table.sizes.tolist() == [[30, 40]] * 2


def test_only_chosen_files_are_read(folder):
    table = read_voc(str(folder), str(folder), chosen=["b"])
    assert len(table) == 1


def test_parts_of_an_object_are_not_objects(folder):
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part></object>"
    text = (folder / "b.xml").read_text().replace("</object>", part, 1)
    (folder / "b.xml").write_text(text)
    assert len(read_voc(str(folder), str(folder)).boxes) == 2


def test_boxes_of_a_broken_file_name_the_object(folder):
    (folder / "a.xml").write_text(f"<annotation>{OBJECT.format('x', 0, 1, 'y', 3, 4)}</annotation>")
    with pytest.raises(UserError, match=r'a\.xml: object 1: bndbox has "y" for ymin'):
        read_voc_boxes(folder / "a.xml")


def test_classes_without_boxes_must_be_named(folder):
    with pytest.raises(UserError, match="no boxes, so no class names: name them with CLASSES"):
        read_voc(str(folder), str(folder), chosen=["a"])
    assert read_voc(str(folder), str(folder), ["cat"], chosen=["a"]).classes == ("cat",)


def test_the_image_of_a_file_in_a_subfolder_is_in_the_same_subfolder(folder):
    """1.xml in two subfolders, each with <filename>1.png: the name alone would mean one image for both."""
    images = folder / "images"
    for below, left in (("x", 3), ("y", 5)):
        (folder / below).mkdir()
        (images / below).mkdir(parents=True)
        (images / below / "1.png").write_bytes(b"")
        text = f"<annotation>{HEAD.format(1)}{OBJECT.format('dog', 0, left, 1, 9, 9)}</annotation>"
        (folder / below / "1.xml").write_text(text)
    (images / "1.png").write_bytes(b"")
    table = read_voc(str(folder), str(images), chosen=["x/1", "y/1"])
    assert [os.path.relpath(name, images) for name in table.file_names] == ["x/1.png", "y/1.png"]
    assert table.boxes[:, 0].tolist() == [2, 4]
    assert not table.problems


def test_an_image_under_another_name_is_the_one_with_the_files_stem(folder):
    """Roboflow renames image and XML file, and leaves <filename>."""
    images = folder / "images"
    images.mkdir()
    (folder / "b.xml").rename(folder / "b_png.rf.0a1b.xml")
    (images / "b_png.rf.0a1b.JPG").write_bytes(b"")
    table = read_voc(str(folder), str(images), chosen=["b_png.rf.0a1b"])
    assert [os.path.basename(name) for name in table.file_names] == ["b_png.rf.0a1b.JPG"]
    assert not table.problems


def test_an_old_filename_that_is_now_another_images_does_not_count(folder):
    """A set of renumbered files: 7.xml still names 1.png, of which 1.xml has the boxes."""
    images = folder / "images"
    images.mkdir()
    for stem, left in (("1", 3), ("7", 5)):
        (images / f"{stem}.png").write_bytes(b"")
        text = f"<annotation>{HEAD.format(1)}{OBJECT.format('dog', 0, left, 1, 9, 9)}</annotation>"
        (folder / f"{stem}.xml").write_text(text)
    table = read_voc(str(folder), str(images), chosen=["1", "7"])
    assert [os.path.basename(name) for name in table.file_names] == ["1.png", "7.png"]
    assert table.boxes[:, 0].tolist() == [2, 4]
    assert not table.notes
    assert "in 1 of 2 files <filename> is the name of another image" in table.warnings[0]
    assert table.warnings[0] in [finding.message for finding in check_dataset("x", table)]
    # Of two images with the file's stem, filename says which.
    (images / "1.jpg").write_bytes(b"")
    assert [os.path.basename(x) for x in read_voc(str(folder), str(images), chosen=["1"]).file_names] == [
        "1.png"
    ]


@pytest.mark.parametrize(
    "own, other, taken",
    [
        ((40, 30), (40, 30), "1.png"),
        ((40, 30), (20, 20), "1.png"),
        ((20, 20), (40, 30), "img_7.png"),
        ((20, 20), (30, 40), "img_7.png"),  # of an image that is turned
        ((20, 20), (10, 10), "1.png"),
    ],
)
def test_the_size_in_a_file_tells_its_image_from_another_one_of_its_name(folder, own, other, taken):
    """<filename> in 1.xml is img_7.png, and there are both images; the file's <size> is 40 x 30."""
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", own).save(images / "1.png")
    Image.new("RGB", other).save(images / "img_7.png")
    (folder / "1.xml").write_text(
        f"<annotation>{HEAD.format('img_7')}{OBJECT.format('x', 0, 1, 1, 9, 9)}</annotation>"
    )
    table = read_voc(str(folder), str(images), chosen=["1"])
    assert [os.path.basename(name) for name in table.file_names] == [taken]
    assert len(table.warnings) == 1


@pytest.mark.parametrize("corners, count", [((0, 5, 9, 9), 1), ((3, 4.5, 9, 9), 1), ((1, 1, 9, 9), 0)])
def test_corners_that_count_from_zero_are_noted(folder, corners, count):
    (folder / "a.xml").write_text(
        f"<annotation>{HEAD.format('a')}{OBJECT.format('x', 0, *corners)}</annotation>"
    )
    table = read_voc(str(folder), str(folder))
    assert len(table.notes) == count
    assert all("1 of 3 boxes have a corner of 0 or one that is not whole" in note for note in table.notes)
    codes = [finding.code for finding in check_dataset("x", table)]
    assert codes.count("annotations-read") == count
