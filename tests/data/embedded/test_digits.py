from __future__ import annotations

import itertools
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from sklearn.datasets import load_digits, load_sample_images

from focal_d2 import UserError
from focal_d2.data import check_datasets
from focal_d2.data.embedded.digits import Recipe, draw_scene, prepare
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
        assert 1 <= len(boxes) == len(labels) <= 9
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


def test_the_splits_share_no_digit_and_no_part_of_a_photograph(tmp_path, monkeypatch):
    seen = []

    def look(rng, digits, classes, backgrounds, recipe):
        seen.append((digits, classes, backgrounds))
        return draw_scene(rng, digits, classes, backgrounds, recipe)

    monkeypatch.setattr("focal_d2.data.embedded.digits.draw_scene", look)
    prepare(tmp_path, Recipe(train_scenes=1, test_scenes=1))
    (train, train_classes, train_parts), (test, test_classes, test_parts) = seen
    everything = load_digits()
    assert np.array_equal(np.concatenate([train, test]), everything.images)
    assert np.array_equal(np.concatenate([train_classes, test_classes]), everything.target)
    for photograph, left, right in zip(load_sample_images().images, train_parts, test_parts, strict=True):
        assert left.shape[1] + right.shape[1] < photograph.shape[1]
        assert np.array_equal(left, photograph[:, : left.shape[1], ::-1])
        assert np.array_equal(right, photograph[:, -right.shape[1] :, ::-1])


def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/mine.csv").write_text("")
    with pytest.raises(UserError, match="digits was not made by focal_d2"):
        prepare(tmp_path, SMALL)
    assert (tmp_path / "digits/mine.csv").exists()


def test_processes_that_start_together_draw_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from focal_d2.data.embedded.digits import Recipe, prepare; "
        "f = prepare(Path(sys.argv[1]), Recipe(train_scenes=5, test_scenes=3)); "
        "print((f / 'recipe.json').stat().st_ino)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    made = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert len(made) == 1


def test_the_registered_names_draw_themselves_and_fit_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("focal_d2.data.embedded.digits.prepare.__defaults__", (SMALL,))
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
    assert not (tmp_path / "digits").exists()


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="dataset folder .*file: "):
        prepare(tmp_path / "file", SMALL)
