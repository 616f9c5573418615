from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from focal_d2.analysis.doctor import as_page
from focal_d2.analysis.doctor.page import _thumbnail
from focal_d2.data.checks.findings import Example
from tests.analysis.doctor.test_examination import truncated
from tests.analysis.doctor.world import World

GREY = [205, 208, 212]


def picture(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)


@pytest.fixture
def blue(tmp_path):
    path = tmp_path / "blue.png"
    Image.new("RGB", (400, 300), (0, 0, 255)).save(path)
    return str(path)


def test_thumbnail_without_a_box_is_the_whole_image(blue):
    assert picture(_thumbnail(Example(blue), 10**6)).shape == (150, 200, 3)
    assert picture(_thumbnail(Example(blue, box=(float("nan"), 0, 1, 1)), 10**6)).shape == (150, 200, 3)


def test_thumbnail_shows_the_surroundings_of_a_box_and_where_the_image_ends(blue):
    # 100 × 100 around (400, 150): 200 pixels are shown, but none beyond the box: 300 to 450, 50 to 250.
    shown = picture(_thumbnail(Example(blue, box=(350, 100, 100, 100)), 10**6))
    assert shown.shape == (200, 150, 3)
    np.testing.assert_allclose(shown[10, 10], [0, 0, 255], atol=12)
    np.testing.assert_allclose(shown[10, 130], GREY, atol=12)
    # The box's upper edge, vermillion.
    assert abs(shown[50, 100] - [213, 94, 0]).max() < 60


def test_thumbnail_of_a_large_box_shrinks_it_where_it_is(blue):
    # 300 × 275 pixels from (25, 25), at two thirds of the size.
    shown = picture(_thumbnail(Example(blue, box=(100, 100, 150, 150)), 10**6))
    assert shown.shape == (183, 200, 3)
    for edge in (shown[50, 100], shown[150, 100], shown[100, 50], shown[100, 150]):
        assert abs(edge - [213, 94, 0]).max() < 80


def test_thumbnail_of_a_box_outside_shows_both(blue):
    # 0 to 800 of 300 pixels, a quarter of the size.
    shown = picture(_thumbnail(Example(blue, box=(780, 10, 20, 20)), 10**6))
    assert shown.shape == (75, 200, 3)
    np.testing.assert_allclose(shown[60, 50], [0, 0, 255], atol=12)
    np.testing.assert_allclose(shown[60, 150], GREY, atol=12)


def test_page_of_what_cannot_be_drawn(tmp_path):
    world = World(tmp_path)
    truncated(world)
    for classes in world.classes.values():
        classes[:] = ["$a^$", "<b>", "猫" * 40]
    page = as_page(world.examine(), title="a & b", max_pixels=10**6)
    assert "<title>Doctor: a &amp; b</title>" in page
    assert "image file is truncated" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<img") == 4
    assert not re.search(r'src="(?!data:)', page)


def test_page_without_boxes_has_no_plots(tmp_path):
    world = World(tmp_path)
    for record in world.records["train"]:
        record["annotations"] = []
    page = as_page(world.examine(decode=False), title="", max_pixels=None)
    assert "dataset-empty" in page
    assert "<img" not in page


def test_page_of_many_classes_shows_the_ends(tmp_path):
    world = World(tmp_path)
    for k in range(77):
        world.add_class(f"class {k}")
    page = as_page(world.examine(decode=False), title="", max_pixels=None)
    assert "77 of 80 (96.2 %) classes have no box: class 0, class 1" in page
