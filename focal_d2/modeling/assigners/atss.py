"""Adaptive training sample selection (ATSS, arXiv 1912.02424)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import Tensor

from focal_d2.config import focal_config
from focal_d2.errors import UserError
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.assigners.base import Assigner
from focal_d2.ops.matching.atss import match_anchors_atss
from focal_d2.ops.matching.match import Matches


class ATSSAssigner(Assigner):
    """Each box has its own IoU threshold, from the anchors near its centre; see `ops.matching.atss`.

    No anchor is ignored for its IoU, and a box may get no anchor: a small one that holds no anchor's centre.
    """

    def __init__(self, *, topk: int) -> None:
        """Choose the number of cells of each level that are candidates, above 0."""
        self._topk = topk

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ATSSAssigner:
        """Read `MODEL.FOCAL.ASSIGNER.TOPK`."""
        return cls(topk=focal_config(cfg).ASSIGNER.TOPK)

    def assign(self, boxes: Tensor, anchors: Anchors) -> Matches:
        """See `Assigner.assign`; `matched` is the box of the highest IoU among those that want the anchor.

        Raises:
            UserError: if the positions of the anchors are not known.
        """
        if anchors.grid is None:
            raise UserError(
                "MODEL.FOCAL.ASSIGNER.NAME is atss, which needs the anchors of DefaultAnchorGenerator "
                "(MODEL.ANCHOR_GENERATOR.NAME)"
            )
        return match_anchors_atss(boxes, anchors.boxes, anchors.grid, topk=self._topk)
