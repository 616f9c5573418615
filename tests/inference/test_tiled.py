"""Pictures in tiles, with a model that detects bright squares: it needs no training."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from focal_d2 import Predictor, UserError
from focal_d2.data import register_datasets
from focal_d2.engine.trainer import FocalTrainer
from tests.conftest import make_cfg

SIDE = 12  # of a square


def squares(height, width, count, seed=0):
    """A black picture with white squares that do not touch, and their boxes."""
    rng = np.random.default_rng(seed)
    picture, boxes = np.zeros((height, width, 3), np.uint8), []
    while len(boxes) < count:
        x, y = rng.integers(0, [width - SIDE, height - SIDE])
        if not picture[max(0, y - 2) : y + SIDE + 2, max(0, x - 2) : x + SIDE + 2].any():
            picture[y : y + SIDE, x : x + SIDE] = 255
            boxes.append([x, y, x + SIDE, y + SIDE])
    return picture, np.array(boxes, np.float32)


def find_squares(batch):
    """What `FocalRetinaNet.forward` returns, from connected bright pixels."""
    results = []
    for sample in batch:
        bright = (sample["image"][0] > 127).numpy().astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(bright)
        x, y, width, height = stats[1:, :4].astype(np.float32).T
        scale = torch.tensor([sample["width"] / bright.shape[1], sample["height"] / bright.shape[0]] * 2)
        boxes = torch.from_numpy(np.stack([x, y, x + width, y + height], 1)) * scale
        scores = torch.linspace(0.9, 0.5, len(boxes))
        size = (sample["height"], sample["width"])
        classes = torch.zeros(len(boxes), dtype=torch.int64)
        results.append(
            {"instances": Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)}
        )
    return results


@pytest.fixture
def make_predictor(tmp_path):
    def make(**overrides):
        tiles = {"ENABLED": True, "WINDOW": 128, "OVERLAP": 0} | overrides.pop("tiles", {})
        cfg = make_cfg(
            MODEL__WEIGHTS=str(tmp_path / "model.pth"),
            **{f"TEST__FOCAL__TILES__{key}": value for key, value in tiles.items()},
            **overrides,
        )
        torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
        predictor = Predictor(cfg, threshold=0.1)
        predictor.model.forward = find_squares
        return predictor

    return make


def assert_found(boxes, expected):
    assert sorted(map(tuple, boxes.round(3).tolist())) == sorted(map(tuple, expected.tolist()))


@pytest.mark.parametrize("merge", ["nms", "fuse"])
def test_predictor_finds_every_square_of_a_large_picture(make_predictor, merge):
    predictor = make_predictor(tiles={"OVERLAP": 128, "WINDOW": 256, "MERGE": merge})
    done = []
    predictor.progress = lambda tiles, of: done.append((tiles, of))
    picture, boxes = squares(700, 1100, 300)
    result = predictor(picture)
    assert_found(result.boxes, boxes)
    assert (result.height, result.width) == (700, 1100)
    assert done[-1] == (40, 40)


def test_tiles_are_resized_as_training_images_were(make_predictor):
    predictor = make_predictor(tiles={"WINDOW": 64, "OVERLAP": 16}, INPUT__MIN_SIZE_TEST=128)
    shapes = set()
    find = predictor.model.forward
    predictor.model.forward = lambda batch: (shapes.update(x["image"].shape for x in batch), find(batch))[1]
    picture, boxes = squares(150, 100, 20)
    found = predictor(picture).boxes
    assert (3, 128, 128) in shapes
    assert len(found) == len(boxes)
    for box in boxes:
        assert np.abs(found - box).max(1).min() <= 1


def test_a_list_of_pictures_and_of_files(make_predictor, tmp_path):
    predictor = make_predictor(tiles={"WINDOW": 128, "OVERLAP": 0})
    first, second = squares(100, 90, 10), squares(60, 128, 5, seed=1)
    cv2.imwrite(str(tmp_path / "a.png"), first[0])
    results = predictor([str(tmp_path / "a.png"), second[0]])
    assert_found(results[0].boxes, first[1])
    assert_found(results[1].boxes, second[1])


def test_a_tiff_file_is_read_by_windows_and_keeps_its_georeference(make_predictor, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    picture, boxes = squares(300, 420, 40)
    path = str(tmp_path / "a.tif")
    place = rasterio.transform.Affine(0.1, 0, 541000.0, 0, -0.1, 4977000.0)
    options = {
        "height": 300,
        "width": 420,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:32612",
        "transform": place,
    }
    with rasterio.open(path, "w", driver="GTiff", **options) as file:
        file.write(picture.transpose(2, 0, 1))
    # The whole picture has 126,000 pixels, more than are read at once.
    predictor = make_predictor(tiles={"WINDOW": 256, "OVERLAP": 128}, INPUT__FOCAL__MAX_PIXELS=100_000)
    result = predictor(path)
    assert_found(result.boxes, boxes)
    assert result.georeference.crs == "EPSG:32612"
    assert result[:3].georeference == result.georeference


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"INPUT__MIN_SIZE_TEST": 800}, "TILES.WINDOW is 0, and INPUT.MIN_SIZE_TEST 800: set WINDOW to the"),
        (
            {"tiles": {"WINDOW": 100}},
            "TILES.WINDOW is 100; it must be a multiple of the coarsest stride, 128",
        ),
        ({"tiles": {"WINDOW": 256, "OVERLAP": 64}}, "TILES.OVERLAP is 64; it must be a multiple"),
        ({"tiles": {"WINDOW": 128, "OVERLAP": 128}}, "TILES.OVERLAP is 128; .* half of WINDOW, 128"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make_predictor, overrides, message):
    overrides["tiles"] = {"WINDOW": 0} | overrides.get("tiles", {})
    with pytest.raises(UserError, match=message):
        make_predictor(**overrides)


def test_the_window_of_images_that_are_not_resized(make_predictor):
    predictor = make_predictor(tiles={"WINDOW": 0})
    assert (predictor.tiles.window, predictor.tiles.overlap, predictor.tiles.scale) == (512, 128, 1.0)


def test_evaluation_of_whole_pictures(tmp_path, monkeypatch):
    # More objects than TEST.DETECTIONS_PER_IMAGE and than COCO's 100, in one picture.
    picture, boxes = squares(600, 900, 200)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), picture)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 600, "width": 900}],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [x0, y0, SIDE, SIDE],
                "area": SIDE**2,
                "iscrowd": 0,
            }
            for i, (x0, y0, _, _) in enumerate(boxes.tolist())
        ],
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    entry = {"NAME": f"whole_{tmp_path.name}", "FORMAT": "coco"}
    entry |= {"IMAGES": str(tmp_path / "images"), "ANNOTATIONS": str(tmp_path / "a.json")}
    register_datasets([entry])
    cfg = make_cfg(
        DATASETS__TEST=(entry["NAME"],),
        OUTPUT_DIR=str(tmp_path / "out"),
        MODEL__RETINANET__NUM_CLASSES=1,
        INPUT__MIN_SIZE_TEST=0,
        TEST__FOCAL__TILES__ENABLED=True,
        TEST__FOCAL__TILES__WINDOW=256,
        TEST__FOCAL__TILES__OVERLAP=128,
    )
    model = build_model(cfg).eval()
    # Below the views: the detection of one tile.
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, batch: find_squares(batch) if self.views is None else forward(self, batch),
    )
    results = FocalTrainer.test(cfg, model)["bbox"]
    assert results["AP"] == pytest.approx(100.0)
    assert results["AR@100000"] == pytest.approx(100.0)
    assert model.views is not None


def test_geojson_has_the_corners_of_the_boxes(make_predictor, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    picture, _ = squares(200, 150, 3)
    path = str(tmp_path / "a.tif")
    # A hundredth of a degree a pixel, from 10° east and 50° north.
    place = rasterio.transform.Affine(0.01, 0, 10.0, 0, -0.01, 50.0)
    options = {"height": 200, "width": 150, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:4326", transform=place, **options) as file:
        file.write(picture.transpose(2, 0, 1))
    result = make_predictor(tiles={"WINDOW": 256, "OVERLAP": 0})(path)
    features = result.to_geojson(tmp_path / "a.geojson")["features"]
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == features
    for feature, (x0, y0, x1, y1) in zip(features, result.boxes.tolist(), strict=True):
        west, east, north, south = 10 + x0 / 100, 10 + x1 / 100, 50 - y0 / 100, 50 - y1 / 100
        (ring,) = feature["geometry"]["coordinates"]
        corners = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        np.testing.assert_allclose(ring, corners, atol=1e-8)
    assert features[0]["properties"] == {"label": "0", "score": 0.9}
    with pytest.raises(UserError, match="has no georeference"):
        make_predictor(tiles={"WINDOW": 256, "OVERLAP": 0})(picture).to_geojson()
