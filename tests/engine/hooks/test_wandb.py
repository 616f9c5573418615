"""Against a stand-in with the functions of wandb that are used."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, load_config
from tests.conftest import make_cfg


@pytest.fixture
def wandb(monkeypatch):
    """Install a stand-in; its `runs` are what was asked for."""
    module = ModuleType("wandb")
    module.runs = []
    module.Error = type("Error", (Exception,), {})
    module.Image = lambda pixels: ("image", pixels.shape)

    def init(*, project, dir, config, id, resume, allow_val_change):
        run = SimpleNamespace(
            id=id or f"run{len(module.runs)}", project=project, dir=dir, config=config, resume=resume
        )
        run.rows, run.exit_codes = [], []
        run.log = lambda row, *, step: run.rows.append((step, row))
        run.finish = lambda *, exit_code: run.exit_codes.append(exit_code)
        module.runs.append(run)
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def train(job, tmp_path):
    (tmp_path / "out").mkdir()

    def run(*overrides, resume=False):
        options = ["SOLVER.FOCAL.WANDB_PROJECT", "trees", "SOLVER.CHECKPOINT_PERIOD", "21", *overrides]
        trainer = FocalTrainer(load_config(str(job[0]), options))
        trainer.resume_or_load(resume=resume)
        trainer.train()

    return run


def test_a_run_gets_figures_and_pictures_by_iteration_and_goes_on_when_resumed(wandb, train, tmp_path):
    train("SOLVER.MAX_ITER", "21", "VIS_PERIOD", "8")
    (run,) = wandb.runs
    assert (run.project, run.dir, run.resume) == ("trees", str(tmp_path / "out"), None)
    assert run.config["SOLVER"]["FOCAL"]["WANDB_PROJECT"] == "trees"
    steps = [step for step, _ in run.rows]
    assert steps == sorted(set(steps)) == [7, 15, 19, 20, 21]
    rows = dict(run.rows)
    assert rows[7] == rows[15] == {"ground_truth_and_detections": ("image", (64, 136, 3))}
    assert {"total_loss", "level/P3", "lr"} <= rows[19].keys()
    assert "bbox/AP" in rows[21]
    assert run.exit_codes == [0]

    train("SOLVER.MAX_ITER", "23", resume=True)
    assert (wandb.runs[1].id, wandb.runs[1].resume) == ("run0", "allow")
    assert [step for step, _ in wandb.runs[1].rows] == [22, 23]
    train("SOLVER.MAX_ITER", "1")  # another training in the same folder
    assert (wandb.runs[2].id, wandb.runs[2].resume) == ("run2", None)


def test_a_training_that_fails_is_marked_so(wandb, train, monkeypatch):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FocalTrainer, "run_step", fail)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert wandb.runs[0].exit_codes == [1]


def test_what_keeps_wandb_from_beginning_is_one_line(wandb, train, tmp_path):
    def init(**kwargs):
        raise wandb.Error("no API key configured")

    wandb.init = init
    with pytest.raises(UserError, match="can't begin a run: no API key configured .*WANDB_MODE=offline"):
        train()
    assert not (tmp_path / "out" / "wandb_id.txt").exists()


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_missing_package_is_one_line_at_the_start(train, tmp_path, monkeypatch, left_behind):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if left_behind:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="WANDB_PROJECT is trees, which needs .*: pip install wandb"):
        train()
    sys.modules.pop("wandb", None)
    assert make_cfg().SOLVER.FOCAL.WANDB_PROJECT == ""
