"""Metrics and pictures for Weights & Biases, if the config asks for it. Only then is the package imported."""

from __future__ import annotations

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from focal_d2.detectron2_compat import pictures_of
from focal_d2.errors import UserError
from focal_d2.modeling.metrics import PERIOD
from focal_d2.storage.files import read_file

_ID_FILE = "wandb_id.txt"


class WeightsAndBiases(HookBase):
    """Sends the metrics and pictures of detectron2's writers.

    It must run before the writers, because TensorBoard's removes the pictures. It is a hook and no
    `EventWriter`, because a writer does not know whether training resumes. wandb sends from a separate
    process. If the network fails after the start, that process waits, and training continues.
    """

    def __init__(self, cfg: CfgNode, *, project: str) -> None:
        """Import wandb.

        Args:
            cfg: full config, shown with the run.
            project: name at Weights & Biases.

        Raises:
            UserError: if the package is not installed.
        """
        self._cfg = cfg
        self._project = project
        self._wandb = _import(project)
        self._run: Any = None
        self._sent = -1

    def before_train(self) -> None:
        """Begin a run, or continue the run of the training that resumes.

        Raises:
            UserError: if wandb cannot begin a run, for instance without a login or network.
        """
        known = Path(self._cfg.OUTPUT_DIR, _ID_FILE)
        resumed = None
        if self.trainer.start_iter > 0 and known.is_file():
            resumed = read_file(known, limit=1000).decode().strip()
        try:
            self._run = self._wandb.init(
                project=self._project,
                dir=self._cfg.OUTPUT_DIR,
                config=yaml.safe_load(self._cfg.dump()),
                id=resumed,
                resume="allow" if resumed else None,
                allow_val_change=True,
            )
        except self._wandb.Error as error:
            raise UserError(
                f"SOLVER.FOCAL.WANDB_PROJECT is {self._project}, but wandb can't begin a run: {error} "
                "(the environment's WANDB_MODE=offline does without a network)"
            ) from error
        known.write_text(self._run.id, encoding="utf-8")

    def after_step(self) -> None:
        """Send at the iterations at which detectron2's writers write."""
        done = self.trainer.iter + 1
        if done % PERIOD == 0 or done == self.trainer.max_iter:
            self._send()

    def after_train(self) -> None:
        """Send the rest and end the run; one that did not reach its end is marked as failed."""
        if self._run is not None:
            self._send()
            self._run.finish(exit_code=0 if self.trainer.iter >= self.trainer.max_iter else 1)

    def _send(self) -> None:
        storage = self.trainer.storage
        rows: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(PERIOD).items():
            if iteration > self._sent:
                rows[iteration][name] = value
        for name, picture, iteration in pictures_of(storage):
            rows[iteration][name] = self._wandb.Image(picture.transpose(1, 2, 0))
        for iteration in sorted(rows):  # wandb takes steps in this order only
            self._run.log(rows[iteration], step=iteration)
            self._sent = iteration


def _import(project: str) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    # A folder named wandb, which wandb makes in the working folder, is imported as an empty package.
    if not hasattr(wandb, "init"):
        raise UserError(
            f"SOLVER.FOCAL.WANDB_PROJECT is {project}, which needs the package wandb: pip install wandb"
        )
    return wandb
