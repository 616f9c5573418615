"""Every key of focal_d2's own, with its default. detectron2's keys keep their meaning and defaults.

Keys under MODEL act in any detectron2 project. Those under INPUT, DATASETS and SOLVER, and MODEL.DEVICE
"auto", are read by focal_d2's trainer and tools.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from focal_d2.errors import UserError


def add_focal_config(cfg: CfgNode) -> None:
    """Add focal_d2's keys to a detectron2 config, in place. Call it before merging YAML.

    Args:
        cfg: usually `detectron2.config.get_cfg()`.
    """
    focal = cfg.MODEL.FOCAL = CfgNode()

    focal.HEAD = CfgNode()
    # Channels of the subnets' hidden convolutions; 0: as many as the FPN has (the paper: 256).
    # Their number is MODEL.RETINANET.NUM_CONVS, their norm MODEL.RETINANET.NORM ("", "GN", "BN", "SyncBN").
    focal.HEAD.CHANNELS = 0

    focal.FPN = CfgNode()
    # What P6 is computed from: "res5" (C5; the paper and detectron2's model zoo) or "p5" (later variants).
    focal.FPN.P6_FROM = "res5"
    # How the pyramid's convolutions start: "xavier" (detectron2) or "paper", N(0, 0.01).
    focal.FPN.INIT = "xavier"

    # Give each box its best anchors even below the IoU threshold: detectron2 does, the paper does not.
    focal.LOW_QUALITY_MATCHES = True

    focal.LOSS = CfgNode()
    # What both losses are divided by: "ema" (detectron2: moving average of the batch's positive anchors,
    # momentum 0.9 from 100) or "paper" (this batch's positive anchors, at least 1).
    focal.LOSS.NORMALIZER = "ema"

    focal.AMP = CfgNode()
    # Backbone and head under bfloat16 autocast, losses and decoding in float32. Needs no loss scaling and
    # works on CPU and CUDA. On a CPU, SOLVER.AMP.ENABLED turns this on.
    focal.AMP.ENABLED = False

    # Store weights and images as NHWC, which convolution libraries prefer; values stay the same.
    focal.CHANNELS_LAST = False

    inputs = cfg.INPUT.FOCAL = CfgNode()
    # For pictures without an upright direction (aerial, microscopy), beside INPUT.RANDOM_FLIP.
    inputs.VERTICAL_FLIP = False
    # Turn by 0, 90, 180 or 270 degrees, each as likely.
    inputs.ROTATE_90 = False
    # Multiply brightness and contrast by a factor drawn from [1 - x, 1 + x]; 0: off.
    inputs.BRIGHTNESS = 0.0
    inputs.CONTRAST = 0.0

    # Own datasets in COCO format, a list of {NAME, ANNOTATIONS (json file), IMAGES (folder)}.
    cfg.DATASETS.FOCAL = []

    solver = cfg.SOLVER.FOCAL = CfgNode()
    # "SGD" (detectron2's, with SOLVER.MOMENTUM and SOLVER.NESTEROV) or "AdamW".
    solver.OPTIMIZER = "SGD"


def focal_config(cfg: CfgNode) -> CfgNode:
    """Return `cfg.MODEL.FOCAL`.

    Raises:
        UserError: if `add_focal_config` was not called on this config.
    """
    if "FOCAL" not in cfg.MODEL:
        raise UserError(
            "the config has no MODEL.FOCAL: call focal_d2.add_focal_config(cfg) before merging YAML"
        )
    return cfg.MODEL.FOCAL


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        UserError: naming the key, the value and the legal choices.
    """
    if value not in choices:
        raise UserError(f'{key} is "{value}"; legal values: {", ".join(choices)}')
    return value
