from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.runs import run_command


@pytest.fixture
def files(job, tmp_path):
    """The truth as detections, of scores that fall, and the command's arguments without them."""
    config, data = job
    boxes = json.loads(data.annotations.read_text())["annotations"]
    detections = [
        {**{k: x[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9 - 0.01 * i}
        for i, x in enumerate(boxes)
    ]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(detections))
    return detections, path, ["eval", "--config-file", config, "--detections", path]


def analysis(folder: Path) -> dict:
    (path,) = folder.glob("inference/*/analysis.json")
    return json.loads(path.read_text())


def test_detections_of_a_file_are_evaluated(files, tmp_path, monkeypatch, capsys):
    detections, path, command = files
    assert run_command(monkeypatch, *command) == 0
    first = analysis(tmp_path / "out")
    assert first["coco"]["AP"] == pytest.approx(100)
    assert first["operating_point"] == {
        **{"score": 0.9 - 0.17, "precision": 1.0, "recall": 1.0, "f1": 1.0},
        **{"goal": "best F1", "chosen_on": "squares_train", "validation": False, "per_class": {}},
    }
    assert "| squares_train | 100.00 |" in capsys.readouterr().out

    # Two images less, at the point that was chosen on all: an image without detections counts, too.
    path.write_text(json.dumps(detections[:12]))
    point = next((tmp_path / "out").glob("inference/*/analysis.json"))
    options = ["--operating-point", point, "OUTPUT_DIR", tmp_path / "second"]
    assert run_command(monkeypatch, *command, *options) == 0
    second = analysis(tmp_path / "second")
    assert second["operating_point"]["score"] == first["operating_point"]["score"]
    assert second["operating_point"]["recall"] == pytest.approx(12 / 18)
    assert second["image_averages"]["recall"] == pytest.approx(4 / 6)

    path.write_text("[]")
    assert run_command(monkeypatch, *command, "OUTPUT_DIR", tmp_path / "third") == 0
    assert analysis(tmp_path / "third")["coco"]["AP"] == 0


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"image_id": 77},
            'detections.json: image_id 77 is not in the ground truth of dataset "squares_train"',
        ),
        ({"category_id": 0}, "detections.json: category_id 0 is not in the ground truth of dataset"),
        ({"score": 1.5}, "detections.json is not a list of detections as COCO has it: "),
        ({"bbox": [1, 2, 3]}, "detections.json is not a list of detections as COCO has it: "),
    ],
    ids=["image", "category", "score", "bbox"],
)
def test_detections_that_do_not_fit_are_one_line(files, monkeypatch, capsys, change, line):
    detections, path, command = files
    path.write_text(json.dumps([detections[0], {**detections[1], **change}]))
    assert run_command(monkeypatch, *command) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_files_and_datasets_that_cannot_be_used_are_one_line(files, tmp_path, monkeypatch, capsys):
    _, path, command = files
    for options, line in (
        (["DATASETS.TEST", "[]"], "--detections needs one dataset in DATASETS.TEST, that of the file, not 0"),
        (["--detections", tmp_path / "none.json"], "none.json cannot be read: No such file or directory"),
        (["--operating-point", path], "detections.json is not an analysis.json of an evaluation: "),
    ):
        assert run_command(monkeypatch, *command, *options) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
    path.with_name("analysis.json").write_text('{"operating_point": {"score": 0.5}}')
    assert run_command(monkeypatch, *command, "--operating-point", path.with_name("analysis.json")) == 2
    assert "analysis.json has no operating point: " in capsys.readouterr().err.splitlines()[-1]
