"""The focal-loss head: two subnets whose weights all levels share (paper, section 4)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from focal_d2.config import focal_config
from focal_d2.errors import UserError


class FocalRetinaNetHead(RetinaNetHead):
    """detectron2's RetinaNet head with the subnets' width from YAML.

    It has the paper's initialisation: N(0, 0.01) weights and zero biases, and -log((1 - π) / π) as the
    bias of the last classification convolution, so that every anchor starts at score π (paper, 3.3).
    With norm "BN" each level keeps its own statistics and all share the affine part.

    Departure from the paper: norms are possible (`MODEL.RETINANET.NORM`), which training from scratch needs.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Read `MODEL.RETINANET.*` and `MODEL.FOCAL.HEAD.CHANNELS`.

        Args:
            cfg: full config.
            input_shape: shapes of the feature levels, P3 first.

        Raises:
            UserError: if there is no hidden convolution or the prior is not a probability.
        """
        retinanet = cfg.MODEL.RETINANET
        if retinanet.NUM_CONVS < 1:
            raise UserError(f"MODEL.RETINANET.NUM_CONVS is {retinanet.NUM_CONVS}; at least 1 is needed")
        if not 0 < retinanet.PRIOR_PROB < 1:
            raise UserError(
                f"MODEL.RETINANET.PRIOR_PROB is {retinanet.PRIOR_PROB}; it must lie between 0 and 1"
            )
        kwargs = super().from_config(cfg, input_shape)
        channels = focal_config(cfg).HEAD.CHANNELS or input_shape[0].channels
        if retinanet.NORM == "GN" and channels % 32:
            raise UserError(
                f"MODEL.FOCAL.HEAD.CHANNELS is {channels}; with MODEL.RETINANET.NORM GN it must be a "
                "multiple of 32"
            )
        return {**kwargs, "conv_dims": [channels] * retinanet.NUM_CONVS}
