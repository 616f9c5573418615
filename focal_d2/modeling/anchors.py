"""The anchors of an image shape and their positions. They are computed once for each shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn

from focal_d2.modeling.torchvision_anchors import TorchvisionAnchorGenerator
from focal_d2.ops.matching.match import AnchorGrid

# Multi-scale training has a few dozen shapes. One of 800 × 1333 pixels takes 3 MB.
_MOST_SHAPES = 32


class Anchors(NamedTuple):
    """All anchors of an image shape."""

    boxes: Tensor  # (R, 4) XYXY absolute pixels, all levels
    grid: AnchorGrid | None  # None for a generator that is not detectron2's default one


class AnchorLayout(NamedTuple):
    """The properties of a model that determine its anchors in an image."""

    generator: nn.Module  # detectron2's
    strides: list[int]  # L, pixels between cells
    divisibility: int  # the network's input is padded to multiples of it

    def cells(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return L × (height, width) in cells, for a batch with one image of this size in pixels."""
        height, width = (-(-side // self.divisibility) * self.divisibility for side in (height, width))
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]


def build_layout(cfg: CfgNode) -> AnchorLayout:
    """Read `MODEL.ANCHOR_GENERATOR`, and build the backbone to know its strides and padding."""
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    strides = [int(shape.stride) for shape in features]
    return AnchorLayout(build_anchor_generator(cfg, features), strides, max(1, backbone.size_divisibility))


class AnchorCache:
    """Computes the anchors of each image shape once; removes the shape that was not used for longest."""

    def __init__(self, generator: nn.Module) -> None:
        self.generator = generator
        self._known: OrderedDict[Any, Anchors] = OrderedDict()
        self._on_host: dict[torch.dtype, nn.Module] = {}  # copies of a GPU's generator, by the buffers' type

    def __call__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Anchors:
        """Return the anchors of L levels of (height, width) cells."""
        key = (tuple(sizes), device, next(self.generator.buffers()).dtype)
        if key not in self._known:
            self._known[key] = self._compute(sizes, device)
            if len(self._known) > _MOST_SHAPES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _compute(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Anchors:
        if device.type != "cuda":
            return compute_anchors(self.generator, sizes, device)
        # detectron2's generator copies small tensors to a GPU one by one, and the host waits for each copy.
        dtype = next(self.generator.buffers()).dtype
        if dtype not in self._on_host:
            self._on_host[dtype] = deepcopy(self.generator).cpu()
        anchors = compute_anchors(self._on_host[dtype], sizes, torch.device("cpu"))
        return Anchors(
            copy_without_waiting(anchors.boxes, device),
            anchors.grid and AnchorGrid(*(copy_without_waiting(x, device) for x in anchors.grid)),
        )


def compute_anchors(generator: nn.Module, sizes: Sequence[tuple[int, int]], device: torch.device) -> Anchors:
    """Return the anchors of L levels of (height, width) cells; the generator is on the device."""
    # The generator reads only the shapes and the device of the features.
    features = [torch.empty(1, 1, height, width, device=device) for height, width in sizes]
    return Anchors(Boxes.cat(generator(features)).tensor, grid_of(generator, sizes))


def copy_without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a GPU. The host would wait for a copy from memory that is not pinned."""
    return x.pin_memory().to(device, non_blocking=True)


def grid_of(generator: nn.Module, sizes: Sequence[Sequence[int]]) -> AnchorGrid | None:
    """Return the positions of a generator's anchors.

    Args:
        generator: detectron2's.
        sizes: (height, width) in cells of each level.

    Returns:
        The grid in the order of the generator's anchors, or None for a generator of another kind, or if cells
        are not as far apart as the strides say.
    """
    made: Any = generator
    if type(generator) is TorchvisionAnchorGenerator:
        if generator.distances(sizes) != [(stride, stride) for stride in made.strides]:
            return None
    elif type(generator) is not DefaultAnchorGenerator:
        return None
    corners, leads = [], []
    rows: list[list[int]] = []
    first = 0
    levels = zip(sizes, made.strides, made.cell_anchors, strict=True)
    for level, ((height, width), stride, cell) in enumerate(levels):
        leads.append(len(rows))
        corners.append(cell.double() + made.offset * stride)
        rows += [[stride, width, height, first + a, len(cell), level] for a in range(len(cell))]
        first += height * width * len(cell)
    device = corners[0].device
    strides, widths, heights, firsts, steps, level_of = torch.tensor(rows, device=device).unbind(1)
    lead = torch.tensor(leads, device=device)
    return AnchorGrid(torch.cat(corners), strides.double(), widths, heights, firsts, steps, level_of, lead)
