"""Make a small checkpoint for use: the weights and what the model is, without the state of a training."""

from __future__ import annotations

from pathlib import Path

import torch

from focal_d2.errors import UserError, reason
from focal_d2.evaluation.operating_point import OPERATING_POINT, saved_point
from focal_d2.storage.card import CARD, ModelCard, read_checkpoint, saved_card
from focal_d2.storage.files import write_aside


def strip_file(file: Path, output: Path, *, card: ModelCard | None = None) -> ModelCard | None:
    """Write a checkpoint's weights, card and operating point to another file.

    The weights are those that were evaluated in training: the moving average if there is one.

    Args:
        file: a checkpoint of a training.
        output: the file to write, which must not exist.
        card: for a checkpoint without one; None: it gets none.

    Returns:
        The card that was written; None: there is none.

    Raises:
        UserError: if the checkpoint can't be read, has no weights, or `output` can't be written.
    """
    if output.suffix != ".pth":
        raise UserError(f"--output is {output}; its name must end with .pth")
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    content = read_checkpoint(str(file))
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(x, torch.Tensor) for x in weights.values()):
        raise UserError(f"{file} is no checkpoint of a training: it has no weights under the name model")
    card = saved_card(content, str(file)) or card
    point = saved_point(content, str(file))
    # A tensor may be a part of a larger one, which would be saved whole.
    stripped = {"model": {name: x.contiguous().clone() for name, x in weights.items()}}
    stripped |= {CARD: card.as_dict()} if card else {}
    stripped |= {OPERATING_POINT: point._asdict()} if point else {}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_aside(str(output), lambda x: torch.save(stripped, x))
    except OSError as error:
        raise UserError(f"{output}: {reason(error)}") from error
    return card
