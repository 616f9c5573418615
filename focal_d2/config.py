"""Every key of focal_d2's own, with its default. detectron2's keys keep their meaning and defaults.

Keys under MODEL act in any detectron2 project. Those under INPUT, DATASETS, DATALOADER, SOLVER and TEST, and
MODEL.DEVICE "auto", are read by focal_d2's trainer and tools.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from detectron2.config import CfgNode

from focal_d2.errors import UserError

# Parameters of each classification loss and their defaults, the best of the loss's paper where it has one.
# α and γ of "focal" are MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA unless set beside the name.
# A negative ALPHA means no weighting; that of "balanced_ce" and "focal" may be "auto" or "auto_per_class".
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "balanced_ce": {"ALPHA": 0.75},
    "fixed_weights": {"POSITIVE_WEIGHT": 1.0, "NEGATIVE_WEIGHT": 0.5},
    "focal": {"ALPHA": None, "GAMMA": None},
    "focal_star": {"ALPHA": -1.0, "GAMMA": 2.0, "BETA": 1.0},
    "ghm": {"BINS": 30, "MOMENTUM": 0.75},
    "hard_negative_mining": {"NEGATIVES_PER_POSITIVE": 3.0},
    "ohem": {"EXAMPLES": 128, "NMS_THRESH": 0.5, "NEGATIVES_PER_POSITIVE": 0.0},
    "quality_focal": {"BETA": 2.0},
    "random_sampling": {"NEGATIVES_PER_POSITIVE": 3.0},
    "softmax_focal": {"ALPHA": 0.25, "GAMMA": 2.0},
    "varifocal": {"ALPHA": 0.75, "GAMMA": 2.0},
}


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

    # Background anchors of which a crowd, a difficult object or a box cut off by a crop covers at least this
    # share are ignored (in focal_d2's trainer; detectron2 trains them as background). Above 1: none.
    focal.IGNORE_OVERLAP = 0.5

    # Parameters of a user's own loss may stand here too; what the chosen loss does not read is an error.
    focal.LOSS = CfgNode(new_allowed=True)
    # ce, balanced_ce, focal, focal_star, softmax_ce, softmax_focal, ohem, hard_negative_mining,
    # random_sampling, fixed_weights, ghm, quality_focal, varifocal, or one that was registered.
    focal.LOSS.NAME = "focal"
    # Its parameters; None: the loss's default (LOSS_DEFAULTS).
    for parameter in sorted({p for defaults in LOSS_DEFAULTS.values() for p in defaults}):
        focal.LOSS[parameter] = None
    # "reference": as the formulas read. "fused": value and gradient in one pass over the head's output, for
    # ce, balanced_ce, focal, fixed_weights, quality_focal, varifocal. "auto": fused on a CPU, where the loss
    # has it.
    focal.LOSS.IMPLEMENTATION = "auto"
    # What both losses are divided by: "ema" (detectron2: moving average of the batch's positive anchors,
    # momentum 0.9 from 100) or "paper" (this batch's positive anchors, at least 1).
    focal.LOSS.NORMALIZER = "ema"

    # MODEL.RETINANET.BBOX_REG_LOSS_TYPE may also be "ghm_r", with these (arXiv 1811.05181, section 4.2).
    focal.GHM_R = CfgNode()
    focal.GHM_R.MU = 0.02
    focal.GHM_R.BINS = 10
    focal.GHM_R.MOMENTUM = 0.7

    focal.AMP = CfgNode()
    # Backbone and head under autocast, losses and decoding in float32, in training and evaluation.
    # SOLVER.AMP.ENABLED turns this on in focal_d2's trainer and tools.
    focal.AMP.ENABLED = False
    # "auto": bfloat16, but on a CPU only where it pays and is sound (amx_bf16, or avx512_bf16 on an AMD CPU),
    # else float32; the log says which. "bfloat16" needs no loss scaling and is obeyed everywhere. "float16"
    # is for CUDA only; focal_d2's trainer then scales the loss, as detectron2's does for SOLVER.AMP.ENABLED.
    focal.AMP.DTYPE = "auto"
    # Let CUDA's matrix products and convolutions round float32 inputs to TF32 (10 bits of mantissa).
    # PyTorch, and so detectron2, does so in convolutions. Read by focal_d2's trainer.
    focal.TF32 = True

    # Triton kernels on a GPU, for matching anchors and for the fused loss (LOSS.IMPLEMENTATION fused): "on",
    # "off" or "auto", which is off: they have not run on a GPU yet. YAML that focal_d2 does not read itself
    # needs quotes around on and off.
    focal.KERNELS = "auto"

    # Store weights and images as NHWC, which convolution libraries prefer; values stay the same.
    focal.CHANNELS_LAST = False
    # Compute a convolution and the frozen batch norm after it as one convolution: the same function, and
    # the same names in checkpoints.
    focal.FOLD_FROZEN_NORMS = True
    # torch.compile backbone and head. Compiles anew for image shapes it has not met; needs a C++ compiler.
    focal.COMPILE = False

    # INPUT.FORMAT may be BGR, RGB, L (grey), HSV, YCbCr or YUV-BT.601.
    inputs = cfg.INPUT.FOCAL = CfgNode()
    # What decodes and resizes images: "pil" (detectron2's way) or "opencv": faster, the same boxes, pixels
    # within two grey levels of Pillow's; INPUT.FORMAT BGR or RGB, no masks.
    inputs.BACKEND = "pil"
    # Images of more pixels (height times width) are refused before they are decoded: a file of 20 kB can have
    # 10^9 of them, and reading takes up to 13 bytes a pixel. The default is a square kilometre at 10 cm a
    # pixel, 10,000 × 10,000, a common tile of aerial surveys. Cameras of 150 megapixels need more.
    inputs.MAX_PIXELS = 100_000_000
    # For pictures without an upright direction (aerial, microscopy), beside INPUT.RANDOM_FLIP.
    inputs.VERTICAL_FLIP = False
    # Turn by 0, 90, 180 or 270 degrees, each as likely.
    inputs.ROTATE_90 = False
    # Multiply brightness and contrast by a factor drawn from [1 - x, 1 + x]; 0: off. INPUT.FORMAT BGR, RGB
    # or L.
    inputs.BRIGHTNESS = 0.0
    inputs.CONTRAST = 0.0
    # The same for saturation (0 is grey, 1 as it is); INPUT.FORMAT BGR or RGB.
    inputs.SATURATION = 0.0
    # Turn hues by up to so many degrees either way; 0: off, 180: to any. INPUT.FORMAT BGR or RGB.
    inputs.HUE = 0.0
    # Multiply the size that INPUT.MIN_SIZE_TRAIN gives by a factor drawn from [low, high]; above 1 it needs
    # BOX_CROP. Large-scale jitter (arXiv 2012.07177) is [0.1, 2.0] with a crop of [1024, 1024].
    inputs.SCALE_JITTER = [1.0, 1.0]
    inputs.BOX_CROP = CfgNode()
    # Crop to at most [height, width] pixels after resizing; []: off. Nothing is padded.
    inputs.BOX_CROP.SIZE = []
    # How often the crop is placed to hold a box, each box as likely; else it may be anywhere in the image.
    inputs.BOX_CROP.AROUND_BOX = 0.5
    # A box that shows less than this share of its area in the crop is an ignored region: neither object nor
    # background.
    inputs.BOX_CROP.MIN_VISIBLE = 0.25

    # Own datasets, a list of {NAME, FORMAT (coco, voc, yolo, csv), IMAGES, ANNOTATIONS, CLASSES, LIST}: see
    # docs/data.md.
    cfg.DATASETS.FOCAL = []

    loader = cfg.DATALOADER.FOCAL = CfgNode()
    # Seconds that training waits for a batch before it takes reading for hung; 0: for ever.
    loader.TIMEOUT = 600.0

    solver = cfg.SOLVER.FOCAL = CfgNode()
    # "SGD" (detectron2's, with SOLVER.MOMENTUM and SOLVER.NESTEROV) or "AdamW".
    solver.OPTIMIZER = "SGD"
    # Compute a batch in so many parts, one after another: the same step in less memory. Batch norm, GHM and
    # the like see a part at a time.
    solver.ACCUMULATE = 1
    # Moving average of the weights, which is what evaluation uses and checkpoints offer as the model: its
    # share that stays at each step (0.999 for a few thousand iterations, 0.9998 for 90,000); 0: none.
    solver.EMA = 0.0
    # What to do when the loss or a gradient is not finite, after the report (docs/nonfinite.md): "stop",
    # "skip" the step, or "halve_lr" (skip it, and halve the learning rate from there on).
    solver.ON_NONFINITE = "stop"
    # Of the checkpoints that SOLVER.CHECKPOINT_PERIOD writes, keep the newest so many; 0: all.
    solver.KEEP_CHECKPOINTS = 3
    # Send figures and pictures to this project at Weights & Biases (pip install wandb); "": off.
    solver.WANDB_PROJECT = ""

    test = cfg.TEST.FOCAL = CfgNode()
    # What counts AP: "hotcoco" or "pycocotools", the same numbers a hundred times slower.
    test.EVAL_BACKEND = "hotcoco"
    # Limits on the detections of a class in an image, ascending: a recall is given at each, AP at the last.
    # []: 1, 10 and the higher of 100 and TEST.DETECTIONS_PER_IMAGE.
    test.MAX_DETS = []
    # Save model_best.pth whenever an evaluation (TEST.EVAL_PERIOD) improves this metric of metrics.json:
    # "bbox/AP", "bbox/AP50", …, with several test sets "NAME/bbox/AP"; "": off.
    test.BEST_METRIC = ""
    # End training after so many evaluations without improvement of BEST_METRIC; 0: off.
    test.PATIENCE = 0


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


def loss_parameters(cfg: CfgNode) -> dict[str, Any]:
    """Return the chosen loss's parameters by their YAML names: its defaults, and what the config sets."""
    node, retinanet = focal_config(cfg).LOSS, cfg.MODEL.RETINANET
    defaults = LOSS_DEFAULTS.get(node.NAME, {})
    if node.NAME == "focal":
        defaults = {"ALPHA": retinanet.FOCAL_LOSS_ALPHA, "GAMMA": retinanet.FOCAL_LOSS_GAMMA}
    chosen = {
        k: v for k, v in node.items() if v is not None and k not in ("NAME", "NORMALIZER", "IMPLEMENTATION")
    }
    return {**defaults, **chosen}


def key_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key that is written with dots."""
    return functools.reduce(operator.getitem, key.split("."), cfg)


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set a key that is written with dots; yacs checks no type here."""
    section, _, name = key.rpartition(".")
    key_value(cfg, section)[name] = value


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config, or a section of it, by their keys written with dots."""
    values: dict[str, Any] = {}
    for name, value in node.items():
        values |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        UserError: naming the key, the value and the legal choices.
    """
    if value not in choices:
        raise UserError(f'{key} is "{value}"; legal values: {", ".join(choices)}')
    return value
