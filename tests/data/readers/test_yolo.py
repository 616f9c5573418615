from __future__ import annotations

import cv2
import numpy as np
import pytest

from focal_d2.data.readers import read_yolo

WIDTH, HEIGHT = 640, 427


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "below/c.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    (tmp_path / "labels/below").mkdir(parents=True)
    return tmp_path


def read(folder, **options):
    return read_yolo(str(folder / "labels"), str(folder / "images"), **options)


def test_whole_pixels_come_back_from_six_digits(folder):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, (WIDTH, HEIGHT), (300, 2))
    boxes = np.column_stack([corners, rng.integers(1, (WIDTH + 1, HEIGHT + 1) - corners)])
    centres = (boxes[:, :2] + boxes[:, 2:] / 2) / (WIDTH, HEIGHT)
    lines = np.column_stack([centres, boxes[:, 2:] / (WIDTH, HEIGHT)])
    text = "\n".join("0 " + " ".join(f"{x:.6f}" for x in line) for line in lines)
    (folder / "labels/a.txt").write_text(text)
    assert read(folder, classes=["x"]).boxes.tolist() == boxes.tolist()


def test_fractions_of_a_pixel_stay(folder):
    # 0.25 px of 640 is 0.000390625; six digits are off by at most 0.0000005 × 640 = 0.0003 px.
    (folder / "labels/a.txt").write_text("0 0.5 0.5 0.000390625 0.5\n")
    box = read(folder, classes=["x"]).boxes[0]
    assert box.tolist() == [319.875, 106.75, 0.25, 213.5]


def test_few_digits_are_not_taken_for_whole_pixels(folder):
    # Two digits could mean any of six pixels: 0.13 × 640 = 83.2.
    (folder / "labels/a.txt").write_text("0 0.13 0.5 0.2 0.2\n")
    left, _, width, _ = read(folder, classes=["x"]).boxes[0]
    assert left == pytest.approx(83.2 - 64)
    assert width == pytest.approx(128)


def test_a_polygon_is_its_extent(folder):
    (folder / "labels/a.txt").write_text("0 0.25 0.5 0.75 0.0 0.5 1.0\n")
    assert read(folder, classes=["x"]).boxes.tolist() == [[160, 0, 320, 427]]


def test_folders_below_and_images_without_labels(folder):
    (folder / "labels/below/c.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    table = read(folder, classes=["x", "y"])
    assert [name.split("images/")[1] for name in table.file_names] == ["a.png", "b.png", "below/c.png"]
    assert table.image.tolist() == [2]
    assert not table.problems


def test_classes_txt_names_the_classes(folder):
    (folder / "labels/classes.txt").write_text("x\ny\nz\n")
    (folder / "labels/a.txt").write_text("2 0.5 0.5 0.5 0.5\n")
    table = read(folder)
    assert table.classes == ("x", "y", "z")
    assert table.labels.tolist() == [2]


def test_without_names_a_number_stands_for_itself(folder):
    (folder / "labels/a.txt").write_text("3 0.5 0.5 0.5 0.5\n1.0 0.5 0.5 0.5 0.5\n")
    table = read(folder)
    assert table.classes == ("0", "1", "2", "3")
    assert table.labels.tolist() == [3, 1]


def test_only_chosen_images_are_read_and_once(folder):
    chosen = ["b.png", str(folder / "images/b.png"), "./b.png"]
    (folder / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "labels/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    table = read(folder, classes=["x"], chosen=chosen)
    assert len(table) == len(table.boxes) == 1
    assert not table.problems
