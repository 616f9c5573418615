from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, check_job, load_config
from focal_d2.engine.checks import run_checks
from focal_d2.engine.validation import ModelWithLosses
from focal_d2.evaluation.operating_point import OperatingPoint, saved_point
from focal_d2.storage.checkpoint import FocalCheckpointer
from tests.conftest import make_cfg
from tests.engine.runs import metrics, run_main


@pytest.fixture
def train(job, tmp_path):
    """Train the job for 4 iterations; returns the trainer and OUTPUT_DIR."""

    def run(out, *overrides, resume=False):
        options = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", *overrides]
        cfg = load_config(str(job[0]), [*options, "OUTPUT_DIR", str(tmp_path / out)])
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        seed_all_rng(1)
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer, tmp_path / out

    return run


@pytest.fixture
def val(job):
    """Another dataset: overrides that validate on it."""
    _, data = job
    content = json.loads(data.annotations.read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] < 3]
    file = data.annotations.with_name("val.json")
    file.write_text(json.dumps(content))
    entries = [data.entry, {**data.entry, "NAME": "held_out", "ANNOTATIONS": str(file)}]
    return ["DATASETS.FOCAL", str(entries), "DATASETS.VAL", "('held_out',)"]


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "overrides",
    [
        ["DATALOADER.NUM_WORKERS", "1", "SOLVER.FOCAL.EMA", "0.9"],  # the job's FPN has batch norm
        ["MODEL.FOCAL.LOSS.NAME", "ghm", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "ghm_r"],
        ["MODEL.FOCAL.LOSS.NAME", "random_sampling", "VIS_PERIOD", "2"],
    ],
)
def test_validation_does_not_change_training(train, val, overrides):
    _, without = train("without", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()", *overrides)
    _, validated = train("validated", *val, *overrides)
    ours, theirs = (torch.load(x / "model_final.pth", weights_only=True) for x in (without, validated))
    for checkpoint in (ours, theirs):
        del checkpoint["trainer"]["hooks"]["Evaluation"]
    assert equal(ours["model"], theirs["model"])
    assert equal(ours["trainer"], theirs["trainer"])


def test_validation_writes_curves_and_test_sets_are_evaluated_at_the_end_only(train, val, monkeypatch):
    tested = []
    test = FocalTrainer.test.__func__

    def record(cls, cfg, model, evaluators=None):
        tested.append(cfg.DATASETS.TEST)
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(FocalTrainer, "test", classmethod(record))
    trainer, out = train("out", *val)
    assert len(tested) == 1
    last = metrics(out)[-1]
    names = {x for x in last if x.startswith("validation/")}
    assert {"validation/total_loss", "validation/loss_cls", "validation/loss_box_reg"} <= names
    assert {"validation/bbox/AP", "validation/bbox/AP50", "validation/bbox/AR@100"} <= names
    assert last["validation/total_loss"] == pytest.approx(
        last["validation/loss_cls"] + last["validation/loss_box_reg"]
    )
    assert "bbox/AP" in last
    assert trainer.last_results["bbox"]["AP"] == last["bbox/AP"]
    assert (out / "inference/held_out/analysis.json").is_file()


def test_best_metric_and_patience_use_the_validation_set(train, val, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "focal_d2")
    scores = iter([5.0, 4.0, 3.0])
    monkeypatch.setattr(
        "focal_d2.engine.trainer.validate", lambda *_: {"bbox": {"AP": next(scores)}, "total_loss": 1.0}
    )
    options = ["TEST.EVAL_PERIOD", "1", "TEST.FOCAL.BEST_METRIC", "bbox/AP", "TEST.FOCAL.PATIENCE", "2"]
    trainer, out = train("out", *val, *options)
    assert trainer.iter == 3
    assert torch.load(out / "model_best.pth", weights_only=True)["iteration"] == 0
    assert "validation/bbox/AP has not improved in 2 evaluations" in caplog.text
    assert "DATASETS.VAL is empty" not in caplog.text
    assert "AP" in trainer.last_results["bbox"]  # of the test set, after all


def saved(path: Path) -> OperatingPoint | None:
    return saved_point(torch.load(path, weights_only=True), str(path))


def test_operating_point_is_chosen_on_the_validation_set_and_saved(
    train, job, val, tmp_path, monkeypatch, caplog, capsys
):
    caplog.set_level(logging.INFO, "focal_d2")
    overrides = ["TEST.FOCAL.BEST_METRIC", "operating_point/f1", "TEST.FOCAL.OPERATING_POINT", "recall"]
    _, out = train("out", *val, *overrides, "TEST.FOCAL.WANTED", "0.05", "SOLVER.FOCAL.EMA", "0.5")
    of_val, of_test = (
        json.loads(file.read_text())["operating_point"]
        for file in (out / "inference/held_out/analysis.json", *out.glob("inference/squares*/analysis.json"))
    )
    point = saved(out / "model_final.pth")
    assert point is not None
    assert point._asdict() == of_val
    assert (point.goal.split(" (")[0], point.chosen_on, point.validation) == (
        "recall of at least 0.05", "held_out", True
    )  # fmt: skip
    # The test set is looked at from the same score on.
    assert {**of_test, **dict.fromkeys(("precision", "recall", "f1"))} == {
        **of_val, **dict.fromkeys(("precision", "recall", "f1"))
    }  # fmt: skip
    assert metrics(out)[-1]["operating_point/score"] == point.score
    assert f"operating point of model_final.pth: {point}" in caplog.text
    best = saved(out / "model_best.pth")
    assert best is not None
    assert best.chosen_on == "held_out"
    # So does an evaluation of the checkpoint.
    argv = ["--eval-only", "--config-file", job[0], *val, "OUTPUT_DIR", tmp_path / "eval"]
    assert run_main(monkeypatch, *argv, "MODEL.WEIGHTS", out / "model_final.pth") == 0
    analysis = json.loads((tmp_path / f"eval/inference/{job[1].name}/analysis.json").read_text())
    assert analysis["operating_point"] == of_test
    assert f"operating point: {point}" in capsys.readouterr().out


def test_operating_point_adds_nothing_else_to_the_last_checkpoint(train, val, monkeypatch):
    names = []
    save = FocalCheckpointer.save

    def record(self, name, **kwargs):
        before = self.read_torch_file(f"{self.save_dir}/{name}.pth") if name in names else None
        names.append(name)
        save(self, name, **kwargs)
        if before is not None:
            after = self.read_torch_file(f"{self.save_dir}/{name}.pth")
            assert after.pop("operating_point")
            for checkpoint in (before, after):
                checkpoint["trainer"]["hooks"]["Evaluation"].pop("operating_point", None)
            assert equal(before, after)

    monkeypatch.setattr(FocalCheckpointer, "save", record)
    train("out", *val, "TEST.EVAL_PERIOD", "0")
    assert names == ["model_0000003", "model_final", "model_final"]


def test_without_a_validation_set_lines_name_the_test_set(train, job, caplog):
    caplog.set_level(logging.INFO, "focal_d2")
    _, out = train("out", "TEST.FOCAL.BEST_METRIC", "bbox/AP")
    name = job[1].name
    line = f"DATASETS.VAL is empty: the best model is chosen by bbox/AP of the test set ({name})"
    assert line in caplog.text
    point = saved(out / "model_final.pth")
    assert point is not None
    assert (point.chosen_on, point.validation) == (name, False)
    assert f"best F1 on {name}, a test set (" in caplog.text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["TEST.FOCAL.BEST_METRIC", "AP"], 'BEST_METRIC is "AP"; the evaluation gives bbox/AP, '),
        (["DATASETS.VAL", "('misspelt',)"], 'DATASETS.VAL: dataset "misspelt" is not registered'),
    ],
)
def test_mistakes_are_found_before_training(job, val, overrides, message):
    with pytest.raises(UserError, match=message):
        check_job(str(job[0]), [*val, "TEST.EVAL_PERIOD", "2", *overrides])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"annotations": []}, 'DATASETS.VAL: dataset "held_out" has no box to test on'),
        ({"annotations": None}, 'DATASETS.VAL: dataset "held_out" has no annotations'),
        ({"categories": [{"id": k + 1, "name": f"other{k}"} for k in range(3)]}, "has the classes other0"),
    ],
)
def test_validation_sets_are_checked_as_test_sets_are(job, val, change, message):
    file = job[1].annotations.with_name("val.json")
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        check_job(str(job[0]), val)


def test_proposals_of_validation_sets_have_no_key(job, val):
    overrides = [*val, "MODEL.LOAD_PROPOSALS", "True"]
    cfg = load_config(str(job[0]), overrides, trust_files=True)
    with pytest.raises(UserError, match="no key names the proposals of DATASETS.VAL"):
        run_checks(cfg, "config")


def test_evaluation_alone_does_not_need_the_validation_set(job, val):
    job[1].annotations.with_name("val.json").unlink()
    cfg = load_config(str(job[0]), val)
    run_checks(cfg, "config", "datasets", "metrics", training=False)
    with pytest.raises(UserError, match="DATASETS.VAL"):
        run_checks(cfg, "datasets", training=True)


def batch(images: int) -> list[dict]:
    samples = []
    for i in range(images):
        instances = Instances((64, 64))
        boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 10.0, 44.0, 36.0]])
        instances.gt_boxes = Boxes(boxes[: 2 - i % 2])
        instances.gt_classes = torch.tensor([0, 1])[: 2 - i % 2]
        samples.append({"image": torch.rand(3, 64, 64) * 255, "instances": instances})
    return samples


def count_calls(monkeypatch, module: type, calls: list[int]) -> None:
    forward = module.forward

    def counted(self, *args):
        calls[0] += 1
        return forward(self, *args)

    monkeypatch.setattr(module, "forward", counted)


def test_losses_of_single_images_are_those_of_one_batch(monkeypatch):
    model = build_model(make_cfg(MODEL__FPN__NORM="BN", MODEL__FOCAL__LOSS__NORMALIZER="paper"))
    samples = batch(3)
    with EventStorage():
        model(samples)  # the running averages of batch norm are no longer the initial ones
    before = {k: x.clone() for k, x in model.state_dict().items()}
    called = []
    handle = model.register_forward_pre_hook(lambda module, _: called.append(module.training))
    measured, passes = ModelWithLosses(model), [0]
    model.eval()
    count_calls(monkeypatch, type(model.backbone), passes)
    for sample in samples:
        (output,) = measured([sample])
        assert "instances" in output
    handle.remove()
    monkeypatch.undo()
    assert called == [False] * 3  # hooks see the evaluation only
    assert passes == [3]  # detections and losses come from one pass
    assert equal(before, model.state_dict())
    model.training = True  # the model itself only: batch norm works as in evaluation
    with torch.no_grad(), EventStorage():
        expected = model(samples)
    losses = measured.mean_losses()
    assert set(losses) == {"loss_cls", "loss_box_reg", "total_loss"}
    for name, x in expected.items():
        assert losses[name] == pytest.approx(float(x), rel=1e-5)


def test_losses_of_all_processes_are_added_up(monkeypatch):
    measured = ModelWithLosses(build_model(make_cfg()))
    monkeypatch.setattr(
        comm,
        "all_gather",
        lambda _: [{"images": 2, "positives": 3.0, "of loss_cls": 6.0, "of loss_box_reg": 1.0}, {}] * 2,
    )
    assert measured.mean_losses() == {"loss_cls": 2.0, "loss_box_reg": 1 / 3, "total_loss": 2 + 1 / 3}


class _Other(nn.Module):
    """An architecture of a user's, whose loss is the mean of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, samples):
        assert not self.norm.training
        return torch.stack([x["image"].mean() for x in samples]).mean() if self.training else "detections"


def test_losses_of_other_models_are_means_over_images():
    measured = ModelWithLosses(_Other()).eval()
    for value in (1.0, 2.0, 6.0):
        assert measured([{"image": torch.full((3, 4, 4), value)}]) == "detections"
    assert measured.mean_losses() == {"loss": 3.0, "total_loss": 3.0}
