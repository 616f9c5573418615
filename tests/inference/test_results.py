from __future__ import annotations

import csv
import io
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from focal_d2 import Detections, UserError
from focal_d2.data.readers.csv_file import read_csv
from focal_d2.inference import Detection

BOXES = np.array([[10, 20, 30, 50], [0.126, 5, 40, 60]], np.float32)


def make(source=None, **overrides) -> Detections:
    values = {
        "boxes": BOXES,
        "scores": np.array([0.9, 0.25], np.float32),
        "classes": np.array([1, 0]),
        "class_names": ["car", "tree, old"],
        "height": 60,
        "width": 80,
        "source": source,
    }
    return Detections(**{**values, **overrides})


def empty(source=None) -> Detections:
    return make(source)[:0]


def test_detections_are_a_sequence_of_objects():
    result = make("a.png")
    assert len(result) == 2
    first, second = result
    assert isinstance(first, Detection)
    assert (first.name, first.label, second.name) == ("tree, old", 1, "car")
    assert first.score == pytest.approx(0.9)
    assert result.areas.tolist() == pytest.approx([600, 39.874 * 55])
    assert result.names == ["tree, old", "car"]
    assert repr(result) == "Detections(2 in a.png of 80 × 60 pixels)"
    for part in (result[1], result[1:], result[result.scores < 0.5], result[[1]]):
        assert part.names == ["car"]
        assert (part.height, part.width, part.file) == (60, 80, "a.png")
    assert (len(empty()), list(empty()), empty().names) == (0, [], [])


def test_to_coco_gives_corner_and_size():
    assert make().to_coco(7) == [
        {"image_id": 7, "category_id": 2, "bbox": [10, 20, 20, 30], "score": 0.9},
        {"image_id": 7, "category_id": 1, "bbox": [0.13, 5, 39.87, 55], "score": 0.25},
    ]
    assert empty().to_coco() == []


def test_to_csv_can_be_read_as_annotations(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((60, 80, 3), np.uint8))
    text = make("a.png").to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == text
    assert list(csv.reader(io.StringIO(text))) == [
        ["image", "xmin", "ymin", "xmax", "ymax", "label", "score"],
        ["a.png", "10.0", "20.0", "30.0", "50.0", "tree, old", "0.9"],
        ["a.png", "0.13", "5.0", "40.0", "60.0", "car", "0.25"],
    ]
    table = read_csv(str(tmp_path / "a.csv"), str(tmp_path))
    assert table.boxes.tolist() == [[10, 20, 20, 30], [0.13, 5, pytest.approx(39.87), 55]]
    empty("a.png").to_csv(tmp_path / "b.csv")
    table = read_csv(str(tmp_path / "b.csv"), str(tmp_path), classes=["car"])
    assert (len(table), len(table.boxes)) == (1, 0)
    with pytest.raises(UserError, match="cannot write .*nowhere/a.csv: No such file"):
        make().to_csv(tmp_path / "nowhere/a.csv")


def test_to_supervision_names_every_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    result = make().to_supervision()
    assert result.xyxy.tolist() == BOXES.tolist()
    assert result.class_id.tolist() == [1, 0]
    assert result.confidence.tolist() == pytest.approx([0.9, 0.25])
    assert result.data["class_name"].tolist() == ["tree, old", "car"]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="needs the package supervision .*: pip install supervision"):
        make().to_supervision()


def test_draw_draws_on_the_image_that_the_predictor_had(tmp_path):
    pixels = np.full((60, 80, 3), 90, np.uint8)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), pixels)
    picture = make(pixels).draw(tmp_path / "out.png")
    assert picture.shape == pixels.shape
    assert (pixels == 90).all()
    assert not np.array_equal(picture, pixels)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out.png")), picture)
    np.testing.assert_array_equal(make(path).draw(), picture)
    np.testing.assert_array_equal(make().draw(image=path), picture)
    with pytest.raises(UserError, match="do not know their image"):
        make().draw()
    with pytest.raises(UserError, match="has 40 × 60 pixels, the detections are of one of 80 × 60"):
        make(pixels[:, :40]).draw()
