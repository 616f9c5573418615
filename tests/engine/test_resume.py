"""Runs that stop, for any reason, and continue."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.engine.failures import failure_message
from focal_d2.engine.step import FocalLoop
from tests.conftest import REPOSITORY
from tests.engine.runs import metrics, run_main

# What an exact resumption has to bring back. Images are wider than 64 pixels so that the network computes in
# bfloat16 where the CPU's is trusted.
EVERYTHING = [
    *("MODEL.FOCAL.LOSS.NAME", "ghm", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "ghm_r"),
    *("SOLVER.FOCAL.EMA", "0.9", "MODEL.FOCAL.AMP.ENABLED", "True", "INPUT.FOCAL.BRIGHTNESS", "0.3"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
]


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Name what differs, however little, between two checkpoints."""
    if isinstance(a, dict):
        keys = [str(k) for k in a.keys() ^ b.keys()]
        return keys + [x for k in a.keys() & b.keys() for x in differences(a[k], b[k], f"{name}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [name]
        return [
            x for i, (u, v) in enumerate(zip(a, b, strict=True)) for x in differences(u, v, f"{name}/{i}")
        ]
    same = torch.equal(a, b) if torch.is_tensor(a) else a == b
    return [] if same else [name]


def last_checkpoint(folder: Path) -> int:
    """Return the iteration of the last checkpoint, -1 if there is none."""
    path = folder / "last_checkpoint"
    digits = "".join(x for x in path.read_text() if x.isdecimal()) if path.exists() else ""
    return int(digits) if digits else -1


def stop_after(monkeypatch, iteration: int, act) -> None:
    """Do something when an iteration is done, before any hook runs."""
    step = FocalLoop.run_step

    def run_step(self):
        step(self)
        if self.iter == iteration:
            act()

    monkeypatch.setattr(FocalLoop, "run_step", run_step)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_the_resumed_run_is_the_same_to_the_bit(
    job_file, tmp_path, monkeypatch, capfd, workers
):
    config = job_file
    common = ["--config-file", config, "DATALOADER.NUM_WORKERS", workers, *EVERYTHING]
    assert run_main(monkeypatch, *common, "OUTPUT_DIR", tmp_path / "whole") == 0
    for number, iteration in ((signal.SIGTERM, 2), (signal.SIGINT, 5)):
        with monkeypatch.context() as patch:
            stop_after(patch, iteration, lambda n=number: os.kill(os.getpid(), n))
            resume = [] if iteration == 2 else ["--resume"]
            assert run_main(patch, *resume, *common) == 128 + number
        assert (tmp_path / "out/last_checkpoint").read_text() == f"model_{iteration:07d}.pth"
        assert f"{number.name}: stopping after this iteration, with a checkpoint" in capfd.readouterr().err
        # No evaluation of a model that is not ready.
        assert not (tmp_path / "out/inference").exists()
    assert run_main(monkeypatch, "--resume", *common) == 0
    whole, parts = (saved(tmp_path / folder / "model_final.pth") for folder in ("whole", "out"))
    assert differences(whole, parts) == []
    assert [m for m in metrics(tmp_path / "whole") if "bbox/AP" in m][-1]["bbox/AP"] == pytest.approx(
        metrics(tmp_path / "out")[-1]["bbox/AP"], abs=0, nan_ok=True
    )
    # The checkpoint's model is the average; the trained weights are beside it.
    offered, trained = whole["model"], whole["trainer"]["_trainer"]["model"]
    assert not torch.equal(offered["head.cls_score.bias"], trained["head.cls_score.bias"])


def test_random_sampling_resumes_to_the_bit(job_file, tmp_path, monkeypatch):
    common = ["--config-file", job_file, "DATASETS.TEST", "()", "MODEL.FOCAL.LOSS.NAME", "random_sampling"]
    common += ["SOLVER.MAX_ITER", 4, "OUTPUT_DIR"]
    assert run_main(monkeypatch, *common, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_main(patch, *common, tmp_path / "parts") == 128 + signal.SIGTERM
    assert run_main(monkeypatch, "--resume", *common, tmp_path / "parts") == 0
    assert differences(*(saved(tmp_path / x / "model_final.pth") for x in ("whole", "parts"))) == []


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_same_to_the_bit(job_file, tmp_path):
    config = job_file
    common = [sys.executable, str(REPOSITORY / "train_net.py"), "--import", "tests.tiny"]
    common += ["--config-file", str(config)]
    overrides = [*EVERYTHING, "DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    overrides += ["DATASETS.TEST", "()"]
    run = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stderr": subprocess.PIPE,
        "stdout": subprocess.PIPE,
    }
    subprocess.run([*common, *overrides, "OUTPUT_DIR", str(tmp_path / "whole")], check=True, **run)
    rng, killed = np.random.default_rng(0), []
    for least in (1, 3):
        process = subprocess.Popen([*common, "--resume", *overrides], **run)
        while process.poll() is None and last_checkpoint(tmp_path / "out") < least:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # in a step, or while a checkpoint is written
        process.kill()
        process.communicate()
        killed.append(process.returncode)
    assert -signal.SIGKILL in killed  # a fast machine may have been done
    subprocess.run([*common, "--resume", *overrides], check=True, **run)
    whole, parts = (saved(tmp_path / folder / "model_final.pth") for folder in ("whole", "out"))
    assert differences(whole, parts) == []


def test_resuming_says_what_is_not_exact(job_file, tmp_path, monkeypatch):
    config = job_file
    stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(monkeypatch, "--config-file", config) == 143
    path = tmp_path / "out/model_0000002.pth"
    state = saved(path)["trainer"]
    numbers = {key: state["data"].pop(key) for key in ("image_content", "annotation_content")}
    assert state["data"] == {"images": 6, "batch": 2, "seed": 1}

    lines: list[str] = []
    monkeypatch.setattr("focal_d2.engine.trainer.logger.warning", lines.append)

    def warning_after(change: dict[str, Any], *overrides: str) -> str:
        trainer = FocalTrainer(load_config(str(config), overrides))
        lines.clear()
        trainer.load_state_dict({**state, **change})
        assert trainer.iter == 2
        return lines[0].partition("without a stop: ")[2] if lines else ""

    assert warning_after({}) == ""
    assert warning_after({}, "SEED", "5") == "SEED 5 instead of 1"
    assert warning_after({}, "SOLVER.IMS_PER_BATCH", "3") == "SOLVER.IMS_PER_BATCH 3 instead of 2"
    assert warning_after({"processes": 4}).startswith(
        "1 processes instead of 4: sums are rounded in another order"
    )
    state["data"] |= numbers
    assert warning_after({}) == ""
    for what in ("image", "annotation"):
        change = {**state["data"], f"{what}_content": 7}
        assert warning_after({"data": change}) == f"other {what}s in DATASETS.TRAIN"
    theirs = {key: state[key] for key in ("iteration", "hooks", "_trainer")}  # all that detectron2 writes
    state = {**theirs, "_trainer": {key: theirs["_trainer"][key] for key in ("iteration", "optimizer")}}
    assert (
        warning_after({})
        == "the checkpoint does not say which images were drawn; random generators start from new states"
    )


def test_a_drawn_seed_is_the_resumed_runs_too(job_file, tmp_path, monkeypatch):
    config = job_file
    stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(monkeypatch, "--config-file", config, "SEED", -1) == 143
    seed = saved(tmp_path / "out/model_0000002.pth")["trainer"]["data"]["seed"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "out/model_0000002.pth").rename(tmp_path / "whole/model_0000002.pth")
    (tmp_path / "out/last_checkpoint").rename(tmp_path / "whole/last_checkpoint")
    resume = ["--config-file", config, "--resume", "OUTPUT_DIR", tmp_path / "whole", "SEED"]
    assert run_main(monkeypatch, *resume, -1, "SOLVER.MAX_ITER", 5) == 0
    state = saved(tmp_path / "whole/model_final.pth")
    assert state["trainer"]["data"]["seed"] == seed
    (tmp_path / "whole/last_checkpoint").write_text("model_0000002.pth")
    assert run_main(monkeypatch, *resume, seed, "SOLVER.MAX_ITER", 5) == 0
    assert differences(state["model"], saved(tmp_path / "whole/model_final.pth")["model"]) == []


def test_a_new_run_keeps_an_earlier_ones_checkpoints_apart(job_file, tmp_path, monkeypatch):
    config = job_file
    run = ["--config-file", config, "SOLVER.MAX_ITER", 2]
    for _ in range(3):
        assert run_main(monkeypatch, *run) == 0
    folders = [tmp_path / "out", tmp_path / "out/earlier_1", tmp_path / "out/earlier_2"]
    for folder in folders:
        assert {"last_checkpoint", "model_final.pth", "metrics.json"} <= {x.name for x in folder.iterdir()}
        assert [m["iteration"] for m in metrics(folder)] == [1, 2]
    weights = [saved(folder / "model_final.pth")["model"] for folder in folders]
    assert differences(weights[0], weights[1]) == differences(weights[0], weights[2]) == []


@pytest.mark.parametrize("at", [4, 8])
def test_a_signal_breaks_an_evaluation_off(job_file, tmp_path, monkeypatch, at):
    run = ["--config-file", job_file, "TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 100]
    assert run_main(monkeypatch, *run, "OUTPUT_DIR", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        test = FocalTrainer.test

        def stop_and_test(*arguments):
            if len(calls) == at // 4 - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(None)
            return test(*arguments)

        calls: list[None] = []
        patch.setattr(FocalTrainer, "test", staticmethod(stop_and_test))
        assert run_main(patch, *run) == 143
    assert last_checkpoint(tmp_path / "out") == (3 if at == 4 else -1)  # model_final has no number
    assert run_main(monkeypatch, "--resume", *run) == 0
    evaluated = [
        {m["iteration"]: m["bbox/AP"] for m in metrics(tmp_path / folder) if "bbox/AP" in m}
        for folder in ("whole", "out")
    ]
    assert evaluated[0] == evaluated[1]
    whole, parts = (saved(tmp_path / folder / "model_final.pth") for folder in ("whole", "out"))
    assert differences(whole, parts) == []


def test_an_evaluation_in_which_the_run_was_stopped_is_made_up_for(job_file, tmp_path, monkeypatch):
    config = job_file
    run = ["--config-file", config, "TEST.EVAL_PERIOD", 4]
    assert run_main(monkeypatch, *run, "OUTPUT_DIR", tmp_path / "whole") == 0

    def fail(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(FocalTrainer, "test", fail)
        assert run_main(patch, *run) == 2
    assert run_main(monkeypatch, "--resume", *run) == 0
    evaluated = [
        {m["iteration"]: m["bbox/AP"] for m in metrics(tmp_path / folder) if "bbox/AP" in m}
        for folder in ("whole", "out")
    ]
    assert evaluated[0].keys() == {3, 8}
    assert evaluated[0] == evaluated[1]
    assert not (tmp_path / "whole/model_best.pth").exists()
    whole, parts = (saved(tmp_path / folder / "model_final.pth") for folder in ("whole", "out"))
    assert differences(whole, parts) == []


def spoil_images(data, iteration: int):
    for path in data.images.glob("*.png"):
        path.unlink()


def kill_workers(data, iteration: int):
    import multiprocessing

    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


def freeze_workers(data, iteration: int):
    import multiprocessing

    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    "act, workers, expected",
    [
        (spoil_images, 0, "cannot read image"),
        (spoil_images, 1, "cannot read image"),
        (kill_workers, 1, "a process that reads images was killed, most often because memory ran out"),
        (freeze_workers, 1, "no batch came in 3 seconds (DATALOADER.FOCAL.TIMEOUT): reading images hangs"),
    ],
)
def test_lost_data_lose_no_iteration(job_file, job, tmp_path, monkeypatch, capfd, act, workers, expected):
    config, (_, data) = job_file, job
    run = ["--config-file", config, "DATALOADER.NUM_WORKERS", workers, "DATALOADER.FOCAL.TIMEOUT", 3.0]
    run += ["SOLVER.CHECKPOINT_PERIOD", 1000, "SOLVER.MAX_ITER", 1000, "DATASETS.TEST", "()"]
    stop_after(monkeypatch, 2, lambda: act(data, 2))
    assert run_main(monkeypatch, *run) == 2
    captured = capfd.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("train_net.py: error: ")]
    assert expected in line
    last = saved(tmp_path / "out" / (tmp_path / "out/last_checkpoint").read_text())["iteration"]
    assert last >= 2
    assert f"; training so far is saved in model_{last:07d}.pth: --resume continues" in line
    assert "Traceback" not in captured.err + captured.out


def test_a_batch_in_parts_is_the_same_step(job_file, tmp_path, monkeypatch):
    config = job_file
    content = yaml.safe_load(config.read_text())
    content["SOLVER"].update(IMS_PER_BATCH=4, MAX_ITER=3, FOCAL={"OPTIMIZER": "SGD"})
    content["MODEL"]["FPN"]["NORM"] = "GN"  # batch norm sees the parts
    config.write_text(yaml.safe_dump(content))
    for parts in (1, 2, 4):
        overrides = [
            "SOLVER.FOCAL.ACCUMULATE",
            parts,
            "OUTPUT_DIR",
            tmp_path / str(parts),
            "DATASETS.TEST",
            "()",
        ]
        assert run_main(monkeypatch, "--config-file", config, *overrides) == 0
    whole, *others = (saved(tmp_path / str(n) / "model_final.pth")["model"] for n in (1, 2, 4))
    for other in others:
        for name, x in whole.items():
            torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-6, msg=name)
    first, last = (metrics(tmp_path / str(n))[-1] for n in (1, 4))
    for name in ("loss_cls", "loss_box_reg", "gradient_norm"):
        assert last[name] == pytest.approx(first[name], rel=1e-4)


def test_the_moving_average_starts_from_the_weights_that_are_loaded(job_file, tmp_path, monkeypatch):
    run = ["--config-file", job_file, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, *run, "OUTPUT_DIR", tmp_path / "start") == 0
    weights = ["MODEL.WEIGHTS", tmp_path / "start/model_final.pth", "SEED", 5]
    for decay in (0.0, 0.9):
        overrides = [*weights, "SOLVER.FOCAL.EMA", decay, "OUTPUT_DIR", tmp_path / str(decay)]
        assert run_main(monkeypatch, *run, *overrides) == 0
    # The first update takes the weights over.
    plain, averaged = (saved(tmp_path / x / "model_final.pth") for x in ("0.0", "0.9"))
    assert differences(plain["model"], averaged["model"]) == []
    assert differences(plain["model"], averaged["trainer"]["_trainer"]["model"]) == []


@pytest.mark.parametrize("before, after", [(0.9, 0.0), (0.0, 0.9)])
def test_the_moving_average_may_be_switched_when_resuming(job_file, tmp_path, monkeypatch, before, after):
    run = ["--config-file", job_file, "DATASETS.TEST", "()", "SOLVER.FOCAL.EMA"]
    assert run_main(monkeypatch, *run, 0.0, "OUTPUT_DIR", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_main(patch, *run, before) == 143
    assert run_main(monkeypatch, "--resume", *run, after) == 0
    whole, parts = (saved(tmp_path / folder / "model_final.pth") for folder in ("whole", "out"))
    trained = parts["trainer"]["_trainer"]["model"] if after else parts["model"]
    assert differences(whole["model"], trained) == []


@pytest.mark.parametrize("policy", ["stop", "skip", "halve_lr"])
def test_a_step_that_is_not_finite_changes_nothing(job_file, tmp_path, monkeypatch, capfd, policy):
    config = job_file
    run = ["--config-file", config, "SOLVER.FOCAL.ON_NONFINITE", policy, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, *run, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", tmp_path / "before") == 0
    backward = FocalLoop._backward

    def spoiled(self, data):
        losses = backward(self, data)
        if self.iter == 3:
            losses["loss_cls"] = losses["loss_cls"] * float("nan")
        return losses

    monkeypatch.setattr(FocalLoop, "_backward", spoiled)
    status = run_main(monkeypatch, *run, "SOLVER.MAX_ITER", 4)
    captured = capfd.readouterr()
    what = "the loss or gradient became infinite or NaN at iteration 3"
    assert what in captured.out + captured.err
    name = "model_0000002.pth" if policy == "stop" else "model_final.pth"
    before, after = saved(tmp_path / "before/model_final.pth"), saved(tmp_path / "out" / name)
    assert differences(before["model"], after["model"]) == []
    trainers = before["trainer"], after["trainer"]
    optimizers = [x["_trainer"]["optimizer"] for x in trainers]
    assert differences(optimizers[0]["state"], optimizers[1]["state"]) == []
    rates = [x["hooks"]["LRScheduler"]["base_lrs"][0] for x in trainers]
    assert rates[1] == rates[0] / (2 if policy == "halve_lr" else 1)
    assert status == (2 if policy == "stop" else 0)
    if policy != "stop":
        assert max(m["iteration"] for m in metrics(tmp_path / "out")) == 3


def test_skipping_without_end_is_given_up(job_file, monkeypatch, capfd):
    monkeypatch.setattr(FocalLoop, "_backward", lambda self, data: {"loss_cls": torch.tensor(float("inf"))})
    run = ["--config-file", job_file, "SOLVER.FOCAL.ON_NONFINITE", "skip", "SOLVER.MAX_ITER", 50]
    assert run_main(monkeypatch, *run) == 2
    assert "10 steps in a row were skipped" in capfd.readouterr().err
    assert run_main(monkeypatch, "--resume", *run) == 2
    assert "10 steps in a row were skipped" in capfd.readouterr().err


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("SOLVER.FOCAL.EMA", "1.0", "at least 0 and below 1 .0: none"),
        ("SOLVER.FOCAL.ACCUMULATE", "3", "within 1 and the 2 images"),
        ("SOLVER.FOCAL.ACCUMULATE", "0", "it must be at least 1"),
        ("SOLVER.FOCAL.ON_NONFINITE", "ignore", "legal values: stop, skip, halve_lr"),
        ("DATALOADER.FOCAL.TIMEOUT", "-1.0", "at least 0 .*0: no limit"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "it must be at least 1"),
        ("SOLVER.MAX_ITER", "0", "it must be at least 1"),
        ("SOLVER.WARMUP_ITERS", "-1", "at least 0 .*0: no warm-up"),
        ("SOLVER.WARMUP_METHOD", "foo", "legal values: constant, linear"),
        ("TEST.EVAL_PERIOD", "-5", "at least 0 .*0: at the end only"),
        ("INPUT.CROP.TYPE", "foo", "legal values: absolute, absolute_range, relative, relative_range"),
        ("INPUT.RANDOM_FLIP", "foo", "legal values: horizontal, vertical, none"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo", "legal values: choice, range"),
        ("VIS_PERIOD", "-1", "at least 0"),
    ],
)
def test_bad_values_are_refused(job_file, key, value, expected):
    with pytest.raises(UserError, match=f"{key} is .*{expected}"):
        FocalTrainer(load_config(str(job_file), ["INPUT.CROP.ENABLED", "True", key, value]))


def test_a_full_disk_under_the_figures_is_one_line(job_file, monkeypatch, capfd):
    def write(self):
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.json")

    monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", write)
    assert run_main(monkeypatch, "--config-file", job_file) == 2
    captured = capfd.readouterr()
    (line,) = [x for x in captured.err.splitlines() if "error: " in x]
    assert "out/metrics.json: No space left on device; --resume continues from " in line
    assert "Traceback" not in captured.err + captured.out


def test_scaled_losses_train_the_same(job_file, tmp_path, monkeypatch):
    """float16 needs a GPU; its gradient scaler does not."""

    def run(name: str, scaler: torch.amp.GradScaler, spoil: int = -1) -> dict[str, Any]:
        cfg = load_config(str(job_file), ["OUTPUT_DIR", str(tmp_path / name), "DATASETS.TEST", "()"])
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(False)
        trainer.loop.scaler = scaler
        if spoil >= 0:
            backward = FocalLoop._backward

            def overflow(self, data):
                losses = backward(self, data)
                if self.iter == spoil:
                    next(self.bare.parameters()).grad.fill_(torch.inf)
                return losses

            monkeypatch.setattr(FocalLoop, "_backward", overflow)
        trainer.train()
        return saved(tmp_path / name / "model_final.pth")

    plain = run("plain", torch.amp.GradScaler("cpu", enabled=False))
    scaled = run("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))  # a power of two rounds nothing
    assert differences(plain["model"], scaled["model"]) == []
    assert scaled["trainer"]["_trainer"]["grad_scaler"]["scale"] == 1024.0
    overflown = run("overflown", torch.amp.GradScaler("cpu", init_scale=1024.0), spoil=3)
    assert overflown["trainer"]["_trainer"]["grad_scaler"]["scale"] == 512.0
    assert differences(plain["model"], overflown["model"]) != []
    assert all(x.isfinite().all() for x in overflown["model"].values())


@pytest.fixture
def checkpoint(job_file, tmp_path, monkeypatch):
    """Train for 3 iterations; what is made resumes, and returns the trainer and the line that it logs."""

    def train(*overrides: str, kind: type[FocalTrainer] = FocalTrainer, spoilt: tuple[int, ...] = ()):
        (tmp_path / "out").mkdir()
        trainer = kind(load_config(str(job_file), ["DATASETS.TEST", "()", *overrides]))
        trainer.resume_or_load(False)
        trainer.max_iter = 3  # as if it had been stopped
        backward = FocalLoop._backward

        def spoil(self, data):
            losses = backward(self, data)
            if self.iter in spoilt:
                next(self.bare.parameters()).grad.fill_(torch.inf)
            return losses

        with monkeypatch.context() as patch:
            patch.setattr(FocalLoop, "_backward", spoil)
            trainer.train()

        def resume(*more: str) -> tuple[FocalTrainer, str]:
            lines: list[str] = []
            resumed = kind(load_config(str(job_file), ["DATASETS.TEST", "()", *overrides, *more]))
            with monkeypatch.context() as patch:
                patch.setattr("focal_d2.engine.trainer.logger.warning", lines.append)
                resumed.resume_or_load(True)
            assert resumed.start_iter == 3
            assert len(lines) <= 1
            return resumed, "".join(lines)

        return resume

    return train


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: x for k, x in group.items() if k != "params"} for group in optimizer.param_groups]


def tensors_by_name(trainer: FocalTrainer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in trainer.loop.bare.named_parameters()}
    return {names[id(parameter)]: state for parameter, state in trainer.optimizer.state.items()}


CHANGES = [
    {"BASE_LR": "0.01"},
    {"WEIGHT_DECAY": "0.01"},
    {"WEIGHT_DECAY_NORM": "0.5"},
    {"WEIGHT_DECAY_BIAS": "0.0"},
    {"BIAS_LR_FACTOR": "2.0"},
    {"MOMENTUM": "0.5"},
    {"NESTEROV": "True"},
    {"GAMMA": "0.5", "STEPS": "(2,)"},
    {"STEPS": "(3,)", "MAX_ITER": "20"},
    {"WARMUP_ITERS": "6", "WARMUP_FACTOR": "0.5", "WARMUP_METHOD": "constant"},
    {"LR_SCHEDULER_NAME": "WarmupCosineLR"},
    {"BASE_LR": "0.01", "WEIGHT_DECAY_NORM": "0.5", "WEIGHT_DECAY_BIAS": "0.5", "BIAS_LR_FACTOR": "2.0"},
    {"BASE_LR": "0.0"},
]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_changed_config_wins_over_the_checkpoint(checkpoint, optimizer):
    resume = checkpoint("SOLVER.FOCAL.OPTIMIZER", optimizer)
    before, line = resume()
    assert line == ""
    tensors = tensors_by_name(before)
    for changes in CHANGES:
        overrides = [x for key, value in changes.items() for x in (f"SOLVER.{key}", value)]
        trainer, line = resume(*overrides)
        fresh = FocalTrainer.build_optimizer(trainer.cfg, trainer.loop.bare)
        schedule = FocalTrainer.build_lr_scheduler(trainer.cfg, fresh)
        for _ in range(3):
            schedule.step()
        # Of each setting, learning rates included, what a new run of this config has in this iteration.
        assert settings_of(trainer.optimizer) == settings_of(fresh)
        assert trainer.scheduler.base_lrs == schedule.base_lrs
        assert line.startswith("--resume: the config has changed and is followed: ")
        for key, value in changes.items():
            assert re.search(rf"SOLVER.{key} from [^;]+ to {re.escape(value)}(;|$)", line)
        # Momenta stay with their parameters, in whatever groups these are now.
        assert differences(tensors, tensors_by_name(trainer)) == []
    trainer.train()


def test_a_changed_accumulation_is_named(checkpoint):
    _, line = checkpoint()("SOLVER.FOCAL.ACCUMULATE", "2")
    assert line.endswith(": SOLVER.FOCAL.ACCUMULATE from 1 to 2")


@pytest.mark.parametrize("edit", ["", "old"])
def test_halvings_are_kept_until_the_base_rate_changes(checkpoint, tmp_path, edit):
    resume = checkpoint("SOLVER.FOCAL.ON_NONFINITE", "halve_lr", spoilt=(1, 2))
    if edit:
        forget_settings(tmp_path / "out/model_final.pth")
    for overrides in ((), ("SOLVER.MAX_ITER", "20", "SOLVER.WEIGHT_DECAY", "0.5")):
        trainer, line = resume(*overrides)
        assert trainer.scheduler.base_lrs == [0.001 / 4] * len(trainer.optimizer.param_groups)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == trainer.scheduler.base_lrs
        assert "halvings" not in line
    trainer, line = resume("SOLVER.BASE_LR", "0.0004")
    assert set(trainer.scheduler.base_lrs) == {0.0004}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0004}
    changed = "lr from 0.001 to 0.0004" if edit else "SOLVER.BASE_LR from 0.001 to 0.0004"
    assert line.partition(" is followed: ")[2] == (
        f"{changed}; 2 halvings of the learning rate (SOLVER.FOCAL.ON_NONFINITE) are dropped"
    )


def forget_settings(path: Path) -> None:
    content = saved(path)
    del content["trainer"]["settings"]
    torch.save(content, path)


def test_a_checkpoint_without_settings_resumes(checkpoint, tmp_path):
    resume = checkpoint("SOLVER.FOCAL.OPTIMIZER", "SGD")
    before = settings_of(resume()[0].optimizer)
    forget_settings(tmp_path / "out/model_final.pth")
    trainer, line = resume()
    assert (settings_of(trainer.optimizer), line) == (before, "")
    trainer, line = resume("SOLVER.MOMENTUM", "0.5", "SOLVER.BASE_LR", "0.01")
    assert {(group["momentum"], group["lr"]) for group in trainer.optimizer.param_groups} == {(0.5, 0.01)}
    assert line.endswith(" is followed: lr from 0.001 to 0.01; momentum from 0.9 to 0.5")
    with pytest.raises(UserError, match="does not name its parameters.*BIAS_LR_FACTOR"):
        resume("SOLVER.BIAS_LR_FACTOR", "2.0")


def test_parameters_may_be_frozen_when_resuming(checkpoint):
    resnet = ["MODEL.BACKBONE.NAME", "build_focal_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", "50"]
    for key in ("STEM_OUT_CHANNELS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS"):
        resnet += [f"MODEL.RESNETS.{key}", "8"]
    trainer, line = checkpoint(*resnet)("MODEL.BACKBONE.FREEZE_AT", "2")
    assert "parameters that are now no longer trained: " in line
    trainer.train()


def test_skipped_steps_in_a_row_are_counted_on(checkpoint):
    loop = checkpoint()()[0].loop
    loop.steps_skipped = 3
    state = loop.state_dict()
    loop.steps_skipped = 0
    loop.load_state_dict(state)
    assert loop.steps_skipped == 3


class OwnTrainer(FocalTrainer):
    """An optimizer and a schedule of the user's, whose numbers change during training."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.RMSprop(model.parameters(), lr=cfg.SOLVER.BASE_LR, alpha=cfg.SOLVER.MOMENTUM)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=cfg.SOLVER.GAMMA)

    def after_step(self):
        self.optimizer.param_groups[0]["eps"] = 10.0 ** -(self.iter + 5)
        super().after_step()


def test_an_optimizer_and_a_schedule_of_the_users_resume(checkpoint):
    resume = checkpoint(kind=OwnTrainer)
    trainer, line = resume()
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["alpha"], group["eps"]) == (pytest.approx(1e-4), 0.9, 1e-7)
    assert line == ""
    trainer, line = resume("SOLVER.BASE_LR", "0.01", "SOLVER.MOMENTUM", "0.5", "SOLVER.GAMMA", "0.7")
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["alpha"], group["eps"]) == (pytest.approx(1e-3), 0.5, 1e-7)
    assert trainer.scheduler.gamma == 0.1
    assert line.endswith("; StepLR takes its other numbers from the checkpoint")


SPOILT = {
    "optimizer": lambda s: s["_trainer"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "expanded": lambda s: s["_trainer"]["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1).expand(10**6, 10**6)
    ),
    "weight decay": lambda s: s["_trainer"]["optimizer"]["param_groups"][0].update(weight_decay=2**70),
    "schedule": lambda s: s["hooks"]["LRScheduler"].update(last_epoch=2**70),
    "evaluation": lambda s: s["hooks"]["Evaluation"].update(evaluated=None),
    "moment": lambda s: s["_trainer"]["optimizer"]["state"][0].update(exp_avg=2**70),
    "betas": lambda s: s["_trainer"]["optimizer"]["param_groups"][0].update(betas=(0.9, "x")),
    "settings": lambda s: s["settings"]["groups"].pop(),
    "images": lambda s: s["data"].update(images=10**15),
    "rate": lambda s: s["hooks"]["LRScheduler"].update(base_lrs="x"),
    "method": lambda s: s["hooks"]["LRScheduler"].update(get_lr=1.0),
    "iteration": lambda s: s.update(iteration=-100),
    "generators": lambda s: s["random"][0].update(torch=torch.zeros(4, dtype=torch.uint8)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_checkpoint_whose_state_can_not_be_is_passed_over(job_file, tmp_path, monkeypatch, capfd, spoil):
    run = ["--config-file", job_file, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, *run, "SOLVER.MAX_ITER", 4) == 0
    path = tmp_path / "out/model_final.pth"
    content = saved(path)
    spoil(content["trainer"])
    torch.save(content, path)
    capfd.readouterr()
    assert run_main(monkeypatch, "--resume", *run, "SOLVER.MAX_ITER", 5) == 0
    output = capfd.readouterr().out
    assert "model_final.pth" in output.partition("WARNING")[2]
    assert "trying model_0000003.pth" in output
    assert saved(path)["iteration"] == 4


def test_a_run_of_which_only_the_end_is_left_goes_on(job_file, tmp_path, monkeypatch, capfd):
    run = ["--config-file", job_file, "DATASETS.TEST", "()", "SOLVER.MAX_ITER"]
    assert run_main(monkeypatch, *run, 2) == 0
    (tmp_path / "out/last_checkpoint").unlink()
    assert run_main(monkeypatch, "--resume", *run, 3) == 0
    assert saved(tmp_path / "out/model_final.pth")["iteration"] == 2
    assert not (tmp_path / "out/earlier_1").exists()
    for most in (3, 1):
        capfd.readouterr()
        assert run_main(monkeypatch, "--resume", *run, most) == 0
        line = f"3 iterations are done and SOLVER.MAX_ITER is {most}: nothing is left to train"
        assert line in capfd.readouterr().out


def test_other_errors_are_not_told_away():
    assert failure_message(RuntimeError("shape mismatch")) is None
    no_compiler = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no g++")
    assert "MODEL.FOCAL.COMPILE True: the model can't be compiled: InductorError" in str(
        failure_message(no_compiler)
    )
    assert "out of memory: 3 GiB" in str(failure_message(torch.OutOfMemoryError("CUDA\n3 GiB")))
