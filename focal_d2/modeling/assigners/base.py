"""The interface of assigners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from focal_d2.modeling.anchors import Anchors
from focal_d2.ops.matching.match import Matches


class Assigner(ABC):
    """Decides which anchors must detect which box, from their positions alone.

    Shapes: M boxes, R anchors of an image. Boxes are XYXY in absolute pixels.
    """

    @abstractmethod
    def assign(self, boxes: Tensor, anchors: Anchors) -> Matches:
        """Match the anchors of an image to its boxes (M, 4), M ≥ 1.

        Returns:
            (R,) int64, the box of each anchor, valid for positive anchors only; and (R,) int8: 1 for a
            positive, 0 for a negative, -1 for an ignored anchor.
        """

    def batch_kernels(self, anchors: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
        """Return a function that labels a batch as `match_triton.label_batch` does, or None.

        Args:
            anchors: (R, 4), for their device and type.
        """
        return None
