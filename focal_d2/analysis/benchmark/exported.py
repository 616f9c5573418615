"""Time from images to detections with the files of `focal-d2 export`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.inference import prepare_for_inference, whole_inference
from focal_d2.analysis.benchmark.models import build_ours, build_pair, make_batch
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.errors import UserError
from focal_d2.export import run
from focal_d2.export.graph import Graph, describe
from focal_d2.export.onnx import record_onnx, save_onnx
from focal_d2.export.quantise import quantise
from focal_d2.export.torchscript import load_torchscript, write_torchscript


def time_export(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """From images to detections with exported files, which compute in float32 or int8, and in Python.

    Raises:
        UserError: for another device than a CPU.
    """
    if torch.device(setting.device).type != "cpu":
        raise UserError("exported files are measured on the CPU: --device cpu")
    pair, batch = build_pair(cfg, setting), make_batch(setting)
    with torch.no_grad():
        prepare_for_inference(pair, batch)
    recorded = build_ours(cfg, setting._replace(precision="fp32")).eval()
    recorded.load_state_dict(pair.ours.state_dict())
    images = np.stack([x["image"].permute(1, 2, 0).numpy() for x in batch])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = _files(Graph(recorded).eval(), cfg, Path(folder), images)
        in_python = whole_inference(pair, batch, setting)
        times = timing.take_turns({**files, **in_python}, setting)
    return [
        timing.timed(
            f"{name}, {setting.batch} images",
            {**times, "ours": times[name], "limit": times["ours"]},
            "ours in Python",
        )
        for name in files
    ]


def _files(graph: Graph, cfg: CfgNode, folder: Path, images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Write a model in each format; return functions that run the files on images (N, H, W, 3)."""
    metadata = describe(cfg, class_names=[], threshold=0.0, precision="")
    script = folder / "model.ts"
    write_torchscript(graph, script, metadata, channels=images.shape[3])
    exact = record_onnx(graph, channels=images.shape[3])
    # Which images it is calibrated on does not change the time.
    models = {"ONNX": exact, "ONNX with int8": quantise(exact, [images[:1]])}
    runs: dict[str, Callable[[], Any]] = {"TorchScript": partial(load_torchscript(script), images)}
    for name, model in models.items():
        save_onnx(model, folder / name, metadata)
        detector = run.load(folder / name, threads=torch.get_num_threads())
        runs[name] = partial(detector.model, images)
    return runs
