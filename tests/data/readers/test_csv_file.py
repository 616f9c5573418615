from __future__ import annotations

import cv2
import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.data.readers import read_csv


@pytest.fixture
def read(tmp_path):
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((30, 40, 3), np.uint8))

    def read_text(text, **options):
        path = tmp_path / "boxes.csv"
        path.write_text(text)
        return read_csv(str(path), str(tmp_path), **options)

    return read_text


@pytest.mark.parametrize(
    "header",
    [
        "",  # as keras-retinanet writes it
        "image_path,xmin,ymin,xmax,ymax,label\n",  # as DeepForest does
        "Path, x1, y1, x2, y2, class\n",
    ],
)
def test_common_layouts_are_read(read, header):
    table = read(f"{header}b.png,1,2,10,4.5,tree\na.png,,,,,\n")
    assert [name[-5:] for name in table.file_names] == ["a.png", "b.png"]
    assert table.boxes.tolist() == [[1, 2, 9, 2.5]]
    assert table.sizes.tolist() == [[30, 40], [30, 40]]
    assert table.classes == ("tree",)
    assert not table.problems


def test_sizes_and_ignored_of_the_file(read):
    table = read(
        "filename,width,height,class,xmin,ymin,xmax,ymax,iscrowd\n"
        "none.png,50,60,b,0,0,1,1,1\nnone.png,50,60,a,0,0,1,1,0\nnone.png,50,61,a,0,0,1,1,0\n"
    )
    assert table.sizes.tolist() == [[60, 50]]
    assert table.ignored.tolist() == [True, False]
    assert table.labels.tolist() == [1, 0]
    assert (
        "line 4: the image's height and width are (61, 50), in an earlier line (60, 50)" in table.problems[0]
    )


def test_corners_of_zeros_are_an_image_without_objects(read):
    table = read("a.png,0,0,0,0,Tree\nb.png,1,2,10,4.5,Bush\nb.png,0.0,0.0,0,0,\n")
    assert len(table) == 2
    assert table.boxes.tolist() == [[1, 2, 9, 2.5]]
    assert table.classes == ("Bush",)
    assert not table.problems


def test_numbers_for_classes_are_sorted_as_numbers(read):
    table = read("a.png,0,0,1,1,10\na.png,0,0,1,1,9\na.png,0,0,1,1,x\n")
    assert table.classes == ("9", "10", "x")


def test_quoted_line_breaks_keep_the_count(read):
    table = read('a.png,0,0,1,1,"x\ny"\na.png,0,0,q,1,x\n')
    assert table.classes == ("x\ny",)
    assert "line 3: the corners are" in table.problems[0]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_are_recognised(read, separator):
    text = "image,xmin,ymin,xmax,ymax,label\na.png,1,2,10,4.5,tree\n"
    assert read(text.replace(",", separator)).boxes.tolist() == [[1, 2, 9, 2.5]]
    # Without a header, too.
    assert read("a.png,1,2,10,4.5,tree\n".replace(",", separator)).boxes.tolist() == [[1, 2, 9, 2.5]]


def test_decimal_commas_go_with_semicolons(read):
    assert read("a.png;1,5;2;10;4,5;tree\n").boxes.tolist() == [[1.5, 2, 8.5, 2.5]]


def test_columns_may_be_named(read):
    table = read("Bild;x;y;x2;y2;Art\na.png;1;2;10;4;tree\n",
                 columns={"image": "bild", "xmin": "x", "ymin": "y", "label": "Art"})  # fmt: skip
    assert table.boxes.tolist() == [[1, 2, 9, 2]]
    with pytest.raises(UserError, match="has no column xmin, ignored, which may be called x0; flag, or as"):
        read("image,xmin,ymin,xmax,ymax,label\n", columns={"xmin": "x0", "ignored": "flag"})


def test_a_header_with_unknown_names_tells_the_known_ones(read):
    with pytest.raises(
        UserError, match="has no column image, which may be called image or image_path or filename"
    ):
        read("bild,xmin,ymin,xmax,ymax,label\n")


def test_numbers_between_tabs_may_have_a_decimal_comma(read):
    table = read("image\txmin\tymin\txmax\tymax\tlabel\na.png\t1,5\t2\t10,5\t4\ttree\n")
    assert table.boxes.tolist() == [[1.5, 2, 9, 2]]


def test_a_header_that_is_not_understood_names_the_separator(read):
    with pytest.raises(UserError, match=r"image\|xmin\|ymin, is one field; .* by commas, semicolons, tabs$"):
        read("image|xmin|ymin\n")
    with pytest.raises(
        UserError, match=r"the header image, xmin, a \(separated by semicolons\) has no column ymin"
    ):
        read("image;xmin;a\n")
