"""Inputs of the kernels: a head's output on all levels, and labels. Shapes: see `ops.losses.dense`."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7
SHAPES = 9  # anchors a cell
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def make_levels(
    images: int, image: tuple[int, int], classes: int, dtype: torch.dtype, layout: str, device: str
) -> list[Tensor]:
    """Draw logits as of a new model: L × (N, A·K, H, W), which want gradients.

    Args:
        images: N.
        image: height and width in pixels.
        classes: K.
        dtype: of the logits.
        layout: one of `LAYOUTS`.
        device: of the logits.
    """
    generator = torch.Generator(device).manual_seed(0)
    levels = []
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in image)
        shape = (images, SHAPES * classes, height, width)
        x = torch.randn(shape, generator=generator, device=device).sub_(4.6).to(dtype)
        levels.append(x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_())
    return levels


def draw_labels(levels: list[Tensor], classes: int, *, positive: float, ignored: float) -> Tensor:
    """Draw labels (N, R): these shares of all anchors have a class or are ignored; the rest is background."""
    anchors = sum(x.shape[1:].numel() // classes for x in levels)
    shape, device = (levels[0].shape[0], anchors), levels[0].device
    generator = torch.Generator(device).manual_seed(1)
    share = torch.rand(shape, generator=generator, device=device)
    labels = torch.randint(classes, shape, generator=generator, device=device)
    labels.masked_fill_(share >= positive, classes)
    return labels.masked_fill_(share >= 1 - ignored, -1)


def flatten(levels: list[Tensor], classes: int) -> Tensor:
    """Return the logits of all anchors, (N, R, K), in the labels' order."""
    parts = [x.unflatten(1, (-1, classes)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]
    return torch.cat(parts, 1)
