from __future__ import annotations

from functools import partial

import pytest

from focal_d2.data.embedded import digits
from tests.data.embedded.test_neon_trees import wheel  # noqa: F401 - a fixture
from tests.engine.runs import run_command


def test_neon_trees_says_what_it_made(wheel, tmp_path, monkeypatch, capsys):  # noqa: F811
    root = tmp_path / "datasets"
    assert run_command(monkeypatch, "data", "neon_trees", "--root", root, "--wheel", wheel) == 0
    lines = capsys.readouterr().out.splitlines()
    splits = ("train", "val", "test", "other", "val_whole", "test_whole")
    assert [line.split(":")[0] for line in lines] == [f"neon_trees_{split}" for split in splits]
    assert lines[3].startswith("neon_trees_other: 2 images, ")
    assert str(root) in lines[3]


def test_digits_says_what_it_made(tmp_path, monkeypatch, capsys):
    recipe = digits.Recipe(train_scenes=3, test_scenes=2)
    monkeypatch.setattr(digits, "prepare", partial(digits.prepare, recipe=recipe))
    assert run_command(monkeypatch, "data", "digits", "--root", tmp_path) == 0
    assert [x.split(",")[0] for x in capsys.readouterr().out.splitlines()] == [
        "digits_train: 3 images",
        "digits_test: 2 images",
    ]


@pytest.mark.parametrize("argv", [("--wheel", "nowhere.whl"), ("--root", "file", "--wheel", "x.whl")])
def test_mistakes_give_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    (tmp_path / "file").touch()
    assert run_command(monkeypatch, "data", "neon_trees", *argv) == 2
    assert capsys.readouterr().err.startswith("focal-d2 data: error: ")
