from __future__ import annotations

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.data.pictures import draw_boxes, draw_detections, list_images, picture_files, write_picture
from tests.conftest import REPOSITORY


def test_draw_boxes_leaves_the_image_alone():
    image = np.zeros((40, 40, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[5, 5, 20, 30]]), color=(0, 0, 255))
    assert image.max() == 0
    assert drawn[5, 10, 2] > 200
    assert drawn[20, 5, 2] > 200
    assert drawn[:, :, :2].max() == 0
    assert drawn[15, 10].max() == 0


def test_draw_detections_puts_truth_on_the_left():
    image = np.zeros((40, 40, 3), np.uint8)
    box, none = np.array([[5, 5, 20, 30]]), np.zeros((0, 4))
    assert draw_detections(image, box, None).shape == (40, 40, 3)
    picture = draw_detections(image, none, box)
    assert picture.shape == (40, 88, 3)
    assert picture[:, :40].max() > 200
    assert picture[:, 48:].max() == 0


def test_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/a\.png: No such file or directory"):
        write_picture(tmp_path / "gone" / "a.png", np.zeros((4, 4, 3), np.uint8))


def test_opencv_is_given_no_file_to_write():
    # Its imwrite ends the process for a name that is not UTF-8.
    files = [p for room in ("focal_d2", "examples") for p in (REPOSITORY / room).rglob("*.py")]
    assert len(files) > 100
    assert not [p for p in files if "cv2.imwrite(" in p.read_text()]


def test_list_images_takes_images_only_in_order(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_list_images_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no images"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="no such"):
        list_images(tmp_path / "nowhere")


def test_images_of_one_name_in_two_folders_get_pictures_each(tmp_path):
    paths = [tmp_path / name for name in ("a/1.jpg", "b/1.jpg", "b/1.png", "c/2.jpg")]
    names = [target.name for target in picture_files(paths, tmp_path / "out")]
    assert names == ["1_jpg_1.png", "1_jpg_2.png", "1_png.png", "2.png"]


def test_a_link_to_itself_is_an_image_like_any_other(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    assert picture_files([tmp_path / "a.png"], tmp_path / "out") == [tmp_path / "out/a.png"]
