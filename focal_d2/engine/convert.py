"""Convert a file of torchvision's weights to a checkpoint and its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.modeling import build_model

from focal_d2.errors import UserError, describe_error, reason
from focal_d2.load_config import load_config
from focal_d2.storage.checkpoint import FocalCheckpointer
from focal_d2.storage.files import write_aside
from focal_d2.storage.pickles import ForbiddenImportError
from focal_d2.storage.torchvision_weights import Converted, convert
from focal_d2.storage.weights import read_torch


def convert_file(
    file: Path, folder: Path, *, norm_eps: float, classes: Sequence[int] | None
) -> tuple[Path, Converted]:
    """Write weights.pth and config.yaml, and load them once to see that they fit each other.

    Args:
        file: what `torch.save(model.state_dict(), …)` of a ResNet or RetinaNet of torchvision wrote.
        folder: for the two files, none of which may exist.
        norm_eps: see `convert`.
        classes: see `convert`.

    Returns:
        The path of config.yaml, and what was written.

    Raises:
        UserError: if the file can't be read or converted, or the results can't be written.
    """
    weights, config = folder / "weights.pth", folder / "config.yaml"
    for path in (weights, config):
        if path.exists():
            raise UserError(f"{path} exists; choose another --output")
    try:
        content = read_torch(str(file), trusted=False)
    except ForbiddenImportError as error:
        raise UserError(f"{file}: {reason(error)}") from error
    except Exception as error:  # a damaged file fails in whatever way its bytes bring about
        raise UserError(f"cannot read {file}: {describe_error(error, lines=1)}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # of torchvision's training script
    if not isinstance(content, dict):
        raise UserError(f"{file} has a {type(content).__name__}, not a dictionary of weights")
    converted = convert(content, norm_eps=norm_eps, classes=classes)
    settings = {"_BASE_": "Base-FocalRetinaNet.yaml", **converted.settings}
    settings["MODEL"] = {"WEIGHTS": str(weights), **settings["MODEL"]}
    needed = "DATASETS and SOLVER" if converted.is_detector else "DATASETS, SOLVER and the number of classes"
    header = f"# Weights of torchvision, converted from {file.name} by focal-d2 convert. Add {needed}.\n"
    text = header + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(str(weights), lambda x: torch.save({"model": converted.weights}, x))
        write_aside(str(config), lambda x: x.write(text.encode()))
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"])
    FocalCheckpointer(build_model(cfg), partial=not converted.is_detector).load(str(weights))
    return config, converted
