"""Several processes of one job, connected by Gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from focal_d2 import UserError
from focal_d2.engine import ranks
from tests.conftest import REPOSITORY
from tests.engine.runs import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2's launcher would use the GPUs"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def command(small_job) -> list[str]:
    """A job without batch norm, whose statistics would be of a process's images only."""
    config = small_job
    content = yaml.safe_load(config.read_text())
    # Group norm has 32 groups.
    content["MODEL"]["RESNETS"].update(
        STEM_OUT_CHANNELS=32, WIDTH_PER_GROUP=32, RES2_OUT_CHANNELS=32, NORM="GN"
    )
    content["MODEL"]["FPN"]["NORM"] = "GN"
    content["SOLVER"].update(IMS_PER_BATCH=4, MAX_ITER=10, CHECKPOINT_PERIOD=2, FOCAL={"OPTIMIZER": "SGD"})
    config.write_text(yaml.safe_dump(content))
    return [str(REPOSITORY / "train_net.py"), "--config-file", str(config)]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(x) for x in arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_processes_give_what_one_gives(command, tmp_path):
    one, two, four = ((*command, "OUTPUT_DIR", tmp_path / name) for name in ("1", "2", "4"))
    # Four under torchrun, where a machine of two cores may have more processes than cores.
    for job in (
        (sys.executable, *one),
        (sys.executable, two[0], "--num-gpus", "2", *two[1:]),
        (*TORCHRUN, "4", *four),
    ):
        done = run(*job)
        assert done.returncode == 0, done.stderr[-2000:]
    alone = weights(tmp_path / "1")
    figures = metrics(tmp_path / "1")[-1]
    for folder in (tmp_path / "2", tmp_path / "4"):
        for name, x in weights(folder).items():
            # Of a tensor's norm: an element near 0 has no relative accuracy.
            difference = (x - alone[name]).norm() / alone[name].norm().clamp(min=1e-3)
            assert difference < 1e-5, name
        assert metrics(folder)[-1]["bbox/AP"] == pytest.approx(figures["bbox/AP"], abs=1e-6)
        assert (folder / "log.txt.rank1").exists()


def children(pid: int) -> list[int]:
    """List the processes of a launcher that train."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in map(int, tasks):
        line = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"resource_tracker" not in line:
            found.append(child)
    return found


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_a_process_ends_the_job(command, tmp_path, victim):
    arguments = [sys.executable, command[0], "--num-gpus", "2", *command[1:], "SOLVER.MAX_ITER", "100000"]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "out/model_0000001.pth", process)
    time.sleep(1)
    os.kill(sorted(children(process.pid))[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = [x for x in errors.splitlines() if "error: " in x]
    assert line == (
        f"train_net.py: error: process {victim} of 2 ended with SIGKILL, and the job with it; --resume goes "
        "on from the last checkpoint"
    )
    assert "Traceback" not in errors


def test_a_signal_to_the_launcher_saves_and_ends_all(command, tmp_path):
    arguments = [sys.executable, command[0], "--num-gpus", "2", *command[1:], "SOLVER.MAX_ITER", "100000"]
    arguments += ["SOLVER.CHECKPOINT_PERIOD", "100000"]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while '"iteration"' not in (
        (tmp_path / "out/metrics.json").read_text() if (tmp_path / "out/metrics.json").exists() else ""
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    name = (tmp_path / "out/last_checkpoint").read_text()
    state = torch.load(tmp_path / "out" / name, weights_only=True)
    assert len(state["trainer"]["random"]) == 2


def test_torchrun_restarts_from_the_last_checkpoint(command, tmp_path):
    arguments = [*TORCHRUN, "2", "--max-restarts", "1", *command, "SOLVER.MAX_ITER", "30"]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "out/model_0000003.pth", process)
    os.kill(sorted(children(process.pid))[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    log = (tmp_path / "out/log.txt").read_text()
    starts = [int(x.split()[-1]) for x in log.splitlines() if "Starting training from iteration" in x]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 4
    assert torch.load(tmp_path / "out/model_final.pth", weights_only=True)["iteration"] == 29


def test_more_processes_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    ranks.check_devices(2, 1)
    with pytest.raises(UserError, match="--num-gpus 3 .* no CUDA device here, and 2 cores"):
        ranks.check_devices(3, 1)
    with pytest.raises(UserError, match="both must be at least 1"):
        ranks.check_devices(0, 1)


@pytest.mark.parametrize(
    "text, lost",
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4021", True),
        ("Socket Timeout", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_lost_processes_are_recognised(monkeypatch, text, lost):
    assert not ranks.peer_is_lost(RuntimeError(text))  # of one process, none is lost
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    assert ranks.peer_is_lost(RuntimeError(text)) == lost
