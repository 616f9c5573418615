"""Every key of focal_d2's own, with its default and its legal values. detectron2's keys keep their meaning.

Keys under MODEL act in any detectron2 project. Those under INPUT, DATASETS, DATALOADER, SOLVER and TEST, and
MODEL.DEVICE "auto", are read by focal_d2's trainer and tools.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

from detectron2.config import CfgNode

from focal_d2.config.architectures import CLASS_KEYS
from focal_d2.config.ranges import (
    ANYTHING,
    FINITE,
    Range,
    check_value,
    either,
    list_of,
    lists_of,
    number,
    one_of,
    whole,
)
from focal_d2.errors import UserError

_Value = TypeVar("_Value")

# Far above what anyone needs, and low enough that no number overflows.
MOST_BOXES = 10**6  # in an image
MOST_CHANNELS = 2**13
MOST_IMAGES = 10**6  # in a batch
MOST_ITERATIONS = 10**9
MOST_PIXELS = 10**5  # along an edge

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


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value)


_NAMES = Range("it must be a list of names", _are_texts)

KEYS: dict[str, tuple[Any, Range]] = {
    # Channels of the subnets' hidden convolutions; 0: as many as the FPN has (the paper: 256).
    # Their number is MODEL.RETINANET.NUM_CONVS, their norm MODEL.RETINANET.NORM ("", "GN", "BN", "SyncBN").
    "MODEL.FOCAL.HEAD.CHANNELS": (0, whole(0, MOST_CHANNELS, note="0: as many as the FPN has")),
    # What P6 is computed from: "res5" (C5; the paper and detectron2's model zoo) or "p5" (later variants).
    "MODEL.FOCAL.FPN.P6_FROM": ("res5", one_of("res5", "p5")),
    # The levels of the pyramid, strides 8 to 128 or 4 to 64. MODEL.RETINANET.IN_FEATURES must name the same,
    # and MODEL.ANCHOR_GENERATOR.SIZES has a list for each.
    "MODEL.FOCAL.FPN.LEVELS": ("p3-p7", one_of("p3-p7", "p2-p6")),
    # How the pyramid's convolutions start: "xavier" (detectron2) or "paper", N(0, 0.01).
    "MODEL.FOCAL.FPN.INIT": ("xavier", one_of("xavier", "paper")),
    # For MODEL.BACKBONE.NAME build_focal_timm_fpn_backbone: a model of timm (pip install timm), with or
    # without the tag of pretrained weights: "convnext_tiny", "resnet18.a1_in1k". The backbone checks it.
    "MODEL.FOCAL.TIMM.NAME": ("", ANYTHING),
    # Its batch norms: "frozen" (pretrained weights, as FrozenBN of the ResNets) or "trained" (from scratch).
    "MODEL.FOCAL.TIMM.BATCH_NORM": ("frozen", one_of("frozen", "trained")),
    # Which anchors must detect a box: "iou" (the paper: those of enough IoU, MODEL.RETINANET.IOU_THRESHOLDS
    # and IOU_LABELS) or "atss" (arXiv 1912.02424: a threshold for each box, from anchors near its centre).
    "MODEL.FOCAL.ASSIGNER.NAME": ("iou", one_of("iou", "atss")),
    # atss: so many cells of each level are a box's candidates, all anchors of a cell.
    "MODEL.FOCAL.ASSIGNER.TOPK": (9, whole(1, 1000)),
    # iou: give each box its best anchors even below the IoU threshold; detectron2 does, the paper does not.
    "MODEL.FOCAL.LOW_QUALITY_MATCHES": (True, ANYTHING),
    # Background anchors of which a crowd, a difficult object or a box cut off by a crop covers at least this
    # share are ignored (in focal_d2's trainer; detectron2 trains them as background). Above 1: none.
    "MODEL.FOCAL.IGNORE_OVERLAP": (0.5, number(above=0)),
    # ce, balanced_ce, focal, focal_star, softmax_ce, softmax_focal, ohem, hard_negative_mining,
    # random_sampling, fixed_weights, ghm, quality_focal, varifocal, or one that was registered:
    # `modeling.losses` checks it.
    "MODEL.FOCAL.LOSS.NAME": ("focal", ANYTHING),
    # Its parameters; None: the loss's default (LOSS_DEFAULTS). The losses check them. Parameters of a user's
    # own loss may stand here too; what the chosen loss does not read is an error.
    **{
        f"MODEL.FOCAL.LOSS.{parameter}": (None, FINITE)
        for parameter in sorted({p for defaults in LOSS_DEFAULTS.values() for p in defaults})
    },
    # "reference": as the formulas read. "fused": value and gradient in one pass over the head's output, for
    # ce, balanced_ce, focal, fixed_weights, quality_focal, varifocal. "auto": fused on a CPU, where the loss
    # has it.
    "MODEL.FOCAL.LOSS.IMPLEMENTATION": ("auto", one_of("auto", "reference", "fused")),
    # What both losses are divided by: "ema" (detectron2: moving average of the batch's positive anchors,
    # momentum 0.9 from 100) or "paper" (this batch's positive anchors, at least 1).
    "MODEL.FOCAL.LOSS.NORMALIZER": ("ema", one_of("ema", "paper")),
    # MODEL.RETINANET.BBOX_REG_LOSS_TYPE may also be "ghm_r", with these (arXiv 1811.05181, section 4.2).
    "MODEL.FOCAL.GHM_R.MU": (0.02, number(above=0)),
    "MODEL.FOCAL.GHM_R.BINS": (10, whole(1, 10_000)),
    "MODEL.FOCAL.GHM_R.MOMENTUM": (0.7, number(least=0, below=1)),
    # Backbone and head under autocast, losses and decoding in float32, in training and evaluation.
    # SOLVER.AMP.ENABLED turns this on in focal_d2's trainer and tools.
    "MODEL.FOCAL.AMP.ENABLED": (False, ANYTHING),
    # "auto": bfloat16, but on a CPU only where it pays and is sound (amx_bf16, or avx512_bf16 on an AMD CPU),
    # else float32; the log says which. "bfloat16" needs no loss scaling and is obeyed everywhere. "float16"
    # is for CUDA only; focal_d2's trainer then scales the loss, as detectron2's does for SOLVER.AMP.ENABLED.
    "MODEL.FOCAL.AMP.DTYPE": ("auto", one_of("auto", "bfloat16", "float16")),
    # Let CUDA's matrix products and convolutions round float32 inputs to TF32 (10 bits of mantissa).
    # PyTorch, and so detectron2, does so in convolutions. Read by focal_d2's trainer.
    "MODEL.FOCAL.TF32": (True, ANYTHING),
    # Triton kernels on a GPU, for matching anchors and for the fused loss (LOSS.IMPLEMENTATION fused): "on",
    # "off" or "auto", which is off: they were never run on a GPU. YAML that focal_d2 does not read itself
    # needs quotes around on and off.
    "MODEL.FOCAL.KERNELS": ("auto", one_of("auto", "on", "off")),
    # Store weights and images as NHWC, as convolution libraries prefer; values are the same up to rounding:
    # of candidates with equal logits, which are common in bfloat16, others may come first.
    "MODEL.FOCAL.CHANNELS_LAST": (False, ANYTHING),
    # Compute a convolution and the frozen batch norm after it as one convolution: the same function, and
    # the same names in checkpoints.
    "MODEL.FOCAL.FOLD_FROZEN_NORMS": (True, ANYTHING),
    # torch.compile backbone and head, and keep targets in fixed shapes, with most losses. Compiles again for
    # each new image shape; needs a C++ compiler.
    "MODEL.FOCAL.COMPILE": (False, ANYTHING),
    # INPUT.FORMAT may be BGR, RGB, L (grey), HSV, YCbCr or YUV-BT.601: `data.mapper` checks it.
    # What decodes and resizes images: "pil" (detectron2's way) or "opencv": faster, the same boxes, pixels
    # within two grey levels of Pillow's; INPUT.FORMAT BGR or RGB, no masks.
    "INPUT.FOCAL.BACKEND": ("pil", one_of("pil", "opencv")),
    # Images of more pixels (height times width) are refused before they are decoded: a file of 20 kB can have
    # 10^9 of them, and reading takes up to 13 bytes a pixel. The default is a square kilometre at 10 cm a
    # pixel, 10,000 × 10,000, a common tile of aerial surveys. Cameras of 150 megapixels need more.
    "INPUT.FOCAL.MAX_PIXELS": (100_000_000, whole(1, MOST_PIXELS**2)),
    # For pictures without an upright direction (aerial, microscopy), beside INPUT.RANDOM_FLIP.
    "INPUT.FOCAL.VERTICAL_FLIP": (False, ANYTHING),
    # Turn by 0, 90, 180 or 270 degrees, each as likely.
    "INPUT.FOCAL.ROTATE_90": (False, ANYTHING),
    # Multiply brightness and contrast by a factor drawn from [1 - x, 1 + x]; 0: off. INPUT.FORMAT BGR, RGB
    # or L.
    "INPUT.FOCAL.BRIGHTNESS": (0.0, number(least=0, below=1)),
    "INPUT.FOCAL.CONTRAST": (0.0, number(least=0, below=1)),
    # The same for saturation (0 is grey, 1 as it is); INPUT.FORMAT BGR or RGB.
    "INPUT.FOCAL.SATURATION": (0.0, number(least=0, below=1)),
    # Turn hues by up to so many degrees either way; 0: off, 180: to any. INPUT.FORMAT BGR or RGB.
    "INPUT.FOCAL.HUE": (0.0, number(least=0, most=180, note="degrees")),
    # Multiply the size that INPUT.MIN_SIZE_TRAIN gives by a factor drawn from [low, high]; above 1 it needs
    # BOX_CROP. Large-scale jitter (arXiv 2012.07177) is [0.1, 2.0] with a crop of [1024, 1024].
    "INPUT.FOCAL.SCALE_JITTER": (
        [1.0, 1.0],
        list_of(number(above=0, most=100), length=2, order="not descending"),
    ),
    # Crop to at most [height, width] pixels after resizing; []: off. Nothing is padded.
    "INPUT.FOCAL.BOX_CROP.SIZE": ([], list_of(whole(1, MOST_PIXELS), length=2, may_be_empty=True)),
    # How often the crop is placed to hold a box, each box as likely; else it may be anywhere in the image.
    "INPUT.FOCAL.BOX_CROP.AROUND_BOX": (0.5, number(least=0, most=1)),
    # A box that shows less than this share of its area in the crop is an ignored region: neither object nor
    # background.
    "INPUT.FOCAL.BOX_CROP.MIN_VISIBLE": (0.25, number(least=0, most=1)),
    # How often an image becomes a mosaic (arXiv 2004.10934): windows of it and three others around a point,
    # of the size of the first. All other augmentations come before; BOX_CROP.MIN_VISIBLE counts here, too.
    "INPUT.FOCAL.MOSAIC.PROBABILITY": (0.0, number(least=0, most=1)),
    # Each of the four is resized by a factor drawn from [low, high] before its window is cut.
    "INPUT.FOCAL.MOSAIC.SCALE": (
        [0.5, 1.0],
        list_of(number(above=0, most=1), length=2, order="not descending"),
    ),
    # How often boxes of another image are pasted into one, with their pixels, after the mosaic. Their number
    # is drawn from 1 to BOXES, or to all that the other image has.
    "INPUT.FOCAL.COPY_PASTE.PROBABILITY": (0.0, number(least=0, most=1)),
    "INPUT.FOCAL.COPY_PASTE.BOXES": (5, whole(1, MOST_BOXES)),
    # They cover at most this share of the area of any box in the image.
    "INPUT.FOCAL.COPY_PASTE.MAX_COVERED": (0.3, number(least=0, most=1)),
    # The last share of the iterations, in which nothing is mixed: training ends with images as evaluation has
    # them, whole and without edges inside.
    "INPUT.FOCAL.PLAIN_SHARE": (0.1, number(least=0, most=1)),
    # Own datasets, a list of {NAME, FORMAT (coco, voc, yolo, csv), IMAGES, ANNOTATIONS, CLASSES, LIST}: see
    # docs/data.md. `data.entries` checks them.
    "DATASETS.FOCAL": ([], ANYTHING),
    # Datasets to validate on during training, beside DATASETS.TRAIN and TEST: their losses and AP are curves
    # (every TEST.EVAL_PERIOD iterations), and the best model and the end of training are chosen on them. The
    # test sets are then evaluated at the end only. (): the test sets take their place.
    "DATASETS.VAL": ((), _NAMES),
    # Seconds that training waits for a batch before it takes reading for hung; 0: for ever.
    "DATALOADER.FOCAL.TIMEOUT": (600.0, number(least=0, most=10**9, note="seconds; 0: no limit")),
    # Keep decoded training images, so that each is decoded once: "ram", one copy in the memory of a machine,
    # "disk", files that other trainings use, too, or "": off. The weights are the same.
    "DATALOADER.FOCAL.CACHE": ("", one_of("", "ram", "disk")),
    # Their size in gigabytes (10^9 bytes) at most. If not all fit, the first ones are kept.
    "DATALOADER.FOCAL.CACHE_GB": (8.0, number(above=0, most=10**6, note="gigabytes")),
    # For disk: the folder of the files. It is never emptied.
    "DATALOADER.FOCAL.CACHE_FOLDER": ("", ANYTHING),
    # "SGD" (detectron2's, with SOLVER.MOMENTUM and SOLVER.NESTEROV) or "AdamW".
    "SOLVER.FOCAL.OPTIMIZER": ("SGD", one_of("SGD", "AdamW")),
    # Multiply the learning rate of the backbone's C5 by this, that of C4 by its square, … (d^5 for a stem of
    # stride 2); pyramid and head have the whole rate. 1.0: the same rate everywhere.
    "SOLVER.FOCAL.LAYER_DECAY": (1.0, number(above=0, most=1)),
    # Compute a batch in so many parts, one after another: the same step in less memory. Batch norm, GHM and
    # the like see a part at a time. At most the images that a process has in a batch.
    "SOLVER.FOCAL.ACCUMULATE": (1, whole(1, MOST_IMAGES)),
    # Moving average of the weights, which is what evaluation uses and checkpoints offer as the model: its
    # share that stays at each step (0.999 for a few thousand iterations, 0.9998 for 90,000); 0: none.
    "SOLVER.FOCAL.EMA": (0.0, number(least=0, below=1, note="0: none")),
    # What to do when the loss or a gradient is not finite, after the report (docs/nonfinite.md): "stop",
    # "skip" the step, or "halve_lr" (skip it, and halve the learning rate from there on).
    "SOLVER.FOCAL.ON_NONFINITE": ("stop", one_of("stop", "skip", "halve_lr")),
    # Of the checkpoints that SOLVER.CHECKPOINT_PERIOD writes, keep the newest so many; 0: all.
    "SOLVER.FOCAL.KEEP_CHECKPOINTS": (3, whole(0, MOST_ITERATIONS, note="0: all")),
    # Send figures and pictures to this project at Weights & Biases (pip install wandb); "": off.
    "SOLVER.FOCAL.WANDB_PROJECT": ("", ANYTHING),
    # What counts AP: "hotcoco" or "pycocotools", the same numbers a hundred times slower.
    "TEST.FOCAL.EVAL_BACKEND": ("hotcoco", one_of("hotcoco", "pycocotools")),
    # Limits on the detections of a class in an image, ascending: a recall is given at each, AP at the last.
    # []: 1, 10 and the higher of 100 and TEST.DETECTIONS_PER_IMAGE; in tiles 100,000.
    "TEST.FOCAL.MAX_DETS": ([], list_of(whole(1, MOST_BOXES), may_be_empty=True, order="ascending")),
    # What the operating point is chosen for, the score that a checkpoint keeps as its threshold: "f1", the
    # highest F1; or a "recall" or "precision" of at least WANTED. It is chosen on the first dataset of
    # DATASETS.VAL or, if VAL is (), of DATASETS.TEST.
    "TEST.FOCAL.OPERATING_POINT": ("f1", one_of("f1", "recall", "precision")),
    "TEST.FOCAL.WANTED": (0.9, number(above=0, most=1)),
    # With TEST.AUG.ENABLED (detectron2's: each size of TEST.AUG.MIN_SIZES, and mirrored if FLIP): also turned
    # by 90, 180 and 270 degrees, four times the work.
    "TEST.FOCAL.AUG_TURNS": (False, ANYTHING),
    # Detect in overlapping tiles of each picture, of any size, and join what they find (docs/prediction.md).
    # TEST.DETECTIONS_PER_IMAGE then counts for each tile.
    "TEST.FOCAL.TILES.ENABLED": (False, ANYTHING),
    # Side of a tile in pixels of the picture. Where INPUT.MIN_SIZE_TEST resizes images, a tile is resized to
    # it: the shorter side of the training images keeps their scale. 0: 512, where images are not resized.
    "TEST.FOCAL.TILES.WINDOW": (0, whole(0, MOST_PIXELS, note="0: 512, if images are not resized")),
    # Of neighbouring tiles, in pixels: at least the size of most objects. 0: a quarter of the window.
    "TEST.FOCAL.TILES.OVERLAP": (0, whole(0, MOST_PIXELS, note="0: a quarter of the window")),
    # Of two detections of an object in two tiles: "nms" keeps the better box, "fuse" takes their mean.
    "TEST.FOCAL.TILES.MERGE": ("nms", one_of("nms", "fuse")),
    # Save model_best.pth whenever an evaluation (TEST.EVAL_PERIOD) improves this metric of DATASETS.VAL or,
    # if VAL is (), of DATASETS.TEST: "bbox/AP", "bbox/AP50", …, with several sets "NAME/bbox/AP"; "": off.
    # `engine.hooks.evaluation` checks it.
    "TEST.FOCAL.BEST_METRIC": ("", ANYTHING),
    # End training after so many evaluations without improvement of BEST_METRIC; 0: off.
    "TEST.FOCAL.PATIENCE": (0, whole(0, MOST_ITERATIONS, note="0: off")),
}

# Of detectron2's keys, those that are read here, or by detectron2 without a check.
_SIZES = number(least=0.001, most=MOST_PIXELS)
_WIDTH = whole(1, MOST_CHANNELS)


def _are_results(value: Any) -> bool:
    def is_result(x: Any) -> bool:
        if not (isinstance(x, (list, tuple)) and len(x) == 4):
            return False
        return _are_texts(x[:2]) and all(map(number().holds, x[2:]))

    return isinstance(value, (list, tuple)) and all(map(is_result, value))


_NOT_NEGATIVE = number(least=0, most=1e9)  # above, and multiplied, float32 has no such number
_SHARE = number(least=0, most=1)
DETECTRON2_RANGES: dict[str, Range] = {
    **{key: either(one_of("auto"), whole(1, 10**6)) for key in CLASS_KEYS},
    "MODEL.PIXEL_MEAN": list_of(number()),
    "MODEL.PIXEL_STD": list_of(number(above=0)),
    "MODEL.BACKBONE.FREEZE_AT": whole(0, 5),
    "MODEL.RESNETS.NUM_GROUPS": _WIDTH,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _WIDTH,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _WIDTH,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _WIDTH,
    "MODEL.FPN.OUT_CHANNELS": _WIDTH,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.ANCHOR_GENERATOR.SIZES": lists_of(_SIZES),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": lists_of(number(least=0.001, most=1000)),
    "MODEL.ANCHOR_GENERATOR.OFFSET": number(least=0, below=1),
    "MODEL.RETINANET.NUM_CONVS": whole(1, 100),
    "MODEL.RETINANET.IOU_THRESHOLDS": list_of(_SHARE, order="not descending"),
    "MODEL.RETINANET.IOU_LABELS": list_of(whole(-1, 1)),
    "MODEL.RETINANET.PRIOR_PROB": number(above=0, below=1),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": whole(1, MOST_BOXES),
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": list_of(number(above=0), length=4),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _NOT_NEGATIVE,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": number(most=1, note="negative: no weighting"),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "INPUT.MIN_SIZE_TRAIN": list_of(whole(0, MOST_PIXELS)),  # 0: images as they are
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": whole(1, 2**31 - 1),
    "INPUT.MIN_SIZE_TEST": whole(0, MOST_PIXELS, note="0: images as they are"),
    "INPUT.MAX_SIZE_TEST": whole(1, 2**31 - 1),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": one_of("absolute", "absolute_range", "relative", "relative_range"),
    "INPUT.CROP.SIZE": list_of(number(above=0, most=MOST_PIXELS), length=2),
    "DATALOADER.NUM_WORKERS": whole(0, 1024, note="0: training reads the images itself"),
    "DATALOADER.REPEAT_THRESHOLD": _SHARE,
    "SOLVER.MAX_ITER": whole(1, MOST_ITERATIONS),
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": number(least=0, below=1),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": either(one_of(None), _NOT_NEGATIVE),
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.GAMMA": number(least=0, most=10),
    "SOLVER.STEPS": list_of(whole(1, MOST_ITERATIONS), may_be_empty=True, order="ascending"),
    "SOLVER.NUM_DECAYS": whole(0, 1000),
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": whole(0, MOST_ITERATIONS, note="0: no warm-up"),
    "SOLVER.WARMUP_METHOD": one_of("constant", "linear"),
    "SOLVER.CHECKPOINT_PERIOD": whole(1, MOST_ITERATIONS),
    "SOLVER.IMS_PER_BATCH": whole(1, MOST_IMAGES),
    "SOLVER.REFERENCE_WORLD_SIZE": whole(0, MOST_IMAGES, note="0: off"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(above=0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(number(above=0), one_of(math.inf)),  # the largest
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "TEST.EXPECTED_RESULTS": Range(
        "it must be a list of [task, metric, value, tolerance], such as [[bbox, AP, 38.5, 0.2]], or []",
        _are_results,
    ),
    "TEST.EVAL_PERIOD": whole(0, MOST_ITERATIONS, note="0: at the end only"),
    "TEST.AUG.MIN_SIZES": list_of(whole(0, MOST_PIXELS)),  # 0: images as they are
    "TEST.AUG.MAX_SIZE": whole(1, 2**31 - 1),
    "TEST.PRECISE_BN.NUM_ITER": whole(1, MOST_ITERATIONS),
    "VIS_PERIOD": whole(0, MOST_ITERATIONS, note="0: no pictures"),
    "SEED": whole(-(2**31), 2**31 - 1, note="negative: another one for each run"),
}
RANGES: dict[str, Range] = {key: legal for key, (_, legal) in KEYS.items()} | DETECTRON2_RANGES


def add_focal_config(cfg: CfgNode) -> None:
    """Add focal_d2's keys to a detectron2 config, in place. Call it before merging YAML.

    Args:
        cfg: usually `detectron2.config.get_cfg()`.
    """
    for key, (default, _) in KEYS.items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = copy.copy(default)
    cfg.MODEL.FOCAL.LOSS.set_new_allowed(True)  # parameters of a user's own loss


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
        values |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def check_choice(key: str, value: _Value, choices: Iterable[_Value]) -> _Value:
    """Return `value` if it is one of `choices`.

    Raises:
        UserError: naming the key, the value and the legal choices.
    """
    check_value(key, value, one_of(*choices))
    return value
