"""The feature pyramid on any bottom-up network: P3 to P7 (paper, section 4 and footnote 2), or P2 to P6."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor, nn

from focal_d2.config import focal_config


class LastLevelP6(LastLevelP6P7):
    """detectron2's `LastLevelP6P7` without P7."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str) -> None:
        """See `LastLevelP6P7`."""
        super().__init__(in_channels, out_channels, in_feature)
        self.num_levels = 1
        del self.p7

    def forward(self, c5: Tensor) -> list[Tensor]:
        """Return [P6]."""
        return [self.p6(c5)]


def has_p2(cfg: CfgNode) -> bool:
    """Return whether `MODEL.FOCAL.FPN.LEVELS` asks for P2 to P6; else the pyramid has P3 to P7."""
    return bool(focal_config(cfg).FPN.LEVELS == "p2-p6")


def build_pyramid(cfg: CfgNode, bottom_up: Backbone, in_features: Sequence[str]) -> FPN:
    """Build detectron2's FPN with P6, and P7 unless it begins at P2.

    P6 is a 3×3 convolution of stride 2 on C5 or P5 (`MODEL.FOCAL.FPN.P6_FROM`), P7 the same on ReLU(P6).
    The convolutions start Xavier-uniform as detectron2's, or N(0, 0.01) as the paper's
    (`MODEL.FOCAL.FPN.INIT`). Norms come from `MODEL.FPN.NORM`.

    Args:
        cfg: full config, whose values are checked.
        bottom_up: has an output res5, which is C5.
        in_features: names of the outputs that the pyramid reads, finest first; the last is res5.
    """
    fpn, p6_from = cfg.MODEL.FPN, focal_config(cfg).FPN.P6_FROM
    p6_channels = bottom_up.output_shape()["res5"].channels if p6_from == "res5" else fpn.OUT_CHANNELS
    top_block = LastLevelP6 if has_p2(cfg) else LastLevelP6P7
    backbone = FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top_block(p6_channels, fpn.OUT_CHANNELS, in_feature=p6_from),
        fuse_type=fpn.FUSE_TYPE,
    )
    if focal_config(cfg).FPN.INIT == "paper":
        for name, parameter in backbone.named_parameters():
            if name.endswith(".weight") and parameter.ndim == 4 and not name.startswith("bottom_up."):
                nn.init.normal_(parameter, std=0.01)
    return backbone
