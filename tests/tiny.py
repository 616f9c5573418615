"""A backbone for tests of all but networks; `--import tests.tiny` registers it in another process."""

from __future__ import annotations

import itertools

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ShapeSpec
from torch import nn


class TinyPyramid(Backbone):
    """A stem of stride 4, then one 3×3 convolution of stride 2 a level: parameters, buffers and levels.

    It has the levels of `MODEL.RETINANET.IN_FEATURES`, which start at p3, with `MODEL.FPN.OUT_CHANNELS` and
    `NORM`.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.names, width = list(cfg.MODEL.RETINANET.IN_FEATURES), cfg.MODEL.FPN.OUT_CHANNELS
        norm = get_norm(cfg.MODEL.FPN.NORM, width) or nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(input_shape.channels, width, 4, 4), norm)
        self.levels = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in self.names)
        self.width = width
        for convolution in (self.stem[0], *self.levels):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # outputs like the inputs
        with torch.no_grad():
            self.stem[0].weight /= 64  # pixels, less their mean, have values of up to 128

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = itertools.accumulate(self.levels, lambda y, level: level(y).relu(), initial=self.stem(x))
        return dict(zip(self.names, itertools.islice(outputs, 1, None), strict=True))

    @property
    def size_divisibility(self) -> int:
        return 32

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(self.width, stride=8 * 2**i) for i, name in enumerate(self.names)}


if "TinyPyramid" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(TinyPyramid)
