from __future__ import annotations

import cv2
import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.data.readers import image_folder, read_yolo

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


@pytest.mark.parametrize(
    "place, text, source",
    [
        ("classes.txt", "x\ny\n", "classes.txt"),
        ("labels/obj.names", "x\ny\n", "labels/obj.names"),
        ("data.yaml", "names: [x, y]\ntrain: images\n", "data.yaml"),
    ],
)
def test_class_names_are_found_beside_and_above_the_labels(folder, place, text, source):
    (folder / place).write_text(text)
    (folder / "labels/below/c.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    table = read(folder)
    assert table.classes == ("x", "y")
    assert table.notes == [f"{folder}/labels: the class names are those of {folder}/{source}"]
    # Roboflow: data.yaml is above train/labels; others: above data/labels/train.
    table = read_yolo(str(folder / "labels/below"), str(folder / "images/below"))
    assert table.classes == ("x", "y")


def test_classes_that_are_numbers_are_told(folder):
    (folder / "data.yaml").write_text("services: [x]")
    (folder / "labels/a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    table = read(folder)
    assert table.classes == ("0", "1")
    assert "no class names found; the classes are numbers" in table.notes[0]


# Box and three keypoints; the last is not seen.
POSE = ["0 0.5 0.5 0.2 0.4 0.45 0.4 0.55 0.6 0 0", "0 0.2 0.3 0.2 0.4 0.15 0.2 0.25 0.4 0.2 0.3"]


def test_boxes_with_keypoints_are_told_from_polygons(folder):
    (folder / "labels/a.txt").write_text("\n".join(POSE))
    table = read(folder, classes=["x"])
    assert table.boxes.tolist() == pytest.approx(np.array([[256, 128.1, 128, 170.8], [64, 42.7, 128, 170.8]]))
    assert "lines have 10 numbers after the class: they are read as a box and keypoints" in table.notes[0]
    # With a third number for each keypoint, whether it is seen.
    pose = [" ".join([*row.split()[:5], "0.45", "0.4", "2", "0.5", "0.45", "1"]) for row in POSE[:1]]
    (folder / "labels/a.txt").write_text("\n".join(pose))
    assert read(folder, classes=["x"], rows="keypoints").boxes[0, 2:].tolist() == pytest.approx([128, 170.8])


def test_numbers_beyond_shares_are_flags_of_keypoints(folder):
    """Two to a point would make 18 numbers, too; 2 says that a keypoint is seen."""
    rows = [
        "0 0.2 0.3 0.2 0.4 0.15 0.2 2 0.25 0.4 2 0.2 0.3 1 0.21 0.3 0",
        "0 0.9 0.5 0.1 0.2 0.87 0.5 2 0.9 0.45 2 0.92 0.5 1 0 0 0",
    ]
    (folder / "labels/a.txt").write_text("\n".join(rows))
    table = read(folder, classes=["x"])
    assert table.boxes[:, 2].tolist() == pytest.approx([128, 64])
    assert "lines have 16 numbers after the class: they are read as a box and keypoints" in table.notes[0]


def test_polygons_of_four_corners_are_no_keypoints(folder):
    rng = np.random.default_rng(0)
    centres = rng.uniform(0.3, 0.7, (50, 1, 2))
    corners = centres + 0.05 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    rows = [" ".join(["0", *(f"{x:.6f}" for x in row)]) for row in corners.reshape(50, 8)]
    (folder / "labels/a.txt").write_text("\n".join(rows))
    table = read(folder, classes=["x"])
    assert table.boxes[:, 2] == pytest.approx(np.full(50, 64), abs=0.01)
    assert not table.notes


def test_lines_that_may_be_either_are_refused_unless_the_user_says(folder):
    # A small square in the middle of the image: as a box and two points, both lie in the box.
    (folder / "labels/a.txt").write_text("0 0.5 0.5 0.52 0.5 0.52 0.52 0.5 0.52\n")
    with pytest.raises(UserError, match="lines with 8 numbers .* set ROWS to polygons or keypoints"):
        read(folder, classes=["x"])
    polygon, box = (read(folder, classes=["x"], rows=rows).boxes[0] for rows in ("polygons", "keypoints"))
    assert polygon.tolist() == pytest.approx([320, 213.5, 12.8, 8.54])
    assert box.tolist() == pytest.approx([0.5 * 640 - 0.26 * 640, 0.25 * 427, 0.52 * 640, 0.5 * 427])


def pose_lines(count, keypoints):
    """Boxes that are small and far from the origin, with keypoints in them."""
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.05, 0.2, (count, 2))])
    shares = rng.uniform(-0.4, 0.4, (count, keypoints, 2))
    points = boxes[:, None, :2] + shares * boxes[:, None, 2:]
    return [
        " ".join(["0", *(f"{x:.6f}" for x in row)])
        for row in np.column_stack([boxes, points.reshape(count, -1)])
    ]


@pytest.mark.parametrize("odd", ["0 0.5 0.5 0.2 0.2", pose_lines(1, 16)[0]], ids=["no keypoints", "one less"])
@pytest.mark.parametrize("at_end", [True, False])
def test_a_line_of_another_length_makes_no_polygons_of_keypoints(folder, odd, at_end):
    lines = pose_lines(20, 17)
    lines.insert(len(lines) if at_end else 0, odd)
    (folder / "labels/a.txt").write_text("\n".join(lines))
    place = f"line {21 if at_end else 1}"
    message = rf"lines with 38 numbers .* set ROWS to polygons or keypoints; .*a\.txt: {place} has "
    with pytest.raises(UserError, match=message):
        read(folder, classes=["x"])
    table = read(folder, classes=["x"], rows="keypoints")
    assert len(table.boxes) == 21
    assert table.boxes[:, 2].max() < 0.21 * WIDTH


def test_boxes_among_polygons_do_not_make_keypoints_of_them(folder):
    """Two polygons away from the middle, of different lengths, among boxes: they can hold no keypoints."""
    lines = ["0 0.5 0.5 0.2 0.2"] * 5 + ["0 0.8 0.8 0.9 0.8 0.9 0.9", "0 0.1 0.8 0.2 0.8 0.2 0.9 0.1 0.9"]
    (folder / "labels/a.txt").write_text("\n".join(lines))
    assert read(folder, classes=["x"]).boxes[5:, 2].tolist() == pytest.approx([64, 64])
    # In the middle, two lengths decide.
    lines[5:] = ["0 0.5 0.5 0.52 0.5 0.52 0.52", "0 0.5 0.5 0.52 0.5 0.52 0.52 0.5 0.52"]
    (folder / "labels/a.txt").write_text("\n".join(lines))
    assert read(folder, classes=["x"]).boxes[5:, 2].tolist() == pytest.approx([12.8, 12.8])


def test_a_class_is_compared_without_a_walk_over_all_classes(folder, monkeypatch):
    """A float in a range is looked for number by number: 100,000 lines took half a minute."""
    monkeypatch.setattr("focal_d2.data.readers.yolo._MOST_CLASSES", 10**15)
    (folder / "labels/a.txt").write_text(
        "3 0.5 0.5 0.2 0.2\n999999999999999.5 0.5 0.5 0.2 0.2\nnan 0 0 1 1\n"
    )
    table = read(folder)
    assert table.labels.tolist() == [3]
    assert ["it must be from 0 to 999999999999999" in problem for problem in table.problems] == [True, True]


def test_kpt_shape_decides(folder):
    square = "0 0.5 0.5 0.52 0.5 0.52 0.52 0.5 0.52"
    (folder / "labels/a.txt").write_text(f"{square}\n{square} 0.5\n0 0.5 0.5 0.1 0.1\n")
    (folder / "data.yaml").write_text("names: [x]\nkpt_shape: [2, 2]\n")
    table = read(folder)
    assert table.boxes[:, 2].tolist() == pytest.approx([0.52 * 640, 64])
    assert "line 2: 9 numbers after the class; by kpt_shape they must be 8" in table.problems[0]


@pytest.fixture
def data_file(folder):
    """What Roboflow writes: data.yaml beside train and valid, and ../ before them."""
    for split, image in (("train", "a.png"), ("valid", "b.png")):
        (folder / split / "labels").mkdir(parents=True)
        (folder / split / "images").mkdir()
        (folder / "images" / image).rename(folder / split / "images" / image)
        (folder / split / "labels" / image).with_suffix(".txt").write_text("1 0.5 0.5 0.5 0.5\n")
    path = folder / "data.yaml"
    path.write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['x', 'y']\n")
    return path


def test_a_data_file_is_a_dataset(data_file):
    for split, image in (("train", "train/images/a.png"), ("val", "valid/images/b.png")):
        table = read_yolo(str(data_file), str(data_file.parent), split=split)
        assert table.file_names == [str(data_file.parent / image)]
        assert table.boxes.tolist() == [[160, 106.75, 320, 213.5]]
        assert (table.classes, table.labels.tolist()) == (("x", "y"), [1])
        assert not table.problems
    with pytest.raises(UserError, match=r"data\.yaml: SPLIT is test; the file has train, val$"):
        read_yolo(str(data_file), "", split="test")


@pytest.mark.parametrize(
    "content, lists",
    [
        ("path: PLACE\ntrain: train/images\nnames: {0: x, 1: y}", {}),
        ("path: /content/elsewhere\ntrain: train/images\nnames: {0: x, 1: y}", {}),
        ("path: .\ntrain: [train/images, valid/images]\nnames: [x, y]", {}),
        ("train: list.txt\nnames: [x, y]", {"list.txt": "./train/images/a.png\n"}),
        ("train: list.txt\nnames: [x, y]", {"list.txt": "/content/data/train/images/a.png\n"}),
        ("train: train/list.txt\nnames: [x, y]", {"train/list.txt": "images/a.png\ntrain\\images\\a.png\n"}),
    ],
)
def test_images_of_a_data_file_are_found(data_file, content, lists):
    data_file.write_text(content.replace("PLACE", str(data_file.parent)))
    for name, text in lists.items():
        (data_file.parent / name).write_text(text)
    table = read_yolo(str(data_file), str(data_file.parent), split="train")
    images = ["train/images/a.png", *(["valid/images/b.png"] if "[train" in content else [])]
    assert table.file_names == [str(data_file.parent / name) for name in images]
    assert len(table.boxes) == len(images)
    assert not table.problems


def test_a_split_may_have_any_name(data_file):
    data_file.write_text("Train: Train.txt\nkpt_shape: [1, 2]\nnames: {0: x}\npath: .\n")
    (data_file.parent / "Train.txt").write_text("data/train/images/a.png\n")
    (data_file.parent / "train/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5 0.4 0.4\n")
    table = read_yolo(str(data_file), "", split="Train")
    assert table.boxes.tolist() == [[160, 106.75, 320, 213.5]]
    with pytest.raises(UserError, match=r"data\.yaml: SPLIT is train; the file has Train$"):
        read_yolo(str(data_file), "", split="train")


def test_a_split_that_is_not_there_is_named(data_file):
    data_file.write_text("path: /content/x\ntrain: no/images\nnames: [x]")
    with pytest.raises(UserError, match=r"data\.yaml: train: 'no/images' is not there; it was looked for in"):
        read_yolo(str(data_file), "", split="train")


def test_labels_of_a_data_file_without_an_image_are_a_mistake(data_file):
    (data_file.parent / "train/labels/q.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (data_file.parent / "train/labels/README.txt").write_text("made by hand\n")
    (problem,) = read_yolo(str(data_file), "", split="train").problems
    assert "train/labels/q.txt: no image of that name" in problem


def test_places_of_a_data_file_are_texts(data_file):
    for key, rest in (("train", ""), ("path", "train: train\n")):
        data_file.write_text(f"names: [x]\n{rest}{key}: [[x]]")
        with pytest.raises(UserError, match=rf"data\.yaml: {key} is .* it must be a path"):
            read_yolo(str(data_file), "", split="train")


def test_aliases_of_a_data_file_are_bounded(data_file):
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    data_file.write_text("\n".join([*rows, "names: [x]", "train: [*a11]"]))
    with pytest.raises(UserError, match=r"data\.yaml, line \d+: more than 100000 values"):
        read_yolo(str(data_file), "", split="train")


@pytest.mark.parametrize("count, warnings", [(2, 0), (3, 1)])
def test_a_number_of_classes_that_is_not_that_of_the_names_is_a_warning(data_file, count, warnings):
    data_file.write_text(f"train: train/images\nnc: {count}\nnames: [x, y]\n")
    for table in (
        read_yolo(str(data_file), "", split="train"),
        read_yolo(str(data_file.parent / "train/labels"), str(data_file.parent / "train/images")),
    ):
        assert table.classes == ("x", "y")
        assert len(table.warnings) == warnings
        assert all("data.yaml: nc is 3, but names has 2 classes" in text for text in table.warnings)


def test_a_split_is_no_image(data_file):
    data_file.write_text("train: train/images/a.png\nnames: [x]\n")
    with pytest.raises(
        UserError, match=r"data\.yaml: train: 'train/images/a\.png' is an image; it must be a folder"
    ):
        read_yolo(str(data_file), "", split="train")


def test_a_folder_without_images_is_named(data_file):
    (data_file.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"train/labels: no images in .*/empty$"):
        read_yolo(str(data_file.parent / "train/labels"), str(data_file.parent / "empty"))
    data_file.write_text("train: empty\nnames: [x]\n")
    with pytest.raises(UserError, match=r"data\.yaml: train: no images in empty$"):
        read_yolo(str(data_file), "", split="train")


def test_a_folder_of_everything_is_refused(tmp_path, monkeypatch):
    """A data.yaml can name any folder: of / all files would be listed."""
    (tmp_path / "a/b").mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"a/b/{i}.png").touch()
    for limit, most in (("MOST_FILES", 4), ("MOST_FOLDERS", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(image_folder, limit, most)
            assert len(image_folder.list_files(str(tmp_path), (".png",))) == 4
            patch.setattr(image_folder, limit, most - 1)
            with pytest.raises(UserError, match="files or .* folders are in it"):
                image_folder.list_files(str(tmp_path), (".png",))
