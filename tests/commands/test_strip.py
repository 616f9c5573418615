from __future__ import annotations

import json

import torch
import yaml

from focal_d2 import Predictor
from focal_d2.storage.card import read_card
from tests.engine.runs import run_command


def test_a_training_s_checkpoint_becomes_a_small_file_that_evaluates_alike(
    job, tmp_path, monkeypatch, capsys
):
    """From training to a file that predicts without the dataset and the config, and its evaluation."""
    config, data = job
    options = ["SOLVER.MAX_ITER", "2", "SOLVER.FOCAL.EMA", "0.5", "TEST.FOCAL.OPERATING_POINT", "recall"]
    assert run_command(monkeypatch, "train", "--config-file", config, *options) == 0
    full, small = tmp_path / "out/model_final.pth", tmp_path / "small.pth"
    card = read_card(str(full))
    assert card is not None
    assert card.class_names == ("class0", "class1", "class2")
    kept = yaml.safe_load(card.config)
    assert kept["INPUT"]["FORMAT"] == "BGR"
    assert kept["INPUT"]["MIN_SIZE_TRAIN"] == [0]
    assert str(tmp_path) not in card.config
    capsys.readouterr()
    assert run_command(monkeypatch, "strip", full, "--output", small) == 0
    assert f"{small}: " in capsys.readouterr().out
    assert small.stat().st_size < 0.5 * full.stat().st_size

    predictor = Predictor(small)
    assert predictor.class_names == ["class0", "class1", "class2"]
    assert predictor.operating_point == Predictor(full).operating_point is not None
    image = data.images / "0.png"
    for a, b in zip(Predictor(full, threshold=0)(image), Predictor(small, threshold=0)(image), strict=True):
        assert (a.score, a.name) == (b.score, b.name)

    sets = ["DATASETS.FOCAL", f"[{data.entry}]", "DATASETS.TEST", f"['{data.name}']"]
    figures = []
    for model in (full, small):
        out = ["OUTPUT_DIR", tmp_path / model.stem]
        assert run_command(monkeypatch, "eval", "--config-file", model, *sets, *out) == 0
        path = tmp_path / model.stem / "inference" / data.name / "analysis.json"
        figures.append(json.loads(path.read_text()))
    assert figures[0] == figures[1]

    # Class names that differ from the dataset's.
    content = torch.load(small, weights_only=True)
    for names, status, message in (
        (["class1", "class0", "class2"], 2, "are in another order than those of dataset"),
        (["class0", "class1", "other"], 0, "differ from those of dataset"),
    ):
        torch.save({**content, "card": {**content["card"], "class_names": names}}, small)
        arguments = ["--config-file", small, *sets, "OUTPUT_DIR", tmp_path / "other"]
        assert run_command(monkeypatch, "eval", *arguments) == status
        output = "".join(capsys.readouterr())
        assert message in output


def test_an_older_checkpoint_needs_its_config(job, tmp_path, monkeypatch, capsys):
    config, _ = job
    assert run_command(monkeypatch, "train", "--config-file", config, "SOLVER.MAX_ITER", "1") == 0
    content = torch.load(tmp_path / "out/model_final.pth")
    del content["card"]
    torch.save(content, tmp_path / "old.pth")
    capsys.readouterr()
    assert run_command(monkeypatch, "strip", tmp_path / "old.pth", "--output", tmp_path / "a.pth") == 0
    assert "has no class names and no config in it; --config-file adds them" in capsys.readouterr().err
    arguments = ["--config-file", tmp_path / "out/config.yaml", "--output", tmp_path / "b.pth"]
    assert run_command(monkeypatch, "strip", tmp_path / "old.pth", *arguments) == 0
    assert Predictor(tmp_path / "b.pth").class_names == ["class0", "class1", "class2"]
    assert run_command(monkeypatch, "strip", tmp_path / "old.pth", "--output", tmp_path / "a.pth") == 2
    assert "exists; choose another --output" in capsys.readouterr().err
    # A training may start from the file, and go on from a checkpoint that has no card.
    more = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", tmp_path / "fine", "MODEL.WEIGHTS", tmp_path / "b.pth"]
    assert run_command(monkeypatch, "train", "--config-file", config, *more) == 0
    torch.save(content, tmp_path / "out/model_final.pth")
    assert run_command(monkeypatch, "train", "--resume", "--config-file", config, *more[:2]) == 0


def test_resume_refuses_class_names_in_another_order(job, tmp_path, monkeypatch, capsys):
    config, _ = job
    assert run_command(monkeypatch, "train", "--config-file", config, "SOLVER.MAX_ITER", "1") == 0
    path = tmp_path / "out/model_final.pth"
    content = torch.load(path)
    content["card"]["class_names"] = ["class2", "class1", "class0"]
    torch.save(content, path)
    arguments = ["--resume", "--config-file", config, "SOLVER.MAX_ITER", "2"]
    assert run_command(monkeypatch, "train", *arguments) == 2
    assert (
        "--resume: the class names of the checkpoint are in another order than those of DATASETS.TRAIN: "
        'class 0 is "class2" in the checkpoint and "class0" in the dataset'
    ) in capsys.readouterr().err
