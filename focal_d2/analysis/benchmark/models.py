"""Our detector and detectron2's with the same weights, and inputs for their parts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from focal_d2.analysis.benchmark.cuda import select_device
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.errors import UserError


class Pair(NamedTuple):
    """Ours and detectron2's RetinaNet with the same weights."""

    ours: Any
    detectron2: Any


def build_pair(cfg: CfgNode, setting: Setting) -> Pair:
    """Build both detectors in training mode.

    Args:
        cfg: full config of ours; not changed.
        setting: what is timed.

    Raises:
        UserError: if the config's model is not interchangeable with detectron2's RetinaNet.
    """
    cfg = _at(cfg, setting)
    ours = build_ours(cfg, setting)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    theirs = build_model(cfg).train()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("loss_normalizer.")}
    try:
        theirs.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"this config's model is not detectron2's RetinaNet: {str(error).splitlines()[1].strip()}"
        ) from error
    return Pair(ours, theirs)


def build_ours(cfg: CfgNode, setting: Setting) -> Any:
    """Build our detector in training mode, with random weights; see `build_pair` for the arguments."""
    select_device(setting.device)
    torch.manual_seed(0)
    ours = build_model(_at(cfg, setting)).train()
    # Random weights under frozen norms grow from block to block; trained ones do not.
    for name, buffer in ours.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.2)
    return ours


def _at(cfg: CfgNode, setting: Setting) -> CfgNode:
    """Return the config with the setting's device, classes and precision."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = setting.device
    cfg.MODEL.RETINANET.NUM_CLASSES = setting.classes
    amp = cfg.MODEL.FOCAL.AMP
    amp.ENABLED = setting.precision != "fp32"
    amp.DTYPE = "float16" if setting.precision == "fp16" else "bfloat16"
    return cfg


def detectron2_precision(setting: Setting) -> AbstractContextManager[Any]:
    """Return the autocast context of detectron2 at lower precision, which it has on CUDA only."""
    device = torch.device(setting.device).type
    dtype = setting.dtype
    return torch.autocast(device, dtype, enabled=dtype != torch.float32 and device == "cuda")


def make_batch(setting: Setting) -> list[dict[str, Any]]:
    """Make N noise images with boxes of 16 to 256 pixels."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(setting.batch):
        instances = draw_boxes(setting, generator)
        height, width = setting.shape
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def draw_boxes(setting: Setting, generator: torch.Generator) -> Instances:
    """Draw boxes of 16 to 256 pixels, and their classes, in one image."""
    height, width = setting.shape
    sides = (16 * 16 ** torch.rand(setting.boxes, 2, generator=generator)).clamp(max=min(height, width))
    low = torch.rand(setting.boxes, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    instances = Instances(setting.shape)
    instances.gt_boxes = Boxes(torch.cat([low, low + sides], 1))
    instances.gt_classes = torch.randint(0, setting.classes, (setting.boxes,), generator=generator)
    return instances


def empty_images(setting: Setting) -> ImageList:
    """Make images without content, for code that reads only their size."""
    images = torch.empty(setting.batch, 1, *setting.shape, device=setting.device)
    return ImageList(images, [setting.shape] * setting.batch)


def empty_features(pair: Pair, setting: Setting) -> list[Tensor]:
    """Make features L × (1, 1, H, W) without content, for code that reads only their size."""
    strides = pair.detectron2.anchor_generator.strides
    cells = [[-(-side // stride) for side in setting.shape] for stride in strides]
    return [torch.empty(1, 1, *sides, device=setting.device) for sides in cells]


def random_outputs(
    pair: Pair, setting: Setting, per_anchor: int, mean: float, std: float, dtype: torch.dtype
) -> list[Tensor]:
    """Draw L × (N, A · per_anchor, H, W) values from a normal distribution."""
    generator = torch.Generator(setting.device).manual_seed(0)
    per_cell = pair.ours.anchor_generator.num_anchors
    outputs = []
    for x, anchors in zip(empty_features(pair, setting), per_cell, strict=True):
        shape = (setting.batch, anchors * per_anchor, *x.shape[-2:])
        drawn = torch.randn(shape, generator=generator, device=setting.device)
        outputs.append(drawn.mul_(std).add_(mean).to(dtype))
    return outputs
