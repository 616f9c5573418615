from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model

from focal_d2.evaluation.operating_point import OperatingPoint
from tests.conftest import make_cfg
from tests.engine.runs import run_command
from tests.storage.test_weights import Evil


@pytest.fixture
def job(coco_dataset, tmp_path):
    """A config file with its dataset, and weights that find something everywhere."""
    data = coco_dataset(images=2)
    cfg = make_cfg(DATASETS__TEST=(data.name,), MODEL__RETINANET__SCORE_THRESH_TEST=0.001)
    cfg.DATASETS.FOCAL = [data.entry]
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    yaml.safe_load(config.read_text())
    return config, data


def predict(monkeypatch, config, *argv) -> int:
    return run_command(monkeypatch, "predict", "--config-file", config, "--threshold", 0.0, *argv)


def test_threshold_is_the_checkpoint_s_operating_point_or_0_3(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = ["--config-file", config, "--input", data.images / "0.png", "--output", tmp_path, "--json"]

    def run() -> tuple[list[float], str]:
        assert run_command(monkeypatch, "predict", *arguments) == 0
        out, err = capsys.readouterr()
        (scores,) = (json.loads(x)["scores"] for x in out.splitlines() if x.startswith("{"))
        return scores, next(x for x in err.splitlines() if x.startswith("threshold: "))

    scores, line = run()
    assert all(score >= 0.3 for score in scores)
    assert line.startswith("threshold: score 0.3, because the checkpoint has no operating point; --threshold")
    point = OperatingPoint(0.001, 0.8, 0.4, 0.53, "best F1", "mine_val", True)
    weights = tmp_path / "model.pth"
    torch.save({**torch.load(weights), "operating_point": point._asdict()}, weights)
    more, line = run()
    assert len(more) > len(scores)
    assert line.startswith(f"threshold: {point}; --threshold")


def test_dataset_is_drawn_beside_its_ground_truth(job, tmp_path, monkeypatch, capsys):
    config, data = job
    assert predict(monkeypatch, config, "--dataset", data.name, "--output", tmp_path / "out") == 0
    assert "2 pictures in" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "out/0.png"))
    image = cv2.imread(str(data.images / "0.png"))
    assert picture.shape == (64, 64 + 8 + 64, 3)
    x, y, w, h = json.loads(data.annotations.read_text())["annotations"][0]["bbox"]
    assert not np.array_equal(picture[y : y + h, x : x + w], image[y : y + h, x : x + w])


def test_names_that_are_not_utf_8_are_read_and_written(job, tmp_path, monkeypatch, capfd):
    config, data = job
    folder, name = tmp_path / os.fsdecode(b"B\xe4ume"), os.fsdecode(b"f\xfcnf")
    folder.mkdir()
    (data.images / "0.png").rename(folder / f"{name}.png")
    assert predict(monkeypatch, config, "--input", folder, "--output", folder / "out") == 0
    assert predict(monkeypatch, config, "--input", folder, "--output", tmp_path / "out", "--json") == 0
    written = (folder / "out" / f"{name}.png").read_bytes()
    assert written == (tmp_path / "out" / f"{name}.png").read_bytes()
    assert cv2.imdecode(np.frombuffer(written, np.uint8), cv2.IMREAD_COLOR).shape == (64, 64, 3)
    (detections,) = [json.loads(x) for x in capfd.readouterr().out.splitlines() if x.startswith("{")]
    assert detections["file"] == str(folder / f"{name}.png")


def test_threshold_hides_what_is_below_it(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = ["--input", data.images, "--output", tmp_path / "out", "--json", "--threshold", 0.99]
    assert predict(monkeypatch, config, *arguments) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["boxes"] for x in lines] == [[], []]


def test_detections_that_the_limit_cut_off_are_counted(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = ["--input", data.images, "--output", tmp_path / "out", "--json"]

    def run(*more):
        assert predict(monkeypatch, config, *arguments, *more) == 0
        out, err = capsys.readouterr()
        warnings = [x for x in err.splitlines() if "DETECTIONS_PER_IMAGE" in x]
        return [json.loads(x)["scores"] for x in out.splitlines() if x.startswith("{")], warnings

    whole, _ = run("TEST.DETECTIONS_PER_IMAGE", 20)
    assert [len(scores) for scores in whole] == [20, 20]
    cut, warnings = run("TEST.DETECTIONS_PER_IMAGE", 5)
    assert cut == [scores[:5] for scores in whole]
    assert warnings == [
        f"TEST.DETECTIONS_PER_IMAGE 5 cuts off detections with scores of 0 and above in 2 of 2 "
        "images; the first is "
        f"{data.images / '0.png'}"
    ]
    # Five above the threshold are all that there are.
    threshold = (whole[0][4] + whole[0][5]) / 2
    assert whole[0][4] > threshold > whole[0][5]
    limited, warnings = run("--threshold", threshold, "TEST.DETECTIONS_PER_IMAGE", 5)
    assert len(limited[0]) == 5
    assert not any(str(data.images / "0.png") in x for x in warnings)


def test_folder_gives_json_lines(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = ["--input", data.images, "--output", tmp_path / "out", "--json"]
    assert predict(monkeypatch, config, *arguments) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["file"] for x in lines] == [str(data.images / f"{i}.png") for i in (0, 1)]
    for line in lines:
        assert len(line["boxes"]) == len(line["scores"]) == len(line["classes"]) > 0
        assert set(line["classes"]) <= {"class0", "class1", "class2"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--input", "nowhere"], "nowhere: no such file or folder"),
        (["--input", ".", "SEED", "1", "--json"], "--json must come before the KEY VALUE pairs"),
        (["--dataset", "nowhere"], '"nowhere" is not registered'),
        (["--dataset", ""], '"" is not registered'),
        (["--input", ".", "--output", "."], "would be overwritten"),
        (["--input", ".", "--output", "file"], "output folder file"),
        (["--input", ".", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    ],
)
def test_mistakes_give_one_line_and_status_2(job, tmp_path, monkeypatch, capsys, arguments, expected):
    (tmp_path / "file").touch()
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((64, 64, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    assert predict(monkeypatch, job[0], "--output", "out", *arguments) == 2
    assert expected in capsys.readouterr().err


def test_files_that_run_code_are_refused_unless_trusted(job, tmp_path, monkeypatch, capsys):
    config, data = job
    plain = config.read_text()
    arguments = ["--input", data.images, "--output", tmp_path / "out"]
    planted = tmp_path / "planted"
    config.write_text(plain.replace("SEED: 1", f"SEED: !!python/object/apply:os.system ['mkdir {planted}']"))
    assert predict(monkeypatch, config, *arguments) == 2
    assert "the tag !!python/object/apply:os.system is refused" in capsys.readouterr().err
    assert not planted.exists()
    assert predict(monkeypatch, config, "--trust-files", *arguments) == 0
    assert planted.exists()

    config.write_text(plain)
    planted.rmdir()
    weights = tmp_path / "model.pth"
    torch.save({**torch.load(weights), "more": Evil(planted)}, weights)
    assert predict(monkeypatch, config, *arguments) == 2
    assert "it would import posix.mkdir" in capsys.readouterr().err
    assert not planted.exists()
    assert predict(monkeypatch, config, "--trust-files", *arguments) == 0
    assert planted.exists()
