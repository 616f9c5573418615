"""Part 8: short trainings of the demo in the ways that a GPU has, then the whole demo.

Each training is a process of its own, as `focal-d2 train` starts it. A rehearsal trains on pictures that it
makes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard  # once for all trainings, which are forks
import yaml
from torch import Tensor

from focal_d2.analysis.gpu_check.lines import FUSED, Check, Line, Measurement
from focal_d2.analysis.gpu_check.processes import stream
from focal_d2.data.pixels import write_image
from focal_d2.engine.job import run as run_job
from focal_d2.storage.weights import read_torch

_CONFIG = "neon_trees/focal_retinanet_R_18_FPN_plain.yaml"
_CROP = 256  # pixels, of the demo's config
_MADE, _MADE_SIZE = "gpu_check_made", 64  # the rehearsal's dataset, and the side of its pictures
_WORKERS = 8
_DEMO_SECONDS, _COMPILE_SECONDS = 45.0, 60.0
_GRACE = 10.0
_LOG_FILE = "training.txt"
_RESULTS = ("bbox/AP", "bbox/AP50")
# Of the demo on a CPU, in per cent (README); a GPU's must not be far below.
_DEMO_AP50, _DEMO_MARGIN = 50.2, 5.0


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    (check.folder / _LOG_FILE).unlink(missing_ok=True)  # trainings append to it
    half = ["SOLVER.FOCAL.EMA", "0.99", "SOLVER.FOCAL.ACCUMULATE", "2"]
    if check.on_gpu:
        half += ["MODEL.FOCAL.AMP.DTYPE", "float16"]
    name = "training in bfloat16, with kernels"
    yield Measurement(name, partial(_train_shortly, check, name, list(FUSED)))
    name = "training in float16, EMA, batches in 2 parts"
    yield Measurement(name, partial(_train_shortly, check, name, half))
    yield Measurement("--resume", partial(_resume, check))
    yield Measurement("the demo", partial(_train_demo, check), _DEMO_SECONDS if check.on_gpu else 0.0)
    name = "training compiled, images of one shape"
    side = _CROP if check.on_gpu else _MADE_SIZE
    shape = ["MODEL.FOCAL.COMPILE", "True", "INPUT.MIN_SIZE_TRAIN", f"({side},)"]
    seconds = _COMPILE_SECONDS if check.on_gpu else 0.0
    yield Measurement(name, partial(_train_shortly, check, name, shape), seconds)


def _train_shortly(check: Check, name: str, overrides: list[str]) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        last = _train(check, Path(folder), "run", [*_short(check), *overrides])[-1]
    loss = last["total_loss"]
    beside = f"loss {loss:.3g} after {check.sizes.iterations} iterations"
    aim = "a finite loss"
    return [
        Line(name, 1000 * last["time"], "ms an iteration", beside, aim, math.isfinite(loss), details=last)
    ]


def _short(check: Check) -> list[str]:
    """Return the overrides of a short training that ends without an evaluation."""
    sizes = check.sizes
    values = {"SOLVER.MAX_ITER": sizes.iterations, "SOLVER.CHECKPOINT_PERIOD": sizes.stopped_after}
    return ["DATASETS.VAL", "()", "DATASETS.TEST", "()", *[str(x) for pair in values.items() for x in pair]]


def _resume(check: Check) -> list[Line]:
    """Train twice without a stop, and resume the first training's middle: the weights should be the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in ("first", "second"):
            _train(check, folder, run, _short(check), deterministic=True)
        resumed = folder / "resumed"
        resumed.mkdir()
        middle = f"model_{check.sizes.stopped_after - 1:07d}.pth"
        shutil.copy(folder / "first" / middle, resumed)
        (resumed / "last_checkpoint").write_text(middle)
        _train(check, folder, "resumed", _short(check), deterministic=True, resume=True)
        first, second, again = (_weights(folder / run) for run in ("first", "second", "resumed"))
    difference, spread = (float((x - first).abs().max()) for x in (again, second))
    return [
        Line(
            "--resume: largest difference of weights to the training without a stop",
            difference,
            beside=f"two trainings without a stop: {spread:.2g}",
            aim="0, or at most 3 × that of two trainings",
            met=difference <= 3 * spread,
        )
    ]


def _train_demo(check: Check) -> list[Line]:
    iterations = check.sizes.demo_iterations
    overrides = [] if iterations is None else ["SOLVER.MAX_ITER", str(iterations)]
    with tempfile.TemporaryDirectory() as folder:
        lines = _train(check, Path(folder), "demo", overrides)
    losses = [x for x in lines if "total_loss" in x]
    results = {key: value for x in lines for key, value in x.items() if key.endswith(_RESULTS)}
    ap50 = next((value for key, value in results.items() if key.endswith("test/bbox/AP50")), None)
    met = ap50 is not None and ap50 >= _DEMO_AP50 - _DEMO_MARGIN if check.on_gpu else None
    words = ", ".join(f"{key} {value:.1f}" for key, value in results.items())
    beside = f"{1000 * losses[-1]['time']:.0f} ms an iteration; {words}"
    aim = f"AP50 {_DEMO_AP50} on a CPU"
    return [
        Line("the demo: loss", losses[-1]["total_loss"], beside=beside, aim=aim, met=met, details=results)
    ]


def _train(
    check: Check,
    folder: Path,
    name: str,
    overrides: list[str],
    *,
    deterministic: bool = False,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Train in a process, and return the lines of its metrics.json; OUTPUT_DIR is a folder in `folder`."""
    output, config = folder / name, _CONFIG
    if check.on_gpu:
        overrides = ["DATALOADER.NUM_WORKERS", str(_WORKERS), *overrides]
    else:
        config = str(write_rehearsal(folder, check))
    args = argparse.Namespace(
        config_file=config,
        opts=["OUTPUT_DIR", str(output), "MODEL.DEVICE", check.device, *overrides],
        imports=[],
        trust_files=False,
        allow_download=False,
        eval_only=False,
        resume=resume,
    )
    log = check.folder / _LOG_FILE
    for _ in stream(_run, args, log, deterministic, seconds=check.seconds_left() + _GRACE, method="fork"):
        pass
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def _run(args: argparse.Namespace, log: Path, deterministic: bool) -> Iterator[None]:
    """Run a job whose output goes to a file."""
    with log.open("ab") as file:
        for stream_number in (1, 2):
            os.dup2(file.fileno(), stream_number)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    is_rehearsal = args.opts[args.opts.index("MODEL.DEVICE") + 1] == "cpu"
    # A rehearsal compiles nothing: it takes a minute.
    compiles_nothing = is_rehearsal and "MODEL.FOCAL.COMPILE" in args.opts
    with torch.compiler.set_stance("force_eager") if compiles_nothing else nullcontext():
        run_job(args)
    yield None


def _weights(folder: Path) -> Tensor:
    model = read_torch(str(folder / "model_final.pth"), trusted=False)["model"]
    return torch.cat([torch.as_tensor(x).double().flatten() for x in model.values()])


def write_rehearsal(folder: Path, check: Check) -> Path:
    """Write the config of a small training, and the pictures that it trains on; return the config's path."""
    sizes = check.sizes
    images = folder / "images"
    images.mkdir(exist_ok=True)
    random, records, boxes = np.random.default_rng(0), [], []
    for i in range(4):
        pixels = random.integers(0, 100, (_MADE_SIZE, _MADE_SIZE, 3), dtype=np.uint8)
        left, top = random.integers(0, _MADE_SIZE // 2, 2).tolist()
        pixels[top : top + 24, left : left + 24] = 255
        write_image(images / f"{i}.png", pixels)
        records.append({"id": i, "file_name": f"{i}.png", "width": _MADE_SIZE, "height": _MADE_SIZE})
        box = {"bbox": [left, top, 24, 24], "area": 576, "iscrowd": 0}
        boxes.append({"id": i + 1, "image_id": i, "category_id": 1, **box})
    annotations = folder / "boxes.json"
    annotations.write_text(
        json.dumps({"images": records, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]})
    )
    overrides = dict(zip(sizes.overrides[::2], sizes.overrides[1::2], strict=True))
    config: dict[str, Any] = {"_BASE_": _CONFIG}
    more = {
        "DATASETS.FOCAL": [{"NAME": _MADE, "ANNOTATIONS": str(annotations), "IMAGES": str(images)}],
        "DATASETS.TRAIN": [_MADE],
        "DATASETS.VAL": [],
        "DATASETS.TEST": [_MADE],
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.FOCAL.AMP.ENABLED": False,
        "SOLVER.IMS_PER_BATCH": 4,
        "MODEL.RETINANET.NORM": "",  # the last level of an image has one cell
        "INPUT.CROP.ENABLED": False,
        "INPUT.MIN_SIZE_TRAIN": [_MADE_SIZE],
        **{key: yaml.safe_load(value) for key, value in overrides.items()},
    }
    for key, value in more.items():
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    path = folder / "rehearsal.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
