from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import yaml
from detectron2.engine import default_argument_parser

from focal_d2.commands.cli import command_parser
from focal_d2.config import leaves
from tests.engine.runs import metrics, run_command


def options(parser: argparse.ArgumentParser) -> dict[str, object]:
    """The names of all options, with the values that parsing gives without arguments."""
    names = {name: action.dest for action in parser._actions for name in action.option_strings or ["opts"]}
    values = vars(parser.parse_args([]))
    return {name: values.get(key) for name, key in names.items()}


def test_options_are_detectron2s_and_ours():
    ours, theirs = options(command_parser("train")), options(default_argument_parser())
    # A free port: with detectron2's fixed one, a second job on the machine fails.
    assert theirs.pop("--dist-url") != (automatic := ours.pop("--dist-url"))
    assert "auto" in str(automatic)
    assert ours.items() >= theirs.items()
    assert ours.keys() - theirs.keys() == {"--trust-files", "--allow-download", "--import", "--minutes"}
    of_eval = {"--dist-url", "--detections", "--operating-point"}
    assert options(command_parser("eval")).keys() == ours.keys() - {"--eval-only", "--minutes"} | of_eval


def test_eval_gives_the_figures_of_the_training(job, tmp_path, monkeypatch, capsys):
    config, data = job
    assert run_command(monkeypatch, "train", "--config-file", config, "SOLVER.MAX_ITER", 2) == 0
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "OUTPUT_DIR", tmp_path / "eval"]
    capsys.readouterr()
    assert run_command(monkeypatch, "eval", "--config-file", config, *weights) == 0
    name = f"inference/{data.name}/coco_instances_results.json"
    assert (tmp_path / "eval" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert metrics(tmp_path / "out")[-1]["bbox/AR@100"] >= 0
    assert not (tmp_path / "eval/model_final.pth").exists()


def test_a_config_of_the_package_trains_in_any_folder(job, tmp_path, monkeypatch):
    config = yaml.safe_load(job[0].read_text())
    del config["_BASE_"]
    overrides = [x for pair in leaves(config).items() for x in pair]
    monkeypatch.chdir(tmp_path)
    name = "focal_retinanet_R_50_FPN_1x.yaml"
    given = ["--config-file", name, *overrides, "SOLVER.STEPS", "()", "MODEL.WEIGHTS", ""]
    assert run_command(monkeypatch, "train", *given, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 0
    assert (tmp_path / "out/model_final.pth").is_file()


def test_minutes_limit_the_iterations(job, tmp_path, monkeypatch, capsys):
    config, _ = job
    given = ["--config-file", config, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]
    assert run_command(monkeypatch, "train", "--minutes", 5, *given) == 0
    assert "on this machine: 2 of 2 iterations" in capsys.readouterr().err
    assert (tmp_path / "out/model_final.pth").is_file()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--minutes", 0], "--minutes is 0; it must be above 0"),
        (["--minutes", "nan"], "--minutes is nan; it must be above 0"),
        (["--minutes", 5, "--resume"], "--minutes is for a training of one process from its start"),
    ],
)
def test_minutes_that_cannot_be_are_named(job, monkeypatch, capsys, given, message):
    assert run_command(monkeypatch, "train", *given, "--config-file", job[0]) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_names_the_command(monkeypatch, capsys):
    assert run_command(monkeypatch, "train", "--config-file", "nowhere.yaml") == 2
    assert capsys.readouterr().err == "focal-d2 train: error: config file not found: nowhere.yaml\n"


@pytest.mark.slow
def test_python_m_runs_commands(tmp_path):
    command = [sys.executable, "-m", "focal_d2", "train", "--config-file", "nowhere.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr == "focal-d2 train: error: config file not found: nowhere.yaml\n"
