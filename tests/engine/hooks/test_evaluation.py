from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, check_job, load_config
from focal_d2.engine.hooks.evaluation import Evaluation, TrainingEnded, check_best
from focal_d2.evaluation import FocalCOCOEvaluator, metric_names
from tests.conftest import make_cfg
from tests.processes import run_in_processes


@pytest.fixture
def train(job, tmp_path, monkeypatch):
    """Train the job with an evaluation every other iteration, which gives the AP of that iteration."""

    def run(scores, *overrides, resume=False, die_at=None, out="out"):
        evaluated = []

        def evaluate(cls, cfg, model, evaluators=None):
            done = min(get_event_storage().iter + 1, cfg.SOLVER.MAX_ITER)
            evaluated.append(done)
            if done == die_at:
                raise KeyboardInterrupt
            return {"bbox": {"AP": scores[done]}}

        monkeypatch.setattr(FocalTrainer, "test", classmethod(evaluate))
        options = ["TEST.EVAL_PERIOD", "2", "TEST.FOCAL.BEST_METRIC", "bbox/AP"]
        options += ["OUTPUT_DIR", str(tmp_path / out), *overrides]
        cfg = load_config(str(job[0]), options)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer, evaluated

    return run


def hook_of(trainer) -> Evaluation:
    return next(h for h in trainer._hooks if isinstance(h, Evaluation))


def checkpoint(path: Path):
    return torch.load(path, weights_only=True)


def scores_written(out: Path) -> dict[int, float]:
    lines = [json.loads(x) for x in (out / "metrics.json").read_text().splitlines()]
    return {x["iteration"]: x["bbox/AP"] for x in lines if "bbox/AP" in x}


def test_best_model_is_saved_beside_what_resumes(train, tmp_path):
    trainer, evaluated = train({2: 1.0, 4: 3.0, 6: math.nan, 8: 2.0})
    out = tmp_path / "out"
    assert evaluated == [2, 4, 6, 8]
    best, final = checkpoint(out / "model_best.pth"), checkpoint(out / "model_final.pth")
    assert best["iteration"] == best["trainer"]["iteration"] == 3
    assert any(not torch.equal(v, final["model"][k]) for k, v in best["model"].items())
    # The one of the same iteration, written before it.
    same = checkpoint(out / "model_0000003.pth")
    assert all(torch.equal(v, same["model"][k]) for k, v in best["model"].items())
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert hook_of(trainer).state_dict() == {
        "metric": "bbox/AP",
        "best": 3.0,
        "best_iteration": 4,
        "evaluated": 8,
        "since": 2,
    }


def test_best_model_may_be_the_last_one(train, tmp_path):
    train({2: 1.0, 4: 3.0, 6: 2.0, 8: 4.0})
    best, final = (checkpoint(tmp_path / "out" / f"model_{x}.pth") for x in ("best", "final"))
    assert best["iteration"] == final["iteration"] == 7
    assert all(torch.equal(v, final["model"][k]) for k, v in best["model"].items())


def test_patience_ends_training_in_the_ordinary_way(train, tmp_path, caplog):
    scores = {2: 1.0, 4: 5.0, 6: math.nan, 8: 4.0, 10: 6.0, 12: 5.0}
    caplog.set_level(logging.INFO, "focal_d2")
    options = ("SOLVER.MAX_ITER", "12", "TEST.FOCAL.PATIENCE", "2")
    out = tmp_path / "out"
    trainer, evaluated = train(scores, *options)
    assert evaluated == [2, 4, 6, 8]  # each model once
    assert trainer.iter == trainer.max_iter == 8
    assert "training ends after 8 iterations; the best was 5.00 after 4" in caplog.text
    final = checkpoint(out / "model_final.pth")
    assert final["iteration"] == final["trainer"]["iteration"] == 7
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert scores_written(out) == {7: 4.0}  # the last of the writers' period
    # Resumed, it has nothing to do; with more patience it continues.
    trainer, evaluated = train(scores, *options, resume=True)
    assert (evaluated, trainer.start_iter, trainer.iter) == ([], 8, 8)
    trainer, evaluated = train(scores, *options[:3], "3", resume=True)
    assert (evaluated, trainer.start_iter) == ([10, 12], 8)
    assert hook_of(trainer).state_dict()["best_iteration"] == 10


@pytest.mark.parametrize("die_at, resumes_at, again", [(4, 4, [4, 6]), (6, 4, [4, 6])])
def test_resumed_training_ends_as_an_uninterrupted_one(train, tmp_path, die_at, resumes_at, again):
    scores = {2: 5.0, 4: 5.0, 6: 4.0, 8: 9.0, 10: 9.0}
    options = ("SOLVER.MAX_ITER", "10", "TEST.FOCAL.PATIENCE", "2")
    whole, _ = train(scores, *options, out="whole")
    assert whole.iter == 6
    with pytest.raises(KeyboardInterrupt):  # the checkpoint of iteration 4 precedes its evaluation
        train(scores, *options, die_at=die_at)
    trainer, evaluated = train(scores, *options, resume=True)
    assert trainer.start_iter == resumes_at
    assert evaluated == again
    assert hook_of(trainer).state_dict() == hook_of(whole).state_dict()
    assert scores_written(tmp_path / "out").items() >= scores_written(tmp_path / "whole").items()
    for name in ("best", "final"):
        ours, theirs = (checkpoint(tmp_path / x / f"model_{name}.pth") for x in ("out", "whole"))
        assert ours["iteration"] == theirs["iteration"]
        assert ours["trainer"]["hooks"]["Evaluation"] == theirs["trainer"]["hooks"]["Evaluation"]


def test_an_evaluation_that_was_missed_is_made_up_for_under_its_iteration(train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train({2: 5.0}, "SOLVER.MAX_ITER", "6", die_at=4)
    train({4: 7.0, 6: 6.0}, "SOLVER.MAX_ITER", "6", resume=True)
    assert scores_written(tmp_path / "out") == {1: 5.0, 3: 7.0, 6: 6.0}
    best = checkpoint(tmp_path / "out/model_best.pth")
    assert best["iteration"] == best["trainer"]["iteration"] == 3


def test_another_metric_starts_anew(train, caplog):
    train({2: 5.0, 4: 5.0}, "SOLVER.MAX_ITER", "4")
    with pytest.raises(UserError, match='BEST_METRIC is "bbox/AP50"; the evaluation gives bbox/AP$'):
        train(dict.fromkeys((4, 6), 7.0), "TEST.FOCAL.BEST_METRIC", "bbox/AP50", resume=True)
    assert "was bbox/AP and is bbox/AP50: the best so far is forgotten" in caplog.text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["TEST.FOCAL.PATIENCE", "2"], "PATIENCE is 2, but TEST.FOCAL.BEST_METRIC is empty"),
        (["TEST.FOCAL.PATIENCE", "-1"], "PATIENCE is -1; it must be at least 0"),
        (["TEST.FOCAL.BEST_METRIC", "bbox/AP"], "TEST.EVAL_PERIOD is 0: nothing is evaluated"),
        (
            ["TEST.FOCAL.BEST_METRIC", "AP", "TEST.EVAL_PERIOD", "2"],
            'BEST_METRIC is "AP"; the evaluation gives bbox/AP, .*, operating_point/f1, .*, and AP-CLASS',
        ),
        (
            ["TEST.FOCAL.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", "2", "DATASETS.TEST", "()"],
            "DATASETS.TEST is empty: nothing is evaluated",
        ),
    ],
)
def test_check_best_finds_what_can_not_work(job, overrides, message):
    with pytest.raises(UserError, match=message):
        check_job(str(job[0]), overrides)


def test_check_best_needs_annotations(job):
    config, data = job
    content = json.loads(data.annotations.read_text())
    test = data.annotations.with_name("test.json")
    test.write_text(json.dumps({k: v for k, v in content.items() if k != "annotations"}))
    entries = [data.entry, {**data.entry, "NAME": "secret", "ANNOTATIONS": str(test)}]
    overrides = ["DATASETS.FOCAL", str(entries), "DATASETS.TEST", "('secret',)", "TEST.EVAL_PERIOD", "2"]
    check_job(str(config), overrides)
    with pytest.raises(
        UserError, match="BEST_METRIC is bbox/AP, but no dataset of DATASETS.TEST has annotations"
    ):
        check_job(str(config), [*overrides, "TEST.FOCAL.BEST_METRIC", "bbox/AP"])


def test_check_best_knows_the_names_that_evaluation_gives(job):
    _, data = job
    cfg = load_config(str(job[0]), ["TEST.EVAL_PERIOD", "2"])
    evaluator = FocalCOCOEvaluator(data.name, max_dets_per_image=[2, 20])
    evaluator.predictions = [{"image_id": 0, "instances": []}]
    classes = [f"class{k}" for k in range(3)]
    assert set(evaluator.evaluate()["bbox"]) == set(metric_names([2, 20], classes))
    cfg.defrost()
    cfg.TEST.FOCAL.MAX_DETS = [2, 20]
    for metric in ("bbox/AP-class1", "bbox/AR@20"):
        cfg.TEST.FOCAL.BEST_METRIC = metric
        check_best(cfg)
    cfg.DATASETS.TEST = (data.name, data.name)
    with pytest.raises(UserError, match=f'"bbox/AR@20"; the evaluation gives {data.name}/bbox/AP, '):
        check_best(cfg)
    cfg.TEST.FOCAL.BEST_METRIC = f"{data.name}/bbox/AP50"
    check_best(cfg)


def test_off_by_default(job, tmp_path):
    tmp_path.joinpath("out").mkdir()
    cfg = load_config(str(job[0]))
    assert hook_of(FocalTrainer(cfg))._metric == ""
    assert (make_cfg().TEST.FOCAL.BEST_METRIC, make_cfg().TEST.FOCAL.PATIENCE) == ("", 0)


class _Loop(TrainerBase):
    """detectron2's loop around nothing."""

    failed = False

    def run_step(self) -> None:
        pass


class _Saved(list):
    def save(self, name: str, **kwargs: object) -> None:
        self.append((name, kwargs["iteration"]))


def _run_process(folder: Path) -> None:
    loop, saved = _Loop(), _Saved()
    falling = iter([3.0, 2.0, 1.0])

    def evaluate(point=None):
        # As detectron2's evaluators do: only the main process has results.
        loop.last_results = {"bbox": {"AP": next(falling)}} if comm.is_main_process() else {}
        return loop.last_results

    cfg = make_cfg(TEST__EVAL_PERIOD=2, TEST__FOCAL__BEST_METRIC="bbox/AP", TEST__FOCAL__PATIENCE=2)
    hook = Evaluation(cfg, saved, test=evaluate, validate=evaluate)
    loop.register_hooks([hook])
    try:
        loop.train(0, 20)
    except TrainingEnded:
        outcome = [loop.iter, saved, hook.state_dict()]
        (folder / f"{comm.get_rank()}.json").write_text(json.dumps(outcome))


def test_processes_agree_on_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_in_processes(_run_process, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[:2] == [6, [["model_best", 1], ["model_final", 5]]]
