from __future__ import annotations

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_d2 import UserError
from focal_d2.data.embedded.neon_trees import Recipe, Tile, boxes_in, prepare, tiles_of

PICTURES = {
    "2019_YELL_2_528000_4978000_image_crop2": (1000, 900),
    "2019_YELL_2_541000_4977000_image_crop": (800, 620),
    "OSBS_029": (400, 400),
    "SOAP_061": (400, 400),
}
VOC_OBJECT = (
    "<object><name>Tree</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel like deepforest's, with small noise pictures and one box in every 100 pixels."""
    path = tmp_path / "deepforest.whl"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, (width, height) in PICTURES.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            _, png = cv2.imencode(".png", pixels)
            archive.writestr(f"deepforest/data/{name}.png", png.tobytes())
            objects = "".join(
                VOC_OBJECT.format(x + 1, y + 1, x + 40, y + 40)
                for x in range(0, width, 100)
                for y in range(0, height, 100)
            )
            archive.writestr(f"deepforest/data/{name}.xml", f"<annotation>{objects}</annotation>")
    return path


def load(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text())


def test_prepare_writes_tiles_and_coco_annotations(wheel, tmp_path):
    folder = prepare(tmp_path / "datasets", wheel)
    for split in ("train", "val", "test", "other"):
        coco = load(folder, split)
        assert coco["categories"] == [{"id": 1, "name": "tree"}]
        sizes = {}
        for image in coco["images"]:
            pixels = cv2.imread(str(folder / split / image["file_name"]))
            assert pixels.shape[:2] == (image["height"], image["width"])
            sizes[image["id"]] = (image["width"], image["height"])
        assert coco["annotations"]
        for annotation in coco["annotations"]:
            x, y, w, h = annotation["bbox"]
            width, height = sizes[annotation["image_id"]]
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height
            assert annotation["area"] == w * h >= 40 * 40 * 0.5


def test_prepare_cuts_pixels_where_it_says(wheel, tmp_path):
    folder = prepare(tmp_path / "datasets", wheel)
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("deepforest/data/2019_YELL_2_528000_4978000_image_crop2.png")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    names = sorted((folder / "train").glob("2019_YELL_2_528000*"))
    x, y = (int(v) for v in names[1].stem.split("_")[-2:])
    assert np.array_equal(cv2.imread(str(names[1])), picture[y : y + 400, x : x + 400])


@pytest.mark.parametrize("width, height", [(2299, 2472), (1249, 1035), (1000, 900)])
def test_splits_share_no_place(width, height):
    train, val, test = (tiles_of(split, width, height, Recipe()) for split in ("train", "val", "test"))
    assert max(t.right for t in (*train, *val)) <= 0.65 * width
    assert min(t.left for t in test) >= int(0.67 * width)
    assert max(t.bottom for t in train) <= 0.73 * height
    assert min(t.top for t in val) >= int(0.75 * height)
    assert all(t.right - t.left == t.bottom - t.top == 400 for t in train)
    assert {t.top for t in train} >= {0, int(0.73 * height) - 400}
    areas = [(val, slice(0, int(0.65 * width)), slice(int(0.75 * height), height))]
    areas += [(test, slice(int(0.67 * width), width), slice(0, height))]
    for tiles, columns, rows in areas:
        seen = np.zeros((height, width), dtype=int)
        for tile in tiles:
            seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert seen.max() == 1  # no pixel counts twice
        assert seen[rows, columns].min() == 1  # and none is left out


@pytest.mark.parametrize("split", ["val", "test"])
def test_whole_pictures_show_the_place_of_the_tiles(split):
    tiles = tiles_of(split, 2299, 2472, Recipe())
    (whole,) = tiles_of(f"{split}_whole", 2299, 2472, Recipe())
    assert whole == (
        min(t.left for t in tiles),
        min(t.top for t in tiles),
        max(t.right for t in tiles),
        max(t.bottom for t in tiles),
    )


def test_test_tiles_are_those_of_the_first_recipe():
    # Results that were measured before there was a validation split can be compared on this set.
    tiles = tiles_of("test", 1249, 1035, Recipe())
    assert tiles == [Tile(836, 0, 1249, 345), Tile(836, 345, 1249, 690), Tile(836, 690, 1249, 1035)]


def test_boxes_in_keeps_what_is_half_visible():
    boxes = np.array([[0, 0, 10, 10], [95, 0, 105, 10], [96, 0, 106, 10], [120, 50, 140, 60]], float)
    kept = boxes_in(Tile(100, 0, 200, 100), boxes, min_visible=0.5)
    assert kept.tolist() == [[0, 0, 5, 10], [0, 0, 6, 10], [20, 50, 40, 60]]


def test_prepare_is_done_once_until_the_recipe_changes(wheel, tmp_path):
    folder = prepare(tmp_path / "datasets", wheel)
    marker = folder / "train" / "marker"
    marker.touch()
    prepare(tmp_path / "datasets", tmp_path / "no such wheel")
    assert marker.exists()
    prepare(tmp_path / "datasets", wheel, Recipe(train_stride=100))
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["test.json", "train.json"])
def test_prepare_mends_a_damaged_cache(wheel, tmp_path, damage):
    folder = prepare(tmp_path / "datasets", wheel)
    (folder / damage).unlink()
    prepare(tmp_path / "datasets", wheel)
    assert (folder / damage).is_file()


@pytest.mark.parametrize("content", [None, b"not a zip", "empty"])
def test_prepare_with_a_bad_wheel_leaves_nothing(tmp_path, content):
    wheel = tmp_path / "bad.whl"
    if content == "empty":
        zipfile.ZipFile(wheel, "w").close()
    elif content is not None:
        wheel.write_bytes(content)
    with pytest.raises(UserError, match="bad.whl"):
        prepare(tmp_path / "datasets", wheel)
    assert [p.name for p in (tmp_path / "datasets").iterdir()] == [".neon_trees.lock"]


def test_datasets_are_registered_with_their_class():
    for split in ("train", "val", "test", "other"):
        assert f"neon_trees_{split}" in DatasetCatalog.list()
        assert MetadataCatalog.get(f"neon_trees_{split}").thing_classes == ["tree"]
