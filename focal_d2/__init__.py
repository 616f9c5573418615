"""focal_d2: focal-loss RetinaNet as a detectron2 plugin.

Importing it registers with detectron2 the meta-architecture `FocalRetinaNet`, the backbone builders
`build_focal_resnet_fpn_backbone` and `build_focal_timm_fpn_backbone`, and the embedded datasets
`neon_trees_*` and `digits_*`.

In the process of a command, `focal_d2.engine` does so instead: `focal-d2 --help` need not wait for it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from focal_d2.errors import UserError

if TYPE_CHECKING:
    from focal_d2.config import add_focal_config
    from focal_d2.inference import Detections, Predictor
    from focal_d2.modeling import (
        FocalRetinaNet,
        build_focal_resnet_fpn_backbone,
        build_focal_retinanet,
        build_focal_timm_fpn_backbone,
    )

__version__ = "0.1.0"

__all__ = [
    "Detections",
    "FocalRetinaNet",
    "Predictor",
    "UserError",
    "add_focal_config",
    "build_focal_resnet_fpn_backbone",
    "build_focal_retinanet",
    "build_focal_timm_fpn_backbone",
    "register",
]

# Imported when they are first asked for: a training in plain detectron2 needs no predictor.
_MODULES = {
    "Detections": "focal_d2.inference",
    "FocalRetinaNet": "focal_d2.modeling",
    "Predictor": "focal_d2.inference",
    "add_focal_config": "focal_d2.config",
    "build_focal_resnet_fpn_backbone": "focal_d2.modeling",
    "build_focal_retinanet": "focal_d2.modeling",
    "build_focal_timm_fpn_backbone": "focal_d2.modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return getattr(importlib.import_module(_MODULES[name]), name)


def register() -> None:
    """Register everything with detectron2. Only a module that a command imports needs to call it."""
    with warnings.catch_warnings():
        # Of fvcore and detectron2 while they are imported; their user cannot change it.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        for module in ("focal_d2.modeling", "focal_d2.data.embedded"):
            importlib.import_module(module)


def _is_command() -> bool:
    """Whether this process is `focal-d2`, or `python -m focal_d2`, or was started by one."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # While Python looks for the module of -m, that is the program's name.
    is_module = program == "-m" and ("-m", "focal_d2") in itertools.pairwise(sys.orig_argv)
    return is_module or os.path.basename(program) == "focal-d2"


if not _is_command():
    register()
