"""Save a step that was not finite, and replay it: without the dataset, and without code from the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from focal_d2.config import add_focal_config
from focal_d2.config.legal_values import check_values
from focal_d2.engine.nonfinite.examination import examine
from focal_d2.engine.nonfinite.facts import Step
from focal_d2.engine.nonfinite.report import Report
from focal_d2.errors import UserError, describe_error, first_few
from focal_d2.modeling.build import build_without_memory, building, resolve_device
from focal_d2.modeling.retinanet import precision_around
from focal_d2.storage.files import write_aside
from focal_d2.storage.weights import read_torch
from focal_d2.storage.yaml_text import parse_yaml


class SavedStep(NamedTuple):
    """A step as `save_step` wrote it."""

    file: Path
    config: str  # YAML
    model: dict[str, Any]  # state from before the step
    batch: list[dict[str, Any]]
    losses: dict[str, float]
    steps: list[Step]
    normalizer: float | None
    iteration: int
    random: Tensor  # state of torch's generator on the CPU
    cuda_random: Tensor | None  # and on the GPU that the model was on


class Replay(NamedTuple):
    """A saved step, repeated."""

    report: Report
    reproduced: bool
    terms: dict[str, str]  # of each loss, how it compares


def save_step(
    folder: str | Path,
    *,
    cfg: CfgNode,
    model: nn.Module,
    batch: Sequence[dict[str, Any]],
    losses: dict[str, float],
    steps: Sequence[Step],
    normalizer: float | None,
    iteration: int,
    rank: int,
    report: Report,
) -> Path:
    """Write `folder`/nonfinite_NNNNNNN: report.txt, report.json and step_rankN.pth.

    Each file is written aside and renamed. The reports of other ranks than 0 have the rank in their names.

    Args:
        folder: OUTPUT_DIR.
        cfg: that the model was built from, with NUM_CLASSES and ALPHA as numbers.
        model: with parameters, buffers and torch's random state from before the step.
        batch: N mapped samples, as the model got them.
        losses: of the step that failed.
        steps: the last iterations, oldest first.
        normalizer: the divisor of the losses, or None.
        iteration: of the step that failed.
        rank: of this process.
        report: of `examine`.

    Returns:
        The folder that was written.
    """
    target = Path(folder) / f"nonfinite_{iteration:07d}"
    target.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    content = {
        "config": cfg.dump(),
        "model": model.state_dict(),
        "batch": [_plain_sample(x) for x in batch],
        "losses": {name: float(x) for name, x in losses.items()},
        "steps": [_plain_step(x) for x in steps],
        "normalizer": None if normalizer is None else float(normalizer),
        "iteration": iteration,
        "rank": rank,
        "learning_rate": float(steps[-1].learning_rate) if steps else None,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    write_aside(str(target / f"step_rank{rank}.pth"), lambda file: torch.save(content, file))
    suffix = f"_rank{rank}" if rank else ""
    facts = json.dumps(report.as_dict(), indent=1, allow_nan=False).encode()
    write_aside(str(target / f"report{suffix}.json"), lambda file: file.write(facts))
    heading = f"Iteration {iteration} was not finite (rank {rank}).\n\n"
    page = (heading + report.text()).encode()
    write_aside(str(target / f"report{suffix}.txt"), lambda file: file.write(page))
    return target


def _plain_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a mapped sample that `weights_only` can load; masks and others are left out."""
    plain: dict[str, Any] = {}
    for name, x in sample.items():
        if isinstance(x, Tensor):
            plain[name] = _copy(x)
        elif isinstance(x, np.generic):
            plain[name] = x.item()
        elif isinstance(x, (int, float, str)):
            plain[name] = x
    if "instances" in sample:
        fields = sample["instances"].get_fields()
        plain["instances"] = {
            "image_size": [int(x) for x in sample["instances"].image_size],
            "boxes": {name: _copy(x.tensor) for name, x in fields.items() if isinstance(x, Boxes)},
            "tensors": {name: _copy(x) for name, x in fields.items() if isinstance(x, Tensor)},
        }
    return plain


def _copy(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()  # torch.save would write the whole storage of a slice


def _plain_step(step: Step) -> list[Any]:
    losses = {name: float(x) for name, x in step.losses.items()}
    return [int(step.iteration), float(step.learning_rate), losses, float(step.gradient_norm)]


def load_step(folder: str | Path) -> SavedStep:
    """Read what `save_step` wrote; of several ranks' steps, the first whose losses are not finite.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    files = sorted(Path(folder).glob("step_rank*.pth"))
    if not files:
        raise UserError(f"{folder} has no saved step (step_rank0.pth); give an OUTPUT_DIR/nonfinite_NNNNNNN")
    saved = [_load(file) for file in files]
    return next((x for x in saved if not all(map(math.isfinite, x.losses.values()))), saved[0])


def _load(file: Path) -> SavedStep:
    try:
        content = read_torch(str(file), trusted=False)
    except Exception as error:
        # A damaged file may raise any exception. Only the first line is shown: PyTorch's other lines advise
        # to load the file unsafely.
        raise UserError(f"{file} cannot be read: {describe_error(error, lines=1)}") from error
    if not isinstance(content, dict) or content.keys() != _FIELDS.keys():
        raise UserError(f"{file} is no saved step: it must hold {', '.join(sorted(_FIELDS))}")
    for name, (words, holds) in _FIELDS.items():
        if not holds(content[name]):
            raise UserError(f"{file} is no saved step: its {name} must be {words}")
    fields = {name: content[name] for name in SavedStep._fields if name in content}
    fields["batch"] = [_sample(x) for x in content["batch"]]
    fields["steps"] = [Step(*x) for x in content["steps"]]
    return SavedStep(file=file, **fields)


def _sample(plain: dict[str, Any]) -> dict[str, Any]:
    stored = plain["instances"]
    instances = Instances(tuple(stored["image_size"]))
    for name, boxes in stored["boxes"].items():
        instances.set(name, Boxes(boxes))
    for name, x in stored["tensors"].items():
        instances.set(name, x)
    return {**plain, "instances": instances}


# Checks of a saved step's fields: a file of unknown origin may contain anything that `read_torch` accepts.


def _is_whole(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _is_number(x: Any) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**63)


def _are_losses(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(k, str) and _is_number(v) for k, v in x.items())


def _is_step(x: Any) -> bool:
    if not (isinstance(x, (list, tuple)) and len(x) == 4):
        return False
    iteration, rate, losses, norm = x
    return _is_whole(iteration) and _is_number(rate) and _are_losses(losses) and _is_number(norm)


def _are_tensors(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in x.items())


def _are_boxes(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and x.shape[1] == 4


def _is_sample(x: Any) -> bool:
    if not (
        isinstance(x, dict) and isinstance(x.get("image"), Tensor) and isinstance(x.get("instances"), dict)
    ):
        return False
    image, stored = x["image"], x["instances"]
    if image.ndim != 3 or not image.numel() or not (image.dtype == torch.uint8 or image.is_floating_point()):
        return False
    if stored.keys() != {"image_size", "boxes", "tensors"} or [*stored["image_size"]] != [*image.shape[1:]]:
        return False
    if not (_are_tensors(stored["boxes"]) and _are_tensors(stored["tensors"])):
        return False
    boxes, classes = stored["boxes"].get("gt_boxes"), stored["tensors"].get("gt_classes")
    counts = {len(v) if v.ndim else -1 for v in (*stored["boxes"].values(), *stored["tensors"].values())}
    return (
        all(map(_are_boxes, (boxes, *stored["boxes"].values(), x.get("ignored_boxes", boxes))))
        and isinstance(classes, Tensor)
        and (classes.dtype, classes.ndim, len(counts)) == (torch.int64, 1, 1)
        and all(_is_whole(x.get(name, 1)) for name in ("height", "width"))
        and isinstance(x.get("file_name", ""), str)
        and isinstance(x.get("image_id", ""), (str, int))
    )


def _is_state(x: Any) -> bool:
    if not (isinstance(x, Tensor) and x.dtype == torch.uint8):
        return False
    try:
        torch.Generator().set_state(x)
    except RuntimeError:  # of a wrong length, or with values out of range
        return False
    return True


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "iteration": ("a whole number", _is_whole),
    "rank": ("a whole number", _is_whole),
    "learning_rate": ("a number or None", lambda x: x is None or _is_number(x)),
    "losses": ("numbers by name", _are_losses),
    "steps": (
        "lists of an iteration, a rate, losses and a norm",
        lambda x: isinstance(x, list) and all(map(_is_step, x)),
    ),
    "normalizer": ("a number or None", lambda x: x is None or _is_number(x)),
    "config": ("a text", lambda x: isinstance(x, str)),
    "model": ("tensors by name", _are_tensors),
    "batch": (
        "samples of an image and instances with boxes and classes",
        lambda x: isinstance(x, list) and len(x) > 0 and all(map(_is_sample, x)),
    ),
    "random": ("a state of PyTorch's generator on a CPU", _is_state),
    "cuda_random": (
        "a state of PyTorch's generator on a GPU, or None",
        lambda x: x is None or (isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 1),
    ),
}


def replay(saved: SavedStep, *, device: str | None = None) -> Replay:
    """Repeat a saved step, forward and backward.

    Args:
        saved: of `load_step`.
        device: "cpu" or "cuda"; None: as in training, or the CPU where there is no GPU.

    Raises:
        UserError: if no model can be built from its config, or its state does not fit.
    """
    cfg = _read_config(saved, device)
    resolve_device(cfg)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.MODEL.FOCAL.TF32
    with building("model"):
        _check_fit(saved, build_without_memory(cfg))
        model = build_model(cfg).train()
    model.load_state_dict(saved.model)
    gpus = [torch.device(cfg.MODEL.DEVICE)] if cfg.MODEL.DEVICE != "cpu" else []
    with torch.random.fork_rng(devices=gpus):
        torch.set_rng_state(saved.random)
        if gpus and saved.cuda_random is not None:
            torch.cuda.set_rng_state(saved.cuda_random, gpus[0])
        with precision_around(cfg, model)():
            report = examine(model, saved.batch, steps=saved.steps, normalizer=saved.normalizer)
    terms = {name: _compare(x, report.losses.get(name)) for name, x in saved.losses.items()}
    bad = {name for name, x in saved.losses.items() if not math.isfinite(x)}
    reproduced = bad == set(report.bad_terms) and bool(bad or report.gradient)
    return Replay(report, reproduced, terms)


def _check_fit(saved: SavedStep, model: nn.Module) -> None:
    """Check that the weights fit, before memory is allocated for a model of the config's size."""
    problem = "its weights do not fit its config"
    ours = model.state_dict()
    if differing := sorted(ours.keys() ^ saved.model.keys()):
        raise UserError(f"{saved.file}: {problem}: {first_few(differing, 3)} in only one of them")
    for name, x in ours.items():
        theirs = saved.model[name]
        if theirs.shape != x.shape or theirs.is_floating_point() != x.is_floating_point():
            raise UserError(
                f"{saved.file}: {problem}: {name} is {theirs.dtype} {tuple(theirs.shape)}, "
                f"not {x.dtype} {tuple(x.shape)}"
            )


def _read_config(saved: SavedStep, device: str | None) -> CfgNode:
    keys = parse_yaml(saved.config, f"{saved.file}: its config") if isinstance(saved.config, str) else None
    if not isinstance(keys, dict):
        raise UserError(f"{saved.file}: its config is no YAML of KEY: value lines")
    cfg = get_cfg()
    add_focal_config(cfg)
    with building("model"):
        cfg.merge_from_other_cfg(CfgNode(keys))
    cfg.MODEL.DEVICE = device or ("cpu" if cfg.MODEL.DEVICE == "cpu" else "auto")
    check_values(cfg)
    return cfg


def _compare(before: float, now: float | None) -> str:
    """Describe how a loss compares with the one in training."""
    if now is None:
        return f"{before:.9g} in training, absent now"
    if not (math.isfinite(before) and math.isfinite(now)):
        return f"{before:.9g} in training, {now:.9g} now"
    if before == now:
        return f"{now:.9g}, equal to the bit"
    digits = math.floor(-math.log10(abs(now - before) / max(abs(before), abs(now))))
    return f"{before:.9g} in training, {now:.9g} now: equal to {max(digits, 0)} digits"
