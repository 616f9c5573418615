"""`focal-d2 study` as its users run it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from focal_d2.analysis.study.runs import DIVERGED
from focal_d2.commands.study import _training_command
from tests.engine.runs import run_command

DIVERGES = {"SOLVER.FOCAL.OPTIMIZER": "SGD", "SOLVER.BASE_LR": 1e9, "SOLVER.WARMUP_ITERS": 0}
CELLS = [
    {"NAME": "FL"},
    # What the trainer sees of NaN depends on the losses.
    {"NAME": "diverges", "SET": {**DIVERGES, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "giou"}},
    {"NAME": "CE", "SET": {"MODEL.FOCAL.LOSS.NAME": "ce"}},
]


@pytest.fixture
def command(job, tmp_path):
    def command(*more: object, cells=CELLS) -> list[str]:
        grid = tmp_path / "grid.yaml"
        grid.write_text(yaml.safe_dump({"SEEDS": [0], "CELLS": cells}))
        study = [sys.executable, "-m", "focal_d2", "study", "--import", "tests.tiny"]
        study += ["--config-file", str(job[0])]
        return [*study, "--grid", str(grid), "--output", str(tmp_path / "study"), *map(str, more)]

    return command


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_study_goes_on_and_a_diverged_cell_does_not_stop_it(command, tmp_path):
    study = tmp_path / "study"
    tool = subprocess.Popen(command(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(study / "ce/seed_0/last_checkpoint")
    os.killpg(tool.pid, signal.SIGKILL)
    tool.communicate()
    records = {p.parent.parent.name: json.loads(p.read_text()) for p in study.glob("*/*/run.json")}
    assert {k: r["status"] for k, r in records.items()} == {
        "fl": "finished",
        "diverges": "diverged",
        "ce": "running",
    }
    done = (study / "fl/seed_0/run.json").stat().st_mtime_ns

    again = subprocess.run(command("--json"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    results = json.loads(again.stdout)
    assert [r["status"] for r in results] == ["finished", "diverged", "finished"]
    assert (study / "fl/seed_0/run.json").stat().st_mtime_ns == done
    resumed = (study / "ce/seed_0/console.txt").read_text()
    assert "Starting training from iteration 4" in resumed or "Starting training from iteration 8" in resumed
    assert results[1]["iteration"] < 8
    console = (study / "diverges/seed_0/console.txt").read_text()
    assert DIVERGED.search(console)
    assert results[2]["metrics"]["bbox/AP"] >= 0
    table = (study / "table.md").read_text()
    assert f"| diverged at {results[1]['iteration']} (seed 0) |" in table
    for name in ("results.csv", "results.png", "losses.png"):
        assert (study / name).is_file()


@pytest.mark.parametrize("loss", ["ghm", "ohem", "focal"])
def test_every_loss_diverges_in_words_that_a_study_reads(loss, job_file, monkeypatch, capfd):
    settings = {**DIVERGES, "MODEL.FOCAL.LOSS.NAME": loss, "DATASETS.TEST": "()"}
    overrides = [x for pair in settings.items() for x in pair]
    assert run_command(monkeypatch, "train", "--config-file", job_file, *overrides) == 2
    assert DIVERGED.search(capfd.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1,1"], "--seeds is [1, 1]; it must be a list of different whole numbers"),
        (["--seeds", "a"], "--seeds is ['a']"),
        (["--num-gpus", "99"], "cell a: --num-gpus 99"),
        (["SEED", "3"], "cell a: SEED is set for each run"),
        (["MODEL.FOCAL.GHM_R.MU", "0.0"], "cell a: MODEL.FOCAL.GHM_R.MU is 0.0; it must be above 0"),
        (["SOLVER.LR_SCHEDULER_NAME", "Nope"], "cell a: cannot build the trainer"),
        (["INPUT.FOCAL.BRIGHTNESS", "2.0"], "cell a: INPUT.FOCAL.BRIGHTNESS"),
        (["DATALOADER.SAMPLER_TRAIN", "Even"], 'cell a: DATALOADER.SAMPLER_TRAIN is "Even"'),
        (["MODEL.WEIGHTS", "/none.pth"], "cell a: weights file not found: /none.pth"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, command, capsys, monkeypatch):
    (_, _, _, *given) = command(*arguments, cells=[{"NAME": "a"}])
    assert run_command(monkeypatch, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def run(command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_takes_no_module_from_the_folder_that_it_runs_in(tmp_path):
    (tmp_path / "argparse.py").write_text("open('planted', 'w')")
    args = argparse.Namespace(config_file="mine.yaml", imports=[], num_gpus=1, opts=["--help"])
    command = _training_command(args)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("usage: focal-d2 train"), result.stderr
    assert not (tmp_path / "planted").exists()


def test_a_mistake_in_the_last_cell_shows_before_the_first_runs(command, tmp_path):
    wrong = {"NAME": "wrong", "SET": {"MODEL.FOCAL.LOSS.NAME": "ce", "MODEL.FOCAL.LOSS.GAMMA": 2.0}}
    result = run(command(cells=[{"NAME": "right"}, wrong]))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "focal-d2 study: error: cell wrong: MODEL.FOCAL.LOSS.GAMMA is set, but the loss ce does not read it; "
        "it reads no parameters"
    ]
    assert not (tmp_path / "study").exists()


def test_a_failed_run_is_reported_and_ends_with_status_2(command, job):
    for path in job[1].images.iterdir():  # the check reads no image
        path.write_bytes(b"no image")
    result = run(command("DATALOADER.NUM_WORKERS", "0", cells=[{"NAME": "a"}]))
    assert result.returncode == 2
    assert "1 of 1 runs failed; the same command tries them again" in result.stderr
    assert "console.txt" in result.stderr
