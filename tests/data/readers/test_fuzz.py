"""Readers on input that nobody would write: a table, or one line that names the file."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_d2 import UserError
from focal_d2.data import Table
from focal_d2.data.readers import READERS
from focal_d2.data.readers.rows import MOST_PIXELS

NAMES = {"coco": "x.json", "csv": "x.csv", "voc": "x.xml", "yolo": "a.txt"}
SEEDS = {
    "coco": '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 8}], "annotations": [{'
    '"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}], '
    '"categories": [{"id": 1, "name": "x"}]}',
    "csv": "image,xmin,ymin,xmax,ymax,label\na.png,1,2,3,4,x\n",
    "voc": "<annotation><filename>a.png</filename><size><width>9</width><height>8</height></size><object>"
    "<name>x</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>",
    "yolo": "0 0.5 0.5 0.25 0.25\n",
}
deterministic = settings(derandomize=True, max_examples=150, deadline=None, database=None)


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        cv2.imwrite(f"{folder}/images/a.png", np.zeros((8, 9, 3), np.uint8))
        yield Path(folder)


def check(root: Path, style: str, data: bytes) -> None:
    folder = root / style
    folder.mkdir(exist_ok=True)
    path = folder / NAMES[style]
    path.write_bytes(data)
    source = str(path if style in ("coco", "csv") else folder)
    try:
        table = READERS[style](source, str(root / "images"))
    except UserError as error:
        lines = [str(error)]
    else:
        lines = table.problems
        assert_whole(table)
    for line in lines:
        assert source in line
        assert len(line.split(source, 1)[1]) < 600
        assert "\n" not in " ".join(line.split())


def assert_whole(table: Table) -> None:
    boxes = len(table.boxes)
    assert table.boxes.shape == (boxes, 4)
    assert {len(x) for x in (table.image, table.labels, table.ignored, table.areas)} == {boxes}
    assert {len(x) for x in (table.image_ids, table.sizes)} == {len(table)}
    assert np.isfinite(table.boxes).all()
    assert np.isfinite(table.areas).all()
    assert (table.boxes[:, 2:] >= 0).all()
    assert (np.abs(table.boxes) <= MOST_PIXELS).all()
    assert ((table.labels >= 0) & (table.labels < len(table.classes))).all()
    assert (np.diff(table.image) >= 0).all()
    assert len(table.records()) == len(table)


@pytest.mark.parametrize("style", READERS)
@given(data=st.binary(max_size=200))
@deterministic
def test_any_bytes(root, style, data):
    check(root, style, data)


@pytest.mark.parametrize("style", READERS)
@given(data=st.data())
@deterministic
def test_a_good_file_with_a_piece_replaced(root, style, data):
    good = SEEDS[style].encode()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 20)))
    piece = data.draw(
        st.one_of(
            st.binary(max_size=8),
            st.text(max_size=8).map(str.encode),
            st.sampled_from(
                [b"NaN", b"-1", b"1e999", b"null", b'"', b"[]", b"\0", b"..", b"9" * 30, b"<", b","]
            ),
        )
    )
    check(root, style, good[:start] + piece + good[end:])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@deterministic
def test_coco_with_any_values(root, data):
    content = json.loads(SEEDS["coco"])
    for section in content.values():
        for item in [*section]:
            keys = data.draw(st.lists(st.sampled_from(sorted(item)), max_size=2, unique=True))
            section.append({**item, **{key: data.draw(JSON) for key in keys}})
    check(root, "coco", json.dumps(content).encode())


@pytest.mark.parametrize("style", ["csv", "voc", "yolo"])
@given(values=st.lists(st.floats() | st.integers() | st.text(max_size=5), min_size=5, max_size=5))
@deterministic
def test_lines_with_any_values(root, style, values):
    text = {
        "csv": "a.png,{},{},{},{},{}\n",
        "voc": SEEDS["voc"].replace(">1<", ">{}<").replace(">2<", ">{}<").replace(">3<", ">{}<")
        .replace(">4<", ">{}<").replace(">x<", ">{}<"),
        "yolo": "{} {} {} {} {}\n",
    }[style]  # fmt: skip
    check(root, style, text.format(*values).encode())


@given(
    numbers=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    digits=st.integers(1, 17),
)
@deterministic
def test_yolo_boxes_are_within_the_texts_rounding(root, numbers, digits):
    texts = [f"{x:.{digits}f}" for x in numbers]
    (root / "yolo").mkdir(exist_ok=True)
    (root / "yolo/a.txt").write_text("0 " + " ".join(texts))
    table = READERS["yolo"](str(root / "yolo"), str(root / "images"))
    x, y, w, h = map(float, texts)
    rounding = 0.75 * 10.0**-digits
    for edge, exact, side in zip(
        (*table.boxes[0, :2], *(table.boxes[0, :2] + table.boxes[0, 2:])),
        ((x - w / 2) * 9, (y - h / 2) * 8, (x + w / 2) * 9, (y + h / 2) * 8),
        (9, 8, 9, 8),
        strict=True,
    ):
        assert math.isclose(edge, exact, abs_tol=rounding * side + 1e-8)
