from __future__ import annotations

import itertools
import json
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from focal_d2 import UserError
from focal_d2.data import check_datasets
from focal_d2.data.digits import Recipe, draw_scene, prepare
from tests.conftest import make_cfg

SMALL = Recipe(train_scenes=5, test_scenes=3)


def test_the_same_seed_draws_the_same_files_and_another_others(tmp_path):
    a, b, c = (
        prepare(tmp_path / name, recipe)
        for name, recipe in (("a", SMALL), ("b", SMALL), ("c", Recipe(seed=1, train_scenes=5, test_scenes=3)))
    )
    files = sorted(p.relative_to(a) for p in a.rglob("*.*"))
    assert len(files) == 5 + 3 + 3
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert (a / "train.json").read_text() != (c / "train.json").read_text()


def test_scenes_are_drawn_again_only_for_another_recipe(tmp_path):
    folder = prepare(tmp_path, SMALL)
    (folder / "mark").write_text("")
    assert (prepare(tmp_path, SMALL) / "mark").exists()
    assert not (prepare(tmp_path, Recipe(train_scenes=6, test_scenes=3)) / "mark").exists()


def test_the_splits_are_coco_files_with_ten_classes(tmp_path):
    folder = prepare(tmp_path, SMALL)
    for split, scenes in (("train", 5), ("test", 3)):
        coco = json.loads((folder / f"{split}.json").read_text())
        assert [c["name"] for c in coco["categories"]] == [str(k) for k in range(10)]
        assert len(coco["images"]) == scenes
        for image in coco["images"]:
            assert cv2.imread(str(folder / split / image["file_name"])).shape == (256, 256, 3)


def test_boxes_are_tight_around_the_ink_and_do_not_overlap():
    # On an even grey the ink is all that differs from it.
    backgrounds = [np.full((200, 220, 3), 100, np.uint8)]
    rng = np.random.default_rng(0)
    digit = np.zeros((1, 8, 8))
    digit[0, 1:7, 2:6] = 16
    for _ in range(10):
        scene, boxes, labels = draw_scene(rng, digit, np.array([7]), backgrounds, SMALL)
        assert 1 <= len(boxes) == len(labels) <= 5
        assert set(labels) == {7}
        changed = np.abs(scene.astype(int) - 100).max(axis=2) > 20
        inside = np.zeros_like(changed)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= 256
            assert 0 <= y0 < y1 <= 256
            inside[y0:y1, x0:x1] = True
            # No border row or column without ink.
            box = np.abs(scene[y0:y1, x0:x1].astype(int) - 100).max(axis=2) > 5
            assert box[0].any()
            assert box[-1].any()
            assert box[:, 0].any()
            assert box[:, -1].any()
        assert changed.any()
        assert not (changed & ~inside)[8:-8].mean() > 0.01
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_registered_names_draw_themselves_and_fit_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("focal_d2.data.digits.prepare.__defaults__", (SMALL,))
    cfg = make_cfg(
        DATASETS__TRAIN=("digits_train",), DATASETS__TEST=("digits_test",), MODEL__RETINANET__NUM_CLASSES=10
    )
    check_datasets(cfg, training=True)
    records = DatasetCatalog.get("digits_test")
    assert len(records) == 3
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(10))


def test_without_scikit_learn_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="need scikit-learn: pip install"):
        prepare(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="dataset folder .*file: "):
        prepare(tmp_path / "file", SMALL)
