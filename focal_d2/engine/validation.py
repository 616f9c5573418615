"""Evaluations during training, which they do not change: losses and AP on `DATASETS.VAL`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, distributed, nn

from focal_d2.data.loader import build_evaluation_loader
from focal_d2.data.mapper import validation_mapper
from focal_d2.data.seeding import kept_random_state, seeded
from focal_d2.detectron2_compat import copy_without_hooks
from focal_d2.evaluation import log_results
from focal_d2.inference.views import use_views
from focal_d2.modeling import FocalRetinaNet
from focal_d2.modeling.all_reduce import alone
from focal_d2.modeling.folding import BATCH_NORMS

# Every validation makes the same random draws, so that a curve shows the model and not the draws.
_SEED = 0
# The features and predictions of `FocalRetinaNet.network`.
_Outputs = tuple[list[Tensor], list[list[Tensor]]]
# Layers that work differently in training and in evaluation, and compute no loss.
_LAYERS = (
    *BATCH_NORMS,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)


@contextmanager
def without_effect(model: nn.Module) -> Iterator[None]:
    """Evaluate a model in this block: the random generators are then as before, in all processes.

    With several processes the model gets the main process's buffers: those of batch norm differ.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    with kept_random_state():
        yield


def validate(trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Evaluate a model on the datasets of `DATASETS.VAL`, and compute its losses there.

    Args:
        trainer: builds the evaluators.
        cfg: full config.
        model: without `DistributedDataParallel`.

    Returns:
        In the main process "bbox" -> metric -> per cent, "total_loss", and each loss by its name; for several
        datasets this of each dataset by its name. In the other processes {}.
    """
    results: dict[str, Any] = {}
    use_views(cfg, model)
    for name in cfg.DATASETS.VAL:
        loader = build_evaluation_loader(cfg, name, validation_mapper(cfg))
        measured = ModelWithLosses(model)
        with seeded(_SEED):
            metrics = inference_on_dataset(measured, loader, trainer.build_evaluator(cfg, name))
        losses = measured.mean_losses()
        if comm.is_main_process():
            results[name] = {**metrics, **losses}
    log_results(results)
    return results if len(results) != 1 else next(iter(results.values()))


class ModelWithLosses(nn.Module):
    """A model in evaluation that also adds up the losses of its images.

    The losses are those of a copy, which is in training mode: running averages and other memory of training
    stay as they are. Its backbone, batch norm and dropout work as in evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy the model; it is not changed."""
        super().__init__()
        self.model = model
        self.training = model.training  # detectron2 restores this mode after an evaluation
        # In a list the copy is no submodule, so that detectron2 does not put it into evaluation mode.
        self._copies = [_training_copy(model)]
        self._sums: dict[str, float] = defaultdict(float)

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """Add the losses of a batch, whose images have "instances"; return what the model detects."""
        outputs: list[_Outputs] = []
        hook = None
        # What the head of such a model returns in evaluation is what losses are computed from.
        if isinstance(self.model, FocalRetinaNet) and type(self.model).forward is FocalRetinaNet.forward:
            hook = self.model.head.register_forward_hook(lambda _, x, y: outputs.append((x[0], y)))
        try:
            detections = self.model(batch)
        finally:
            if hook is not None:
                hook.remove()
        # Each process has other images and another number of them: no sum over processes is made here. The
        # metrics that the model puts into the event storage are not those of a training step.
        with torch.no_grad(), alone(), EventStorage():
            # A model with several views of an image calls its head for each.
            self._add_losses(batch, outputs[0] if len(outputs) == 1 else None)
        return detections

    def _add_losses(self, batch: list[dict[str, Any]], outputs: _Outputs | None) -> None:
        (model,) = self._copies
        self._sums["images"] += len(batch)
        if isinstance(model, FocalRetinaNet):
            self._sums["positives"] += float(model.count_positives(batch))
            with model.loss_normalizer.held(1.0):
                losses = model(batch) if outputs is None else model.losses(batch, lambda _: outputs)
        else:
            losses = model(batch)
            losses = {"loss": losses} if isinstance(losses, Tensor) else losses
            losses = {name: x * len(batch) for name, x in losses.items()}
        for name, x in losses.items():
            self._sums[f"of {name}"] += float(x)

    def mean_losses(self) -> dict[str, float]:
        """Return the losses over the images of all processes, and their sum as "total_loss".

        Those of `FocalRetinaNet` are divided by the number of positive anchors of all images, if the loss is
        divided by that number in training. All others are means over images.
        """
        sums: dict[str, float] = defaultdict(float)
        for of_process in comm.all_gather(dict(self._sums)):
            for name, x in of_process.items():
                sums[name] += x
        (model,) = self._copies
        by_positives = set()
        if isinstance(model, FocalRetinaNet):
            parts = {"loss_cls": model.cls_loss, "loss_box_reg": model.box_loss}
            by_positives = {name for name, loss in parts.items() if loss.divided_by_positives}
        losses = {}
        for name in (x.removeprefix("of ") for x in sums if x.startswith("of ")):
            divisor = max(1.0, sums["positives"]) if name in by_positives else sums["images"]
            losses[name] = sums[f"of {name}"] / divisor
        return {**losses, "total_loss": sum(losses.values())}


def _training_copy(model: nn.Module) -> nn.Module:
    copy = copy_without_hooks(model).train()
    for name, module in copy.named_modules():
        if name == "backbone" or isinstance(module, _LAYERS):
            module.eval()
    return copy
