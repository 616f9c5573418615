"""Helpers of the losses: checks of arguments, precision, and labels as masks."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_LABEL = -1
# Label of an ignored region that counts for every class.
ANY_CLASS = -1
# The modules of Triton kernels below focal_d2.ops.
LOSS_KERNELS, MATCHING_KERNELS = "losses.dense_triton", "matching.match_triton"
_TRIAL_KERNEL = "trial_triton"
# Rows that `sum_rows` adds up at once.
_BLOCK = 256

logger = logging.getLogger(__name__)


def find_kernels(name: str, x: Tensor) -> ModuleType | None:
    """Return a module of Triton kernels if it can run on x: on a GPU, or in Triton's interpreter.

    The first call for a device launches a tiny kernel there. If that fails, there is one warning, and the
    result is None from then on.

    Args:
        name: of the module: `LOSS_KERNELS` or `MATCHING_KERNELS`.
        x: any tensor of those that the kernels would read.
    """
    if (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _can_launch(x.device):
        return import_kernels(name)
    return None


@functools.cache
def _can_launch(device: torch.device) -> bool:
    """Whether Triton is installed and a kernel runs on the device; it is tried once a device."""
    trial = import_kernels(_TRIAL_KERNEL)
    if trial is None:
        return False
    try:
        trial.run_trial(device)
    except Exception as error:  # of Triton, the C compiler, the driver: all mean that there are no kernels
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logger.warning(
            f"MODEL.FOCAL.KERNELS: a first kernel on {device} failed ({cause}), so PyTorch's operators are "
            "used instead; Triton needs a C compiler and Python's header files"
        )
        return False
    return True


@functools.cache
def import_kernels(name: str) -> ModuleType | None:
    """Return a module of Triton kernels below `focal_d2.ops`, or None if Triton is not installed.

    Raises:
        ImportError: if Triton is installed, but the kernels can't be imported with it.
    """
    try:
        return importlib.import_module(f"focal_d2.ops.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


class Targets(NamedTuple):
    """Logits, and their labels as masks."""

    logits: Tensor  # (..., C) float32, or float64 for float64 logits
    is_class: Tensor  # (..., C) bool: the anchor has that class
    valid: Tensor  # (..., 1) bool: the anchor is not ignored


def prepare_targets(logits: Tensor, labels: Tensor, *, num_classes: int, num_logits: int) -> Targets:
    """Check shapes, upcast half precision and spread labels over the classes.

    Args:
        logits: (..., C) float.
        labels: (...) int64: [0, K) a class, K background, -1 ignored.
        num_classes: K.
        num_logits: C: K, or K + 1 if background has a logit.

    Raises:
        ValueError: if shapes or labels' dtype do not fit.
    """
    if logits.shape[-1:] != (num_logits,) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be labels' {tuple(labels.shape)} plus ({num_logits},) "
            f"for K={num_classes}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.unsqueeze(-1)
    return Targets(logits, labels == torch.arange(num_logits, device=labels.device), labels >= 0)


def reduce(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Set the loss of ignored anchors to 0, then sum it ("sum") or return it as it is ("none").

    Raises:
        ValueError: for another reduction.
    """
    loss = torch.where(valid, loss, 0.0)
    if reduction == "sum":
        return loss.sum()
    if reduction == "none":
        return loss
    raise ValueError(f'reduction is "{reduction}"; legal values: sum, none')


def sum_rows(x: Tensor) -> Tensor:
    """Return the sum of all values of (E, D), with the same bits if rows of 0 follow.

    Blocks of a fixed number of rows are summed, and then neighbours: (0 + 1) + (2 + 3), and so on. So
    sums of zeros are added at the end only. On a GPU the order in a block may depend on their number.
    """
    blocks = 1 << (max(1, -(-len(x) // _BLOCK)) - 1).bit_length()
    sums = F.pad(x, (0, 0, 0, blocks * _BLOCK - len(x))).view(blocks, -1).sum(1)
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return sums[0]


def check_weight(name: str, value: float | Tensor) -> None:
    """Refuse weights above 1; a negative weight means no weighting.

    Weights on a GPU are not checked, because reading them waits for the GPU: check them before the copy.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(value, Tensor) and value.is_cuda:
        return
    if not (value.max().item() if isinstance(value, Tensor) else value) <= 1:  # refuses NaN, too
        raise ValueError(f"{name} is {value}; it must be in [0, 1], or negative for no weighting")


def check_in_0_1(name: str, value: float) -> None:
    """Refuse a number outside [0, 1].

    Raises:
        ValueError: naming the value.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def check_at_least_0(name: str, value: float) -> None:
    """Refuse negative values, and all that is not a finite number.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number, at least 0")
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be at least 0")


def check_quality_beta(beta: float) -> None:
    """Refuse values between 0 and 1, for which the quality focal loss has an infinite gradient.

    Raises:
        ValueError: naming the value.
    """
    if not (beta == 0 or beta >= 1):
        raise ValueError(f"beta is {beta}; it must be 0, or at least 1")


def apply_alpha(loss: Tensor, positive: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply by α_t: alpha where `positive`, 1 - alpha elsewhere; a negative float changes nothing.

    Args:
        loss: (..., C).
        positive: (..., C) bool.
        alpha: a number, or one for each class (C,).
    """
    if not isinstance(alpha, Tensor) and alpha < 0:
        return loss
    return torch.where(positive, alpha * loss, (1 - alpha) * loss)


def is_dense(x: Tensor) -> bool:
    """Whether (N, C, H, W) is contiguous or channels-last."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(x: Tensor) -> Tensor:
    """Return all elements (n,) of (N, C, H, W), as a view if x is dense: NCHW if contiguous, else NHWC."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).reshape(-1)


def divide(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return the integer quotient and the remainder."""
    return x.div(by, rounding_mode="floor"), x.remainder(by)
