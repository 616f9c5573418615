"""Weights of torchvision's ResNets and RetinaNet, converted to ours, with the settings that fit them.

Shapes: A anchors a cell, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from focal_d2.errors import UserError, first_few

# The number of blocks in each stage, and whether blocks have three convolutions → depth.
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
# torchvision's RetinaNet has anchors of 3 sizes a level, in whole pixels, times these ratios.
_RATIOS = [0.5, 1.0, 2.0]
_SIZES = [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)]
_NORM_EPS = 1e-5  # of detectron2's batch norms


class Converted(NamedTuple):
    """Weights with the names of our models, and the config that builds the model."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]  # sections and keys
    is_detector: bool  # False: a backbone


def convert(
    state: Mapping[str, Any], *, norm_eps: float = _NORM_EPS, classes: Sequence[int] | None = None
) -> Converted:
    """Convert a state dict of a torchvision ResNet or RetinaNet.

    Args:
        state: names and values, as `model.state_dict()` returns them; those of files that torchvision before
            0.13 wrote are known, too.
        norm_eps: ε of the model's batch norms. It is 0 for torchvision's RetinaNet_ResNet50_FPN_Weights
            COCO_V1, else 1e-5. A state does not contain it.
        classes: torchvision's labels of the classes to keep, in our order; None: all, under their numbers.
            Its label 0 is the background, which never has a box.

    Raises:
        UserError: for another model, or a label that it does not have.
    """
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    is_detector = "head.classification_head.cls_logits.weight" in tensors
    prefix = "backbone.body." if is_detector else ""
    body = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    settings = _resnet_settings(body)
    weights = {f"backbone.bottom_up.{name}": x for name, x in _resnet_weights(body, norm_eps).items()}
    if not is_detector:
        if classes is not None:
            raise UserError("this file has no detector's head, so it has no classes to choose from")
        return Converted(weights, settings, is_detector)
    tensors = {_new_name(name): x for name, x in tensors.items()}
    detector, more = _detector(tensors, classes)
    for section, keys in more.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return Converted({**weights, **detector}, settings, is_detector)


def _resnet_settings(body: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config of a ResNet from the shapes of its weights."""
    blocks = {
        (int(match[1]), int(match[2])) for name in body if (match := re.match(r"layer(\d)\.(\d+)\.", name))
    }
    counts = tuple(sum(stage == i for stage, _ in blocks) for i in range(1, 5))
    is_bottleneck = "layer1.0.conv3.weight" in body
    depth = _DEPTHS.get((counts, is_bottleneck))
    if depth is None or "conv1.weight" not in body:
        raise UserError(
            "these are neither weights of torchvision's ResNets (18, 34, 50, 101, 152, ResNeXt, wide) nor of "
            f"its RetinaNet: they have {first_few(sorted(body), 3) or 'no tensors'}"
        )
    resnets: dict[str, Any] = {"DEPTH": depth, "NORM": "FrozenBN", "STRIDE_IN_1X1": False}
    if is_bottleneck:
        width, inputs = body["layer1.0.conv2.weight"].shape[:2]
        groups = width // inputs
        resnets |= {"NUM_GROUPS": groups, "WIDTH_PER_GROUP": width // groups}
    resnets["RES2_OUT_CHANNELS"] = 256 if is_bottleneck else 64
    return {
        "MODEL": {
            "PIXEL_MEAN": [123.675, 116.28, 103.53],  # torchvision's, times 255
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": resnets,
        },
        "INPUT": {"FORMAT": "RGB"},
    }


def _resnet_weights(body: Mapping[str, Tensor], norm_eps: float) -> dict[str, Tensor]:
    """Return the weights of a ResNet with detectron2's names."""
    weights = {}
    for name, x in body.items():
        parts = name.split(".")
        if parts[0] == "fc" or parts[-1] == "num_batches_tracked":
            continue
        if parts[-1] == "running_var":
            x = x + (norm_eps - _NORM_EPS)  # the norms divide by the root of running_var + ε
        if parts[0].startswith("layer"):
            parts[0] = f"res{int(parts[0][5:]) + 1}"
        else:
            parts.insert(0, "stem")
        layer = parts[-2] if parts[-3] != "downsample" else f"downsample{parts.pop(-2)}"
        layer = layer.replace("downsample0", "shortcut").replace("downsample1", "shortcut.norm")
        parts[-2] = re.sub(r"^bn(\d)$", r"conv\1.norm", layer)
        weights[".".join(parts)] = x
    return weights


def _new_name(name: str) -> str:
    """Return the name that a weight has since torchvision 0.13."""
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    old = re.match(r"(head\.\w+\.conv)\.(\d+)\.(weight|bias)$", name)  # convolution, ReLU, convolution, …
    return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}" if old else name


def _detector(
    tensors: Mapping[str, Tensor], classes: Sequence[int] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of pyramid and head, and their settings."""
    weights = {}
    for kind, ours in (("inner", "lateral"), ("layer", "output")):
        for i in range(3):
            for leaf in ("weight", "bias"):
                weights[f"backbone.fpn_{ours}{i + 3}.{leaf}"] = _get(
                    tensors, f"backbone.fpn.{kind}_blocks.{i}.0.{leaf}"
                )
    if "backbone.fpn.inner_blocks.3.0.weight" in tensors:
        raise UserError("this RetinaNet's pyramid begins at P2 and ends at P7; ours has five levels")
    for level in ("p6", "p7"):
        for leaf in ("weight", "bias"):
            weights[f"backbone.top_block.{level}.{leaf}"] = _get(
                tensors, f"backbone.fpn.extra_blocks.{level}.{leaf}"
            )
    channels, p6_inputs = weights["backbone.top_block.p6.weight"].shape[:2]
    has_norms = "head.classification_head.conv.0.1.weight" in tensors
    depth = 0
    while f"head.classification_head.conv.{depth}.0.weight" in tensors:
        depth += 1
    for head, ours in (("classification_head", "cls_subnet"), ("regression_head", "bbox_subnet")):
        for i in range(depth):
            first = i * (3 if has_norms else 2)  # a convolution, maybe a norm, a ReLU
            weight = _get(tensors, f"head.{head}.conv.{i}.0.weight")
            weights[f"head.{ours}.{first}.weight"] = weight
            bias = tensors.get(f"head.{head}.conv.{i}.0.bias", weight.new_zeros(len(weight)))
            weights[f"head.{ours}.{first}.bias"] = bias
            for leaf in ("weight", "bias") if has_norms else ():
                weights[f"head.{ours}.{first + 1}.{leaf}"] = _get(tensors, f"head.{head}.conv.{i}.1.{leaf}")
    kept = _last_layers(tensors, weights, classes)
    model = {
        "META_ARCHITECTURE": "FocalRetinaNet",
        "BACKBONE": {"NAME": "build_focal_resnet_fpn_backbone"},
        "FPN": {"OUT_CHANNELS": channels, "NORM": ""},
        "ANCHOR_GENERATOR": {
            "NAME": "TorchvisionAnchorGenerator",
            "SIZES": _SIZES,
            "ASPECT_RATIOS": [_RATIOS],
            "OFFSET": 0.0,
        },
        "RETINANET": {
            "NUM_CLASSES": kept,
            "NUM_CONVS": depth,
            "NORM": "GN" if has_norms else "",
            "BBOX_REG_LOSS_TYPE": "giou" if has_norms else "smooth_l1",  # of torchvision's two versions
            "BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
        },
        # torchvision takes P6 from P5 where both have as many channels.
        "FOCAL": {"FPN": {"P6_FROM": "p5" if p6_inputs == channels else "res5"}},
    }
    more = {
        "MODEL": model,
        "INPUT": {"MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333},
        "TEST": {"DETECTIONS_PER_IMAGE": 300},
    }
    return weights, more


def _last_layers(
    tensors: Mapping[str, Tensor], weights: dict[str, Tensor], classes: Sequence[int] | None
) -> int:
    """Add the last layers of the head, whose channels have another order; return the number of classes.

    torchvision's anchors of a cell are ordered by ratio and then size, detectron2's by size and then ratio.
    """
    anchors = len(_get(tensors, "head.regression_head.bbox_reg.bias")) // 4
    if anchors != len(_RATIOS) * len(_SIZES[0]):
        raise UserError(
            f"this RetinaNet has {anchors} anchors a cell; torchvision's have 9, of 3 ratios and 3 sizes"
        )
    order = torch.arange(anchors).view(len(_RATIOS), -1).T.flatten()
    num_labels = len(_get(tensors, "head.classification_head.cls_logits.bias")) // anchors
    kept = list(range(num_labels)) if classes is None else list(classes)
    if wrong := [x for x in kept if not 0 <= x < num_labels]:
        raise UserError(f"there is no class {wrong[0]} in this file; it has 0 to {num_labels - 1}")
    pick: list[tuple[str, str, int, Callable[[Tensor], Tensor]]] = [
        ("classification_head.cls_logits", "cls_score", num_labels, lambda x: x[order][:, kept]),
        ("regression_head.bbox_reg", "bbox_pred", 4, lambda x: x[order]),
    ]
    for theirs, ours, numbers, select in pick:
        for leaf in ("weight", "bias"):
            x = _get(tensors, f"head.{theirs}.{leaf}")
            weights[f"head.{ours}.{leaf}"] = select(x.unflatten(0, (anchors, numbers))).flatten(0, 1)
    return len(kept)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"this is no RetinaNet of torchvision: it has no {name}")
    return tensors[name]
