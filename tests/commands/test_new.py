from __future__ import annotations

import json

import pytest

from focal_d2.analysis.new import make
from focal_d2.commands.cli import run_command
from tests.analysis.new.folders import coco, csv_table
from tests.analysis.new.test_make import MEASURED, TINY


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("focal_d2.analysis.anchors.fit._GENERATIONS", 2)
    original = make.make_config

    def tiny(*args, **options):
        return original(*args, **options, trial=lambda cfg, seconds: MEASURED, start=lambda device: TINY)

    monkeypatch.setattr(make, "make_config", tiny)


def test_new_prints_the_choices_and_the_next_command(tmp_path, capsys):
    csv_table(tmp_path / "data")
    assert run_command("new", ["data", "--output", "boxes.yaml", "--minutes", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert "split: 10 images to train, 2 images to validate, cut from boxes.csv" in out
    assert "images without boxes: 3 of 10 images to train on have no box" in out
    assert "0 errors" in out
    assert out.splitlines()[-2:] == [
        "written: boxes.yaml, boxes_lists/data_train.txt, boxes_lists/data_val.txt",
        "next: focal-d2 train --config-file boxes.yaml",
    ]
    assert "reading the annotations of 12 images …" in err


def test_new_prints_json(tmp_path, capsys):
    csv_table(tmp_path / "data")
    assert run_command("new", ["data", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"] == "mine.yaml"
    assert result["facts"]["images_without_boxes"] == 3
    assert {x["use"]: x["images"] for x in result["datasets"]} == {"train": 10, "val": 2}
    assert all(set(x) == {"name", "keys", "reason"} for x in result["choices"])
    assert result["doctor"]["errors"] == 0
    assert result["trial"]["seconds"] == MEASURED.seconds


def test_new_returns_1_for_findings(tmp_path, capsys):
    coco(tmp_path / "data")
    (tmp_path / "data/photos/test_a.png").write_bytes(b"")
    assert run_command("new", ["data"]) == 1
    out = capsys.readouterr().out
    assert "error image-unreadable" in out
    assert out.splitlines()[-1].startswith("Nothing was written: correct these errors first")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["nowhere"], "focal-d2 new: error: nowhere: no such folder"),
        (["data/boxes.csv"], "data/boxes.csv: a file, where a folder is needed"),
        (["data", "--minutes", "0"], "0 is not a number of minutes above 0"),
        (["data", "--seed", "-1"], "--seed is [-1]"),
        (["data", "--annotations", "data/no.csv"], "--annotations data/no.csv: no such file or folder"),
    ],
)
def test_new_refuses_in_one_line(tmp_path, capsys, arguments, line):
    csv_table(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        run_command("new", arguments)
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
