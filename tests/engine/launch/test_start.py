"""Several processes of one job, connected by Gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.utils import comm

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.engine.launch import start
from focal_d2.engine.step import FocalLoop
from tests.conftest import REPOSITORY
from tests.engine.runs import metrics, run_main
from tests.engine.test_resume import last_checkpoint, saved
from tests.processes import run_in_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2's launcher would use the GPUs"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def command(job) -> list[str]:
    """A job without batch norm, whose statistics would be of a process's images only."""
    config, _ = job
    content = yaml.safe_load(config.read_text())
    content["MODEL"]["FPN"]["NORM"] = "GN"
    solver = {"OPTIMIZER": "SGD", "EMA": 0.5}
    content["SOLVER"].update(IMS_PER_BATCH=4, MAX_ITER=10, CHECKPOINT_PERIOD=5, FOCAL=solver)
    config.write_text(yaml.safe_dump(content))
    return [str(REPOSITORY / "train_net.py"), "--import", "tests.tiny", "--config-file", str(config)]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(x) for x in arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compare tensors by their norm, or 0.1: biases that began at 0 have no relative accuracy."""
    return float((a - b).norm() / b.norm().clamp(min=0.1))


def test_processes_give_what_one_gives(command, tmp_path, monkeypatch, capfd):
    one, two, torchrun = ((*command, "OUTPUT_DIR", tmp_path / name) for name in ("1", "2", "3"))
    assert run_main(monkeypatch, *one[1:]) == 0
    for job in ((sys.executable, two[0], "--num-gpus", "2", *two[1:]), (*TORCHRUN, "2", *torchrun)):
        done = run(*job)
        assert done.returncode == 0, done.stderr[-2000:]
    alone = weights(tmp_path / "1")
    figures = metrics(tmp_path / "1")[-1]
    for folder in (tmp_path / "2", tmp_path / "3"):
        for name, x in weights(folder).items():
            assert distance(x, alone[name]) < 1e-5, name
        assert metrics(folder)[-1]["bbox/AP"] == pytest.approx(figures["bbox/AP"], abs=1e-6)
        assert (folder / "log.txt.rank1").exists()

    # From half-way, two processes continue the run of one.
    (tmp_path / "1/last_checkpoint").write_text("model_0000004.pth")
    done = run(sys.executable, one[0], "--num-gpus", "2", "--resume", *one[1:])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes instead of 1: sums are rounded in another order" in done.stdout
    for name, x in weights(tmp_path / "1").items():
        assert distance(x, alone[name]) < 1e-5, name
    capfd.readouterr()
    assert run_main(monkeypatch, "--resume", *one[1:], "SOLVER.REFERENCE_WORLD_SIZE", "1") == 2
    assert "2 processes wrote the checkpoint" in capfd.readouterr().err


def children(pid: int) -> list[int]:
    """List the processes of a launcher that train."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in map(int, tasks):
        line = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"resource_tracker" not in line:
            found.append(child)
    return found


def wait_for_checkpoint(iteration: int, folder: Path, process: subprocess.Popen[str]) -> None:
    while last_checkpoint(folder) < iteration:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_a_process_ends_the_job(command, tmp_path, victim):
    arguments = [sys.executable, command[0], "--num-gpus", "2", *command[1:], "SOLVER.MAX_ITER", "100000"]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(4, tmp_path / "out", process)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = [x for x in errors.splitlines() if "error: " in x]
    # Which end the launcher sees first is a race that the victim all but always wins.
    assert f"process {victim} of 2 ended with SIGKILL, and the job with it; --resume continues" in line or (
        "another process of this job ended" in line
    )
    assert "Traceback" not in errors


def started(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a job, and wait until it trains."""
    process = subprocess.Popen(
        [*arguments, "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000"],
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics_file = folder / "metrics.json"
    while not metrics_file.exists() or '"iteration"' not in metrics_file.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_signal_to_the_launcher_saves_and_ends_all(command, tmp_path, stopped):
    process = started([sys.executable, command[0], "--num-gpus", "2", *command[1:]], tmp_path / "out")
    if stopped:
        os.kill(children(process.pid)[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    name = (tmp_path / "out/last_checkpoint").read_text()
    state = torch.load(tmp_path / "out" / name, weights_only=True)
    assert len(state["trainer"]["random"]) == 2


def test_a_signal_continues_a_stopped_worker():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
    worker.start()

    def stopped() -> bool:
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    os.kill(worker.pid, signal.SIGSTOP)
    while not stopped():
        time.sleep(0.01)
    with start.StopRequest(lambda number: None) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        while stopped():
            time.sleep(0.01)
    worker.kill()
    worker.join()


def test_torchrun_ends_a_job_of_which_a_process_is_stopped(command, tmp_path):
    process = started([*TORCHRUN, "2", *command], tmp_path / "out", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    ranks_of_job = children(process.pid)
    os.kill(ranks_of_job[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks_of_job)


HANGING = """
import argparse, os, signal, time
from focal_d2.engine.launch import start

def hang(args):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, b"ready\\n")  # in one piece, unlike print
    time.sleep(600)

if __name__ == "__main__":
    start._STOPPING = {limit}
    start.start(hang, argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto"))
"""


@pytest.mark.parametrize("limit, signals", [("1.0", 1), ("1e6", 2)], ids=["limit", "second signal"])
def test_processes_that_do_not_end_are_killed(tmp_path, limit, signals):
    (tmp_path / "hanging.py").write_text(HANGING.replace("{limit}", limit))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "hanging.py")],
        env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    for number in range(signals):
        time.sleep(number)  # closer together they count as one
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # returns when all processes have closed their output
    assert process.returncode == 143
    if signals == 1:
        assert "a process did not end within 1 seconds, and all are killed; --resume continues" in errors
    assert "Traceback" not in errors


def _train_with_a_bad_rank(_: Path, config: str, policy: str) -> None:
    backward = FocalLoop._backward

    def spoil(self, data):
        if self.iter == 2 and comm.get_rank() == 1:
            data[0]["instances"].gt_boxes.tensor[0, 2] = torch.inf
        return backward(self, data)

    FocalLoop._backward = spoil
    overrides = ["MODEL.FOCAL.LOSS.NAME", "ghm", "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()"]
    cfg = load_config(config, [*overrides, "SOLVER.FOCAL.ON_NONFINITE", policy])
    torch.manual_seed(0)
    trainer = FocalTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_one_process_finds_not_finite(command, tmp_path, policy, monkeypatch):
    """With GHM, whose processes exchange figures in the middle of the loss."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "out").mkdir()
    training = partial(run_in_processes, _train_with_a_bad_rank, tmp_path, command[-1], policy)
    if policy == "skip":
        training()
        assert saved(tmp_path / "out/model_final.pth")["iteration"] == 3
    else:
        with pytest.raises(Exception, match="NaN at iteration 2: bad annotation: box 0 of image"):
            training()
        assert last_checkpoint(tmp_path / "out") == 1
    written = tmp_path / "out/nonfinite_0000002/report_rank1.txt"
    assert written.read_text().startswith("Iteration 2 was not finite (rank 1).\n\nbad annotation: box 0")


def test_torchrun_restarts_from_the_last_checkpoint(command, tmp_path):
    arguments = [*TORCHRUN, "2", "--max-restarts", "1", *command, "--resume", "SOLVER.MAX_ITER", "30"]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(4, tmp_path / "out", process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    log = (tmp_path / "out/log.txt").read_text()
    starts = [int(x.split()[-1]) for x in log.splitlines() if "Starting training from iteration" in x]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 5
    assert torch.load(tmp_path / "out/model_final.pth", weights_only=True)["iteration"] == 29


def test_more_processes_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    start.check_devices(2, 1)
    with pytest.raises(UserError, match="--num-gpus 3 .* no CUDA device, and 2 cores"):
        start.check_devices(3, 1)
    with pytest.raises(UserError, match="both must be at least 1"):
        start.check_devices(0, 1)
