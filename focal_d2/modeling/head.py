"""The focal-loss head: two subnets whose weights all levels share (paper, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor

from focal_d2.config import focal_config
from focal_d2.errors import UserError


class FocalRetinaNetHead(RetinaNetHead):
    """detectron2's RetinaNet head with the subnets' width from YAML.

    It has the paper's initialisation: N(0, 0.01) weights and zero biases, and -log((1 - π) / π) as the
    bias of the last classification convolution, so that every anchor starts at score π (paper, 3.3).
    With norm "BN" each level has separate statistics, and all levels share weight and bias of the norm.

    Departure from the paper: norms are possible (`MODEL.RETINANET.NORM`), which training from scratch needs.
    """

    @configurable
    def __init__(self, *, prior_bias: Tensor, num_anchors: int, **kwargs: Any) -> None:
        """Build the head.

        Args:
            prior_bias: (C,) the logits of every anchor at the start of training.
            num_anchors: A.
            kwargs: of detectron2's `RetinaNetHead`; its num_classes is C, the logits an anchor.
        """
        super().__init__(num_anchors=num_anchors, **kwargs)
        with torch.no_grad():
            self.cls_score.bias.copy_(prior_bias.repeat(num_anchors))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Read `MODEL.RETINANET.*` and `MODEL.FOCAL.HEAD.CHANNELS`.

        Args:
            cfg: full config.
            input_shape: shapes of the feature levels, P3 first.

        Raises:
            UserError: if there is no hidden convolution, or its width does not fit the norm.
        """
        retinanet = cfg.MODEL.RETINANET
        kwargs = super().from_config(cfg, input_shape)
        channels = focal_config(cfg).HEAD.CHANNELS or input_shape[0].channels
        if retinanet.NORM == "GN" and channels % 32:
            raise UserError(
                f"MODEL.FOCAL.HEAD.CHANNELS is {channels}; with MODEL.RETINANET.NORM GN it must be a "
                "multiple of 32"
            )
        return {**kwargs, "conv_dims": [channels] * retinanet.NUM_CONVS}
