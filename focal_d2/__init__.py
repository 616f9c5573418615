"""focal_d2: focal-loss RetinaNet as a detectron2 plugin.

Importing it registers the meta-architecture `FocalRetinaNet`, the backbone builder
`build_focal_resnet_fpn_backbone` and the `neon_trees_*` datasets.
"""

import warnings

with warnings.catch_warnings():
    # fvcore and detectron2 use these as they are imported; nobody who reads the warnings can mend that.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from focal_d2.config import add_focal_config
    from focal_d2.errors import UserError
    from focal_d2.inference import Detections, Predictor
    from focal_d2.modeling import FocalRetinaNet, build_focal_resnet_fpn_backbone, build_focal_retinanet

__version__ = "0.1.0"

__all__ = [
    "Detections",
    "FocalRetinaNet",
    "Predictor",
    "UserError",
    "add_focal_config",
    "build_focal_resnet_fpn_backbone",
    "build_focal_retinanet",
]
