"""Checkpoints that must fit the model they are loaded into."""

from __future__ import annotations

import os
import pickle
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer

from focal_d2.errors import UserError


class FocalCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer that refuses weights of another architecture instead of warning."""

    def __init__(self, model: Any, save_dir: str = "", *, partial: bool, **checkpointables: Any) -> None:
        """Wrap a model.

        Args:
            model: the module to save and load.
            save_dir: folder of the checkpoints.
            partial: accept files without FPN and head, such as ImageNet weights, and heads for another
                number of classes: what training may start from. If false, every parameter must be there.
            checkpointables: see detectron2's `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.partial = partial
        self._source = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL; see detectron2's `DetectionCheckpointer.load`.

        Raises:
            UserError: if it cannot be found or read, or does not fit the model.
        """
        self._source = path
        if path and "://" not in path and not os.path.isfile(urlparse(path).path):
            raise UserError(f"weights file not found: {path}")
        try:
            return super().load(path, *args, **kwargs)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read weights {path}: {error}") from error

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except (RuntimeError, KeyError, TypeError) as error:
            # torch's reader raises RuntimeError for a damaged archive.
            raise UserError(f"cannot read weights {self._source}: {error}") from error

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        misshaped = {name: (theirs, ours) for name, theirs, ours in incompatible.incorrect_shapes}
        absent = (set(incompatible.missing_keys) | misshaped.keys()) & parameters
        if self.partial:
            needed = {n for n in parameters if n.startswith("backbone.bottom_up.")} or parameters
            if not (absent & needed):
                return incompatible
        if absent:
            missing = sorted(absent - misshaped.keys())
            reasons = []
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                reasons.append(f"it lacks {', '.join(missing[:3])}{more}")
            if misshaped:
                name, (theirs, ours) = sorted(misshaped.items())[0]
                reasons.append(
                    f"{len(misshaped)} have another shape (first: {name}, {theirs} in the file, "
                    f"{ours} in the model)"
                )
            raise UserError(
                f"weights {self._source} do not fit this model, whose {len(parameters)} parameters they "
                f"must fill: {'; '.join(reasons)}"
            )
        return incompatible
