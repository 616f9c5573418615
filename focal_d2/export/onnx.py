"""ONNX files: the recorded detector with its metadata."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from focal_d2.errors import UserError
from focal_d2.export.graph import INPUT, OUTPUTS, Graph, example, recording
from focal_d2.storage.files import write_aside

# The newest one that all runtimes of the last years have; its group norm is made of older operators.
_OPSET = 17


def require(package: str) -> Any:
    """Import a package that only export needs.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this format needs {package} ({error}): pip install 'focal_d2[export]'") from error


def record_onnx(graph: Graph, *, channels: int) -> Any:
    """Record the detector: an `onnx.ModelProto` that takes any number of images of any size.

    PyTorch's older exporter is used: the newer one takes 20 times as long, and takes sizes of 1 for constants
    (docs/export.md).
    """
    onnx = require("onnx")
    axes = {INPUT: {0: "n", 1: "height", 2: "width"}, **{name: {0: "n"} for name in OUTPUTS}}
    with tempfile.TemporaryDirectory() as folder, recording():
        path = Path(folder) / "recorded.onnx"
        torch.onnx.export(
            graph,
            (example(channels),),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
        )
        return onnx.load(path)


def save_onnx(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write a model with its metadata, which replace its own: JSON texts, which `run.py` reads."""
    require("onnx").helper.set_model_props(model, {key: json.dumps(x) for key, x in metadata.items()})
    write_aside(str(path), lambda file: file.write(model.SerializeToString()))
