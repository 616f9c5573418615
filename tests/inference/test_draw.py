from __future__ import annotations

import itertools

import numpy as np

from focal_d2.inference.draw import (
    COLOURS,
    _font,
    _place,
    _texts,
    draw_detections,
    draw_truth,
    line_width,
)

GREY = np.full((200, 300, 3), 128, np.uint8)


def draw(boxes, classes=None, names=("a", "b"), image=GREY, **options):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    classes = np.zeros(len(boxes), int) if classes is None else np.asarray(classes)
    return draw_detections(image, boxes, np.full(len(boxes), 0.5), classes, names, **options)


def has_colour(picture: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(rgb[::-1])).all(axis=2).any())


def test_each_class_has_its_colour():
    picture = draw([[20, 40, 120, 140], [160, 40, 280, 140]], [0, 1])
    assert has_colour(picture[:, :140], COLOURS[0])
    assert has_colour(picture[:, 140:], COLOURS[1])
    assert not has_colour(picture[:, :140], COLOURS[1])
    assert has_colour(draw([[20, 40, 120, 140]], [len(COLOURS) + 1], ["x"] * 9), COLOURS[1])
    assert has_colour(draw([[20, 40, 120, 140]], colour=(1, 2, 3)), (1, 2, 3))


def test_colours_stay_apart_for_colour_blind_people():
    # Machado, Oliveira and Fernandes (2009), severity 1.
    protanopia = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    deuteranopia = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    linear = (np.array(COLOURS) / 255) ** 2.2
    for matrix in (protanopia, deuteranopia):
        seen = (linear @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2) * 255
        nearest = min(float(np.abs(a - b).max()) for a, b in itertools.combinations(seen, 2))
        assert nearest > 25


def test_lines_grow_with_the_image():
    assert [line_width(side, side) for side in (64, 400, 1000, 4000)] == [1, 2, 3, 8]


def test_draw_takes_no_boxes_and_boxes_beyond_the_image():
    np.testing.assert_array_equal(draw([]), GREY)
    assert draw([[-1e9, -50, 1e9, 500], [290, 190, 400, 300]]).shape == GREY.shape
    tiny = np.zeros((1, 1, 3), np.uint8)
    assert draw([[0, 0, 1, 1]], image=tiny).shape == tiny.shape


def places(boxes, texts, size=(200, 300)):
    font = _font(10)
    return _place(
        [x if isinstance(x, tuple) else (x,) for x in texts], np.asarray(boxes).tolist(), font, 1, *size
    )


def test_labels_stay_where_there_is_room():
    narrow = places([[50, 50, 60, 120]], ["a long name 0.50"])
    assert narrow == [None]
    shorter = places([[50, 50, 90, 120]], [("a long name 0.50", "0.50")])[0]
    assert shorter is not None
    assert shorter.text == "0.50"
    inside = places([[50, 0, 150, 120]], ["tree 0.50"])[0]  # no room above
    assert inside is not None
    assert inside.top >= 0
    at_edge = places([[240, 50, 330, 120]], ["tree 0.50"])[0]
    assert at_edge is not None
    assert at_edge.right <= 300


def test_labels_of_many_boxes_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 150, (60, 2))
    boxes = np.hstack([corners, corners + rng.integers(20, 60, (60, 2))])
    labels = [x for x in places(boxes, ["0.50"] * 60) if x is not None]
    assert 5 < len(labels) < 60
    assert not any(a.covers(b) for a, b in itertools.combinations(labels, 2))
    assert places(boxes, ["0.50"] * 60)[0] is not None  # the best one comes first


def test_texts_have_what_tells_detections_apart():
    scores = np.array([0.876, 0.5])
    assert _texts(scores, [0, 1], ["tree", "a\x1b[31m"]) == [
        ("tree 0.88", "0.88"),
        ("a\\x1b[31m 0.50", "0.50"),
    ]
    assert _texts(scores, [0, 0], ["tree"]) == [("0.88",), ("0.50",)]
    assert _texts(None, [0, 1], ["tree", "car"]) == [("tree",), ("car",)]
    assert _texts(None, [0], [""]) == [()]


def test_truth_is_drawn_on_the_left():
    image = np.zeros((40, 40, 3), np.uint8)
    picture = draw_truth(image, np.array([[5, 5, 20, 30]]), image)
    assert picture.shape == (40, 88, 3)
    assert picture[:, :40].max() > 200
    assert picture[:, 48:].max() == image.max() == 0
