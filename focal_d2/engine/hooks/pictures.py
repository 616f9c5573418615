"""Pictures of a model's detections during training."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from torch import nn

from focal_d2.data.pixels import to_rgb
from focal_d2.inference.draw import draw_detections, draw_truth

logger = logging.getLogger(__name__)

# The number of best detections that are drawn is that of the boxes, but at least this.
_FEWEST = 20


class TrainingPictures(HookBase):
    """Puts a training image with its ground truth and its detections into the event storage, for TensorBoard.

    detectron2's models draw in their forward pass. They take colours from NumPy's global generator, which
    training also uses, and normalise with batch statistics instead of the learned ones. This hook changes
    nothing in training.
    """

    def __init__(self, model: nn.Module, *, period: int, input_format: str) -> None:
        """Prepare to draw a model's detections.

        Args:
            model: in training; without DistributedDataParallel, which may be around it.
            period: iterations between pictures.
            input_format: `INPUT.FORMAT`.
        """
        self._model = model
        self._period = period
        self._format = input_format
        self._example: dict[str, Any] | None = None
        self._handle: Any = None

    def before_train(self) -> None:
        """Register the hook that keeps images from the model's input."""
        self._handle = self._model.register_forward_pre_hook(self._keep)

    def _keep(self, model: nn.Module, arguments: tuple[list[dict[str, Any]]]) -> None:
        if model.training and (self.trainer.iter + 1) % self._period == 0:
            self._example = arguments[0][0]

    def after_step(self) -> None:
        """Draw the first image of the batch with the model after the step."""
        if self._example is None:
            return
        example, self._example = self._example, None
        picture = draw_example(self._model, example, self._format)
        if picture is None:
            logger.warning(f"VIS_PERIOD: {type(self._model).__name__} returns no instances: nothing is drawn")
            self.after_train()
        else:
            self.trainer.storage.put_image("ground_truth_and_detections", picture)

    def after_train(self) -> None:
        """Remove the hook from the model."""
        if self._handle is not None:  # None if an earlier hook failed before training began
            self._handle.remove()


@torch.no_grad()
def draw_example(model: nn.Module, example: dict[str, Any], input_format: str) -> np.ndarray | None:
    """Draw ground truth (left) beside the best detections (right).

    Args:
        model: detector in training; it is in training again when this returns.
        example: of the training loader: "image" (C, H, W) and "instances" with gt_boxes in its pixels.
        input_format: `INPUT.FORMAT` of the image.

    Returns:
        (3, H, 2 W + 8) uint8 RGB; None if the model returns no instances.
    """
    with inference_context(model):
        (output,) = model([{"image": example["image"]}])
    if "instances" not in output:
        return None
    truth = example["instances"].gt_boxes.tensor.cpu().numpy()
    detected = output["instances"][: max(_FEWEST, len(truth))].to("cpu")
    bgr = to_rgb(example["image"].permute(1, 2, 0).cpu().numpy(), input_format)[:, :, ::-1]
    boxes, scores = detected.pred_boxes.tensor.numpy(), detected.scores.numpy()
    picture = draw_detections(bgr, boxes, scores, detected.pred_classes.numpy(), [""])
    bgr = draw_truth(bgr, truth, picture)
    return np.ascontiguousarray(bgr[:, :, ::-1].transpose(2, 0, 1))
