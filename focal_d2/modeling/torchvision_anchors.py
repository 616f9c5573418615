"""The anchors of torchvision's detectors, for weights that were trained with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """detectron2's generator with two differences, which are torchvision's.

    The corners of a cell's anchors are rounded to whole pixels. The distance between cells is the size of the
    padded images divided by the number of cells, rounded down: at strides 64 and 128 it is less than the
    stride, unless the size is a multiple of 128.
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float] = (32, 64, 128, 256, 512), aspect_ratios: Sequence[float] = (0.5, 1, 2)
    ) -> Tensor:
        """See `DefaultAnchorGenerator`; the corners (A, 4) are whole numbers."""
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def distances(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Return the pixels between rows, and those between columns, of L levels of (rows, columns)."""
        height, width = (cells * self.strides[0] for cells in sizes[0])
        return [(height // rows, width // columns) for rows, columns in sizes]

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """See `DefaultAnchorGenerator`."""
        sizes = [tuple(x.shape[-2:]) for x in features]
        boxes = []
        for (rows, columns), (down, right), corners in zip(
            sizes, self.distances(sizes), self.cell_anchors, strict=True
        ):
            ys = (torch.arange(rows, device=corners.device) + self.offset) * down
            xs = (torch.arange(columns, device=corners.device) + self.offset) * right
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=2).view(-1, 1, 4)
            boxes.append(Boxes((shifts + corners).view(-1, 4)))
        return boxes
