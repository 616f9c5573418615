"""Sigmoid focal loss, quality focal loss and varifocal loss of a head's raw output, in one pass.

Almost all labels of a dense detector are background. So the pass first treats every logit as a negative,
without reading a label: it sums the losses and writes the gradients, in chunks that stay in the cache
(`dense_chunks`). Then it corrects the exceptions (`dense_exceptions`): the few positives, and the anchors
that are ignored. The only tensor of the logits' size that it keeps is the gradient, which backward scales in
place.

With `use_kernels`, one launch of a Triton kernel on a GPU reads each logit of all levels with its label and
does all of this at once, without waiting for the GPU. If it knows what gradient backward will be given
(`upstream`), it writes the logits' gradients in their final size, and backward leaves them as they are.
The kernel has not run on a GPU yet. Without kernels, and for float64 logits, a GPU computes each logit with
its label in large chunks of PyTorch's operators, also without waits (`dense_masked`).

Shapes: N images, L levels, A anchors a cell, K classes, R anchors an image (all levels); logits
L × (N, A·K, H, W), labels (N, R) in the order of anchors, as detectron2 has them. P entries (an anchor and
its class) are positive, E anchors are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from focal_d2.ops.common import (
    LOSS_KERNELS,
    check_at_least_0,
    check_in_0_1,
    check_quality_beta,
    check_weight,
    find_kernels,
    in_memory_order,
    is_dense,
)
from focal_d2.ops.losses import dense_chunks
from focal_d2.ops.losses.dense_chunks import (
    Workspace,
    all_as_negatives,
    has_room_for,
    kept_scale,
    terms_as_counted,
    upcast,
)
from focal_d2.ops.losses.dense_exceptions import (
    Exceptions,
    clear_ignored,
    find_exceptions,
    read_exceptions,
    read_positives,
    without_exceptions,
    write_positives,
)
from focal_d2.ops.losses.dense_masked import masked_loss
from focal_d2.ops.losses.dense_terms import DenseLoss, Focal, Quality, Varifocal, of_class

# Logits up to this value can be added to a float32 sum and subtracted again without harm to the others.
_MODERATE = 100.0


def dense_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float | Tensor,
    gamma: float,
    use_kernels: bool = False,
    upstream: Tensor | None = None,
) -> Tensor:
    """Return what `sigmoid_focal_loss` returns for the same logits as (N, R, K).

    Args:
        logits: L × (N, A·K, H, W) float, contiguous or channels-last (other layouts are copied).
        labels: (N, R) int64; the class in [0, K), K for background, -1 (`IGNORE_LABEL`) for no loss.
        num_classes: K.
        alpha: weight of the positives in [0, 1], 1 - alpha that of the negatives, or one for each class
            (K,); a negative number leaves all weights at 1.
        gamma: focusing parameter, at least 0.
        use_kernels: on a GPU with Triton, compute with a Triton kernel; see the top of this module.
        upstream: the gradient that backward is expected to be given, a float32 scalar on the logits' device,
            such as 1 divided by the normaliser. It has no effect on results. If another gradient arrives, the
            kernel path scales the logits' gradients in backward, as it does without `upstream`.

    Returns:
        The sum over anchors that are not ignored and all classes, a scalar in float32 (float64 for float64
        logits). Its backward can run once; there is no second derivative.

    Raises:
        ValueError: if shapes, labels' dtype, alpha or gamma do not fit.
    """
    check_weight("alpha", alpha)
    check_at_least_0("gamma", gamma)
    if isinstance(alpha, Tensor):
        if alpha.shape != (num_classes,):
            raise ValueError(f"alpha {tuple(alpha.shape)} must be a number or ({num_classes},)")
        loss = Focal(gamma, 1 - alpha, alpha)
    else:
        loss = Focal(gamma, 1.0, 1.0) if alpha < 0 else Focal(gamma, 1.0 - alpha, alpha)
    return _dense(logits, labels, None, num_classes, loss, use_kernels, upstream)


def dense_quality_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    beta: float,
    use_kernels: bool = False,
    upstream: Tensor | None = None,
) -> Tensor:
    """Return what `quality_focal_loss` returns for the same logits as (N, R, K).

    Args:
        logits: see `dense_focal_loss`.
        labels: see `dense_focal_loss`.
        quality: (N, R) float in [0, 1], read where the label is a class.
        num_classes: K.
        beta: focusing parameter, 0 or at least 1.
        use_kernels: see `dense_focal_loss`.
        upstream: see `dense_focal_loss`.

    Returns:
        See `dense_focal_loss`.

    Raises:
        ValueError: if shapes, labels' dtype or beta do not fit.
    """
    check_quality_beta(beta)
    return _dense(logits, labels, quality, num_classes, Quality(beta, 1.0), use_kernels, upstream)


def dense_varifocal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    use_kernels: bool = False,
    upstream: Tensor | None = None,
) -> Tensor:
    """Return what `varifocal_loss` returns for the same logits as (N, R, K).

    Args:
        logits: see `dense_focal_loss`.
        labels: see `dense_focal_loss`.
        quality: (N, R) float in [0, 1], read where the label is a class.
        num_classes: K.
        alpha: weight of the negatives, in [0, 1].
        gamma: focusing parameter of the negatives, at least 0.
        use_kernels: see `dense_focal_loss`.
        upstream: see `dense_focal_loss`.

    Returns:
        See `dense_focal_loss`.

    Raises:
        ValueError: if shapes, labels' dtype, alpha or gamma do not fit.
    """
    check_in_0_1("alpha", alpha)
    check_at_least_0("gamma", gamma)
    return _dense(logits, labels, quality, num_classes, Varifocal(gamma, alpha), use_kernels, upstream)


# Their names in the kernel, and the types that it reads; it computes in float32.
_KINDS = {Focal: "focal", Quality: "quality", Varifocal: "varifocal"}


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable
def _dense(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor | None,
    num_classes: int,
    loss: DenseLoss,
    use_kernels: bool,
    upstream: Tensor | None,
) -> Tensor:
    _check_shapes(logits, labels, quality, num_classes)
    total: Tensor = _DenseLoss.apply(labels, quality, num_classes, loss, use_kernels, upstream, *logits)
    return total


def _check_shapes(logits: Sequence[Tensor], labels: Tensor, quality: Tensor | None, num_classes: int) -> None:
    anchors = [x.shape[1:].numel() // num_classes for x in logits]
    wanted = (logits[0].shape[0], sum(anchors))
    channels = {x.shape[1] for x in logits}
    if len(channels) > 1 or logits[0].shape[1] % num_classes or labels.shape != wanted:
        raise ValueError(
            f"logits {[tuple(x.shape) for x in logits]} and labels {tuple(labels.shape)} do not fit: with "
            f"K={num_classes} they must be L × (N, A·K, H, W) and (N, sum of H·W·A)"
        )
    if labels.dtype != torch.int64 or len({x.dtype for x in logits}) > 1:
        raise ValueError(f"labels must be int64, not {labels.dtype}, and logits of one type on all levels")
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(f"quality {tuple(quality.shape)} must be labels' {tuple(labels.shape)}")


class _DenseLoss(torch.autograd.Function):
    """The sum over all levels; forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        quality: Tensor | None,
        num_classes: int,
        loss: DenseLoss,
        use_kernels: bool,
        upstream: Tensor | None,
        *logits: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[6:]
        kernels = find_kernels(LOSS_KERNELS, labels) if use_kernels else None
        if kernels is not None and logits[0].dtype in _KERNEL_DTYPES:
            if upstream is None:
                upstream = torch.full((), kept_scale(logits[0]), device=labels.device)
            total, gradients = _in_a_kernel(
                kernels, logits, labels, quality, upstream, num_classes, loss, with_gradient=any(wanted)
            )
            ctx.rescale, ctx.expected = kernels.rescale, upstream
        else:
            levels = tuple(x if is_dense(x) else x.contiguous() for x in logits)
            pairs = zip(levels, wanted, strict=True)
            gradients = [torch.empty_like(x) if w else None for x, w in pairs]
            if labels.is_cuda:
                both = list(zip(levels, gradients, strict=True))
                total = masked_loss(both, labels, quality, num_classes, loss)
            else:
                total = _in_chunks(levels, gradients, labels, quality, num_classes, loss)
            ctx.rescale = None
        ctx.gradients = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        return total.to(torch.float64 if logits[0].dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.gradients is None:  # create_graph=True, or a second backward
            raise RuntimeError(
                "the fused loss has one backward and no second derivative (retain_graph, create_graph): "
                "set MODEL.FOCAL.LOSS.IMPLEMENTATION reference"
            )
        gradients, ctx.gradients = ctx.gradients, None
        written = [g for g in gradients if g is not None]
        if ctx.rescale is not None:
            ctx.rescale(written, grad_output, ctx.expected)
        else:
            for gradient in written:
                _scale(gradient, grad_output / kept_scale(gradient))
        return None, None, None, None, None, None, *gradients


def _scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a float32 scalar, which is not rounded to half precision."""
    if gradient.is_cuda:
        torch.mul(gradient, factor.reshape(1, 1, 1, 1), out=gradient)
    elif (number := factor.item()) != 1:
        gradient.mul_(number)


def _in_a_kernel(
    kernels: ModuleType,
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor | None,
    upstream: Tensor,
    num_classes: int,
    loss: DenseLoss,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the sum (float64), and the gradients times `upstream` if they are wanted."""
    contiguous = all(x.is_contiguous() for x in logits)
    layout = torch.contiguous_format if contiguous else torch.channels_last
    levels = [x.contiguous(memory_format=layout) for x in logits]
    gradients = [torch.empty_like(x) for x in levels] if with_gradient else None
    total = kernels.dense_loss(
        levels,
        gradients,
        labels,
        quality,
        upstream,
        num_classes=num_classes,
        kind=_KINDS[type(loss)],
        gamma=loss.gamma,
        negative_weight=loss.negative_weight,
        positive_weight=loss.positive_weight if isinstance(loss, Focal) else 1.0,
    )
    return total, gradients or [None] * len(levels)


def _in_chunks(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    labels: Tensor,
    quality: Tensor | None,
    num_classes: int,
    loss: DenseLoss,
) -> Tensor:
    """Return the sum (float64), and write the gradients, with PyTorch's own operators."""
    longest = max((in_memory_order(x) for x in levels), key=len)
    written = all(has_room_for(g, longest) for g in gradients)
    work = Workspace.like(longest[: dense_chunks.CHUNK], with_log=not written, with_error=loss.gamma < 1)

    def negatives(dense: Sequence[Tensor]) -> Tensor:
        pairs = zip(dense, gradients, strict=True)
        sums = [
            all_as_negatives(x, g, gamma=loss.gamma, weight=loss.negative_weight, work=work) for x, g in pairs
        ]
        return torch.stack(sums).sum()

    total = negatives(levels)
    exceptions = find_exceptions(levels, labels, quality, num_classes)
    counted = _counted_as_negatives(levels, exceptions, num_classes, loss, work)
    if counted is None:
        total = negatives(without_exceptions(levels, exceptions, num_classes))
    else:
        total = total - counted
    clear_ignored(gradients, exceptions, num_classes)
    total = total + _add_positives(levels, gradients, exceptions, num_classes, loss)
    # Exactly 0, without rounding errors, if all anchors are ignored.
    return total * bool((labels >= 0).any())


def _counted_as_negatives(
    levels: Sequence[Tensor],
    exceptions: Sequence[Exceptions],
    num_classes: int,
    loss: DenseLoss,
    work: Workspace,
) -> Tensor | None:
    """Return the part (float64) of the negatives' sum that comes from the exceptions.

    None if a logit is too large, or NaN: its value can't be subtracted from a float32 sum again.
    """
    counted = levels[0].new_zeros((), dtype=torch.float64)
    for x, classes in read_exceptions(levels, exceptions, num_classes):
        if not bool((x <= _MODERATE).all()):
            return None
        value = terms_as_counted(upcast(x).reshape(-1), loss.gamma, work).view(x.shape)
        counted += value.mul_(of_class(loss.negative_weight, classes)).sum(dtype=torch.float64)
    return counted


def _add_positives(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exceptions: Sequence[Exceptions],
    num_classes: int,
    loss: DenseLoss,
) -> Tensor:
    """Return the positives' sum (float64), and write their gradients."""
    x = upcast(read_positives(levels, exceptions, num_classes))
    if len(x) == 0:
        return x.new_zeros((), dtype=torch.float64)
    quality = [p.quality for p in exceptions if p.quality is not None]
    classes = torch.cat([p.classes for p in exceptions])
    term = loss.positives(x, torch.cat(quality).to(x.dtype) if quality else x, classes)
    write_positives(gradients, exceptions, term.slope, num_classes)
    return term.value.sum(dtype=torch.float64)
