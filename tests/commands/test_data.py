from __future__ import annotations

import runpy
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.data.embedded.test_neon_trees import wheel  # noqa: F401 - a fixture


def prepare(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_neon_trees.py", *map(str, argv)])
    try:
        runpy.run_path(str(REPOSITORY / "tools/prepare_neon_trees.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_it_says_what_it_made(wheel, tmp_path, monkeypatch, capsys):  # noqa: F811
    root = tmp_path / "datasets"
    assert prepare(monkeypatch, "--root", root, "--wheel", wheel) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("neon_trees_other: 2 tiles, ")
    assert str(root) in lines[2]


@pytest.mark.parametrize("argv", [("--wheel", "nowhere.whl"), ("--root", "file", "--wheel", "x.whl")])
def test_mistakes_give_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    (tmp_path / "file").touch()
    assert prepare(monkeypatch, *argv) == 2
    assert capsys.readouterr().err.startswith("prepare_neon_trees.py: error: ")
