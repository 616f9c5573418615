"""Checkpoints that must fit the model they are loaded into."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer

from focal_d2.errors import UserError

# What the losses remember: not in detectron2's checkpoints, and each loss has its own.
_OURS = ("loss_normalizer.", "cls_loss.", "box_loss.")
# Absent from converted files, and without meaning once training is over.
_COUNTER = "num_batches_tracked"
# A residual block, under any of the names that detectron2 knows how to match.
_BLOCK = re.compile(r"(^|\.)res[2-5]\.\d+\.")


class FocalCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer that refuses weights of another architecture instead of warning."""

    def __init__(self, model: Any, save_dir: str = "", *, partial: bool, **checkpointables: Any) -> None:
        """Wrap a model.

        Args:
            model: the module to save and load.
            save_dir: folder of the checkpoints.
            partial: accept what training may start from: files without FPN and head, such as ImageNet
                weights, heads for another number of classes, or more than this model has. The ResNet must
                fit all the same. If false, file and model must have the same entries.
            checkpointables: see detectron2's `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.partial = partial
        self._source = ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See detectron2's `DetectionCheckpointer.resume_or_load`; resuming accepts no partial fit."""
        self.partial = self.partial and not (resume and self.has_checkpoint())
        return super().resume_or_load(path, resume=resume)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL; see detectron2's `DetectionCheckpointer.load`.

        Raises:
            UserError: if it cannot be found or read, or does not fit the model or its optimizer.
        """
        self._source = path
        check_file(path)
        try:
            return super().load(path, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            # A damaged or foreign file fails in whatever way its bytes bring about, and an optimizer's
            # state that does not fit in a few more. The first line has the reason; PyTorch's others
            # advise to load the file unsafely.
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot load weights {path}: {type(error).__name__}: {reason}") from error

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        misshaped = {name: (theirs, ours) for name, theirs, ours in incompatible.incorrect_shapes}
        entries = set(self.model.state_dict())
        missing = _needed(incompatible.missing_keys) - misshaped.keys()
        surplus = _needed(incompatible.unexpected_keys)
        if self.partial:
            needed = {n for n in entries if n.startswith("backbone.bottom_up.")} or entries
            missing &= needed
            surplus = {n for n in surplus if _BLOCK.search(n)}
            misshaped = {n: shapes for n, shapes in misshaped.items() if n in needed}
        reasons = []
        if missing:
            reasons.append(f"lack {_some(missing)}")
        if surplus:
            reasons.append(f"have {_some(surplus)}, which the model has not")
        if misshaped:
            name, (theirs, ours) = sorted(misshaped.items())[0]
            more = f" (and {len(misshaped) - 1} more)" if len(misshaped) > 1 else ""
            reasons.append(f"have another shape: {name}, {theirs} in the file, {ours} in the model{more}")
        if reasons:
            raise UserError(f"weights {self._source} do not fit this model: they {'; '.join(reasons)}")
        return incompatible


def _needed(names: Iterable[str]) -> set[str]:
    return {n for n in names if not n.endswith(_COUNTER) and not n.startswith(_OURS)}


def check_file(path: str) -> None:
    """Check that weights exist, unless they are a URL or "".

    Raises:
        UserError: if there is no such file.
    """
    if path and "://" not in path and not os.path.isfile(urlparse(path).path):
        raise UserError(f"weights file not found: {path}")


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
