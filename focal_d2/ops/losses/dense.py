"""Sigmoid focal loss, and its kin, of a head's raw output: value and gradient in one pass.

A dense detector's labels are almost all background. So every logit is first taken for a negative, without
reading a label, in chunks that stay in cache: its value is summed and its gradient written. Then the few
positives are corrected, and what ignored anchors added is taken out again. Nothing of the logits' size is
kept but the gradient, which backward only scales, in place.

With `use_kernels`, a Triton kernel on a GPU reads each logit with its label and does all of this at once,
without a wait for the GPU, but for float64 logits or where Triton is not installed. It has not run on a GPU.

Shapes: N images, L levels, A anchors a cell, K classes, R anchors an image (all levels); logits
L × (N, A·K, H, W), labels (N, R) in the order of anchors, as detectron2 has them. P entries (an anchor and
its class) are positive, E anchors are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.common import (
    LOSS_KERNELS,
    check_at_least_0,
    check_in_0_1,
    check_quality_beta,
    check_weight,
    divide,
    find_kernels,
    in_memory_order,
    is_dense,
)

# Elements worked on at once: their float32 temporaries fit the cores' second-level caches.
_CHUNK = 1 << 18
# What gradients are multiplied by while they wait in float16, whose numbers end at 6e-8: there a loss scaler
# multiplies them only in backward.
_FLOAT16_SCALE = 4096.0
# Logits up to here are added to a float32 sum, and taken out, without harm to the others.
_MODERATE = 100.0
# A logit whose value and gradient as a negative are 0 in every precision.
_NOTHING = -1e4
# A probability above which 1 - p has lost digits that the logarithm needs.
_NEAR_1 = 0.98


def dense_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float | Tensor,
    gamma: float,
    use_kernels: bool = False,
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
        return _dense(logits, labels, None, num_classes, _Focal(gamma, 1 - alpha, alpha), use_kernels)
    weights = (1.0, 1.0) if alpha < 0 else (1.0 - alpha, alpha)
    return _dense(logits, labels, None, num_classes, _Focal(gamma, *weights), use_kernels)


def dense_quality_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    beta: float,
    use_kernels: bool = False,
) -> Tensor:
    """Return what `quality_focal_loss` returns for the same logits as (N, R, K).

    Args:
        logits: see `dense_focal_loss`.
        labels: see `dense_focal_loss`.
        quality: (N, R) float in [0, 1], read where the label is a class.
        num_classes: K.
        beta: focusing parameter, 0 or at least 1.
        use_kernels: see `dense_focal_loss`.

    Returns:
        See `dense_focal_loss`.

    Raises:
        ValueError: if shapes, labels' dtype or beta do not fit.
    """
    check_quality_beta(beta)
    return _dense(logits, labels, quality, num_classes, _Quality(beta, 1.0), use_kernels)


def dense_varifocal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    use_kernels: bool = False,
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

    Returns:
        See `dense_focal_loss`.

    Raises:
        ValueError: if shapes, labels' dtype, alpha or gamma do not fit.
    """
    check_in_0_1("alpha", alpha)
    check_at_least_0("gamma", gamma)
    return _dense(logits, labels, quality, num_classes, _Varifocal(gamma, alpha), use_kernels)


class _Term(NamedTuple):
    """Value and derivative of logits, both of the logits' shape, not weighted."""

    value: Tensor
    slope: Tensor


class _Focal(NamedTuple):
    """A loss whose negatives are w p^γ softplus(x); says what its positives are."""

    gamma: float
    negative_weight: float | Tensor  # a number, or (K,)
    positive_weight: float | Tensor

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> _Term:
        """Weighted terms (P,) of positives: a negative of the opposite logit, with the opposite gradient."""
        term = _negatives(-x, self.gamma)
        weight = _of_class(self.positive_weight, classes)
        return _Term(weight * term.value, -weight * term.slope)


class _Quality(NamedTuple):
    gamma: float
    negative_weight: float

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> _Term:
        """|y - p|^β BCE(x, y) of the quality y."""
        p, q, log_q = _sigmoid_and_log(x, _Workspace.like(x, with_log=True, with_error=True))
        difference, entropy = p - quality, -log_q - quality * x
        if self.gamma == 0:
            return _Term(entropy, difference)
        # At β = 1 the absolute value's derivative is taken as 0 where p = y, as autograd does.
        power = difference.abs().pow(self.gamma - 1)
        slope = self.gamma * power * difference.sign() * p * q * entropy
        return _Term(power * difference.abs() * entropy, slope + power * difference.abs() * difference)


class _Varifocal(NamedTuple):
    gamma: float
    negative_weight: float

    def positives(self, x: Tensor, quality: Tensor, classes: Tensor) -> _Term:
        """The quality times BCE; a positive of quality 0 is a negative."""
        p, _, log_q = _sigmoid_and_log(x, _Workspace.like(x, with_log=True, with_error=True))
        term = _negatives(x, self.gamma)
        none = quality <= 0
        return _Term(
            torch.where(none, self.negative_weight * term.value, quality * (-log_q - quality * x)),
            torch.where(none, self.negative_weight * term.slope, quality * (p - quality)),
        )


_Loss = _Focal | _Quality | _Varifocal
# What the kernel calls them, and the precisions it reads; it computes in float32.
_KINDS = {_Focal: "focal", _Quality: "quality", _Varifocal: "varifocal"}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable
def _dense(
    logits: Sequence[Tensor],
    labels: Tensor,
    quality: Tensor | None,
    num_classes: int,
    loss: _Loss,
    use_kernels: bool,
) -> Tensor:
    _check_shapes(logits, labels, quality, num_classes)
    total: Tensor = _DenseLoss.apply(labels, quality, num_classes, loss, use_kernels, *logits)
    return total


def _check_shapes(logits: Sequence[Tensor], labels: Tensor, quality: Tensor | None, num_classes: int) -> None:
    anchors = [x.shape[1:].numel() // num_classes for x in logits]
    wanted = (logits[0].shape[0], sum(anchors))
    if any(x.shape[1] % num_classes for x in logits) or labels.shape != wanted:
        raise ValueError(
            f"logits {[tuple(x.shape) for x in logits]} and labels {tuple(labels.shape)} do not fit: with "
            f"K={num_classes} they must be L × (N, A·K, H, W) and (N, sum of H·W·A)"
        )
    if labels.dtype != torch.int64 or len({x.dtype for x in logits}) > 1:
        raise ValueError(f"labels must be int64, not {labels.dtype}, and logits of one type on all levels")
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(f"quality {tuple(quality.shape)} must be labels' {tuple(labels.shape)}")


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        quality: Tensor | None,
        num_classes: int,
        loss: _Loss,
        use_kernels: bool,
        *logits: Tensor,
    ) -> Tensor:
        levels = tuple(x if is_dense(x) else x.contiguous() for x in logits)
        wanted = ctx.needs_input_grad[5:]
        gradients = [torch.empty_like(x) if w else None for x, w in zip(levels, wanted, strict=True)]
        kernels = find_kernels(LOSS_KERNELS, labels) if use_kernels else None
        if kernels is not None and all(x.dtype in _KERNEL_DTYPES for x in levels):
            total = kernels.dense_loss(
                levels,
                gradients,
                labels,
                quality,
                num_classes=num_classes,
                kind=_KINDS[type(loss)],
                gamma=loss.gamma,
                gradient_scale=_kept_scale(levels[0]),
                negative_weight=loss.negative_weight,
                positive_weight=loss.positive_weight if isinstance(loss, _Focal) else 1.0,
            )
        else:
            total = _in_chunks(levels, gradients, labels, quality, num_classes, loss)
        ctx.gradients = gradients
        return total.to(torch.float64 if logits[0].dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.gradients is None:  # create_graph=True, or a second backward
            raise RuntimeError(
                "the fused loss has one backward and no second derivative (retain_graph, create_graph): "
                "set MODEL.FOCAL.LOSS.IMPLEMENTATION reference"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale(gradient, grad_output / _kept_scale(gradient))
        return None, None, None, None, None, *gradients


def _scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a float32 scalar that is not rounded to half precision first."""
    if gradient.is_cuda:
        torch.mul(gradient, factor.reshape(1, 1, 1, 1), out=gradient)
    elif (number := factor.item()) != 1:
        gradient.mul_(number)


def _kept_scale(gradient: Tensor) -> float:
    return _FLOAT16_SCALE if gradient.dtype == torch.float16 else 1.0


def _in_chunks(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    labels: Tensor,
    quality: Tensor | None,
    num_classes: int,
    loss: _Loss,
) -> Tensor:
    """Return the sum (float64), and write the gradients, without a kernel of our own."""
    longest = max((in_memory_order(x) for x in levels), key=len)
    written = all(_is_room_for(g, longest) for g in gradients)
    work = _Workspace.like(longest[:_CHUNK], with_log=not written, with_error=loss.gamma < 1)

    def negatives(dense: Sequence[Tensor]) -> Tensor:
        pairs = zip(dense, gradients, strict=True)
        return torch.stack([_all_as_negatives(x, num_classes, loss, g, work) for x, g in pairs]).sum()

    total = negatives(levels)
    places = _find_places(levels, labels, quality, num_classes)
    counted = _counted_as_negatives(levels, places, num_classes, loss, work)
    total = negatives(_without(levels, places, num_classes)) if counted is None else total - counted
    _clear_ignored(gradients, places, num_classes)
    total = total + _positives(levels, gradients, places, num_classes, loss)
    # To the last digit where nothing counts.
    return total * bool((labels >= 0).any())


def _computed(x: Tensor) -> Tensor:
    """In the precision that losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _of_class(weight: float | Tensor, classes: Tensor | slice) -> float | Tensor:
    return weight[classes] if isinstance(weight, Tensor) else weight


class _Places(NamedTuple):
    """Which entries of a level are not plain negatives: indices into `_by_class` of it."""

    block: Tensor  # (P,)
    classes: Tensor  # (P,)
    offset: Tensor  # (P,)
    quality: Tensor | None  # (P,)
    ignored_block: Tensor  # (E,)
    ignored_offset: Tensor  # (E,)


def _by_class(x: Tensor, num_classes: int) -> Tensor:
    """(N · A, K, H · W) of a contiguous level, (N · H · W · A, K, 1) of a channels-last one, as a view."""
    return in_memory_order(x).view(-1, num_classes, x.shape[2] * x.shape[3] if x.is_contiguous() else 1)


def _counted_as_negatives(
    levels: Sequence[Tensor], places: Sequence[_Places], num_classes: int, loss: _Loss, work: _Workspace
) -> Tensor | None:
    """Return the part (float64) of the negatives' sum that comes from the places, which are no negatives.

    None if a logit is too large (or NaN): its value can't be taken out of a float32 sum again.
    """
    counted = levels[0].new_zeros((), dtype=torch.float64)
    for x, classes in _read_places(levels, places, num_classes):
        if not bool((x <= _MODERATE).all()):
            return None
        value = _counted(_computed(x).reshape(-1), loss.gamma, work).view(x.shape)
        counted += value.mul_(_of_class(loss.negative_weight, classes)).sum(dtype=torch.float64)
    return counted


def _read_places(
    levels: Sequence[Tensor], places: Sequence[_Places], num_classes: int
) -> Iterator[tuple[Tensor, Tensor | slice]]:
    """Yield the logits of all places, and their classes: (P,) positives, then (E', K) of ignored anchors.

    The latter in parts: among many objects a large share of all anchors is ignored, and a copy of their
    logits would be as large.
    """
    yield _read_positives(levels, places, num_classes), torch.cat([p.classes for p in places])
    size = max(1, _CHUNK // (4 * num_classes))
    for level, p in zip(levels, places, strict=True):
        if len(p.ignored_block):
            view = _by_class(level, num_classes)
            for block, offset in zip(p.ignored_block.split(size), p.ignored_offset.split(size), strict=True):
                yield view[block, :, offset], slice(None)


def _read_positives(levels: Sequence[Tensor], places: Sequence[_Places], num_classes: int) -> Tensor:
    views = [_by_class(x, num_classes) for x in levels]
    return torch.cat([x[p.block, p.classes, p.offset] for x, p in zip(views, places, strict=True)])


def _without(levels: Sequence[Tensor], places: Sequence[_Places], num_classes: int) -> list[Tensor]:
    """Copy the levels with logits of no value, and no gradient, in all places."""
    copies = [x.clone() for x in levels]
    for x, p in zip(copies, places, strict=True):
        view = _by_class(x, num_classes)
        view[p.block, p.classes, p.offset] = _NOTHING
        view[p.ignored_block, :, p.ignored_offset] = _NOTHING
    return copies


def _clear_ignored(gradients: Sequence[Tensor | None], places: Sequence[_Places], num_classes: int) -> None:
    """Write 0 where anchors are ignored."""
    for g, p in zip(gradients, places, strict=True):
        if g is not None and len(p.ignored_block):
            _by_class(g, num_classes)[p.ignored_block, :, p.ignored_offset] = 0


def _positives(
    levels: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    places: Sequence[_Places],
    num_classes: int,
    loss: _Loss,
) -> Tensor:
    """Return the positives' sum (float64), and write their gradients."""
    x = _computed(_read_positives(levels, places, num_classes))
    if len(x) == 0:
        return x.new_zeros((), dtype=torch.float64)
    quality = [p.quality for p in places if p.quality is not None]
    classes = torch.cat([p.classes for p in places])
    term = loss.positives(x, torch.cat(quality).to(x.dtype) if quality else x, classes)
    slopes = term.slope.split([len(p.classes) for p in places])
    for g, p, slope in zip(gradients, places, slopes, strict=True):
        if g is not None:
            written = _by_class(g, num_classes)
            written[p.block, p.classes, p.offset] = (slope * _kept_scale(g)).to(g.dtype)
    return term.value.sum(dtype=torch.float64)


def _find_places(
    levels: Sequence[Tensor], labels: Tensor, quality: Tensor | None, num_classes: int
) -> list[_Places]:
    image, anchor = (labels < num_classes).nonzero(as_tuple=True)
    label = labels[image, anchor]
    places = []
    start = 0
    for x in levels:
        cells = x.shape[2] * x.shape[3]
        per_cell = x.shape[1] // num_classes
        stop = start + cells * per_cell
        here = ((anchor >= start) & (anchor < stop)).nonzero().squeeze(1)
        n, own, k = image[here], anchor[here] - start, label[here]
        if x.is_contiguous():
            offset, a = divide(own, per_cell)
            block = n * per_cell + a
        else:
            block, offset = n * (stop - start) + own, torch.zeros_like(own)
        positive = k >= 0
        chosen = here[positive]
        places.append(
            _Places(
                block[positive],
                k[positive],
                offset[positive],
                None if quality is None else quality[image[chosen], anchor[chosen]],
                block[~positive],
                offset[~positive],
            )
        )
        start = stop
    return places


def _all_as_negatives(
    logits: Tensor, num_classes: int, loss: _Loss, gradient: Tensor | None, work: _Workspace
) -> Tensor:
    """Return the sum (float64) of a level's negatives, and write their gradient."""
    flat, out = in_memory_order(logits), None if gradient is None else in_memory_order(gradient)
    weight, size = loss.negative_weight, _CHUNK
    if isinstance(weight, Tensor):
        # One weight for each element of a chunk of whole periods of the classes.
        period = weight if not logits.is_contiguous() else weight.repeat_interleave(logits.shape[2:].numel())
        copies = max(1, min(_CHUNK, flat.numel()) // max(1, len(period)))
        weight = period.to(work.p.dtype).repeat(copies)
        size = max(1, len(weight))
        if size > len(work.p):
            work = _Workspace.like(
                flat[:size], with_log=work.log_q is not None, with_error=work.error is not None
            )
    sums = []
    gradients = [None] * -(-flat.numel() // size) if out is None else out.split(size)
    for x, to in zip(flat.split(size), gradients, strict=True):
        sums.append(_chunk(x, loss.gamma, weight, to, work.first(len(x))))
    return torch.stack(sums).sum(dtype=torch.float64) * (1.0 if isinstance(weight, Tensor) else weight)


class _Workspace(NamedTuple):
    """Temporaries of a chunk, in the precision that losses are computed in."""

    p: Tensor
    q: Tensor
    log_q: Tensor | None  # None: the memory of the gradient serves, which is written last
    error: Tensor | None  # of the logarithm; None: not asked for
    zero: Tensor  # a scalar; as a tensor it is not made anew for each call
    one: Tensor  # a scalar

    @staticmethod
    def like(x: Tensor, *, with_log: bool, with_error: bool) -> _Workspace:
        x = _computed(x)
        p, q = torch.empty_like(x), torch.empty_like(x)
        log_q = torch.empty_like(x) if with_log else None
        error = torch.empty_like(x) if with_error else None
        return _Workspace(p, q, log_q, error, x.new_zeros(()), x.new_ones(()))

    def first(self, count: int) -> _Workspace:
        if count == len(self.p):
            return self
        log_q, error = (None if t is None else t[:count] for t in (self.log_q, self.error))
        return self._replace(p=self.p[:count], q=self.q[:count], log_q=log_q, error=error)


def _is_room_for(gradient: Tensor | None, x: Tensor) -> bool:
    """Whether a gradient's memory can hold temporaries of x."""
    return gradient is not None and gradient.dtype == _computed(x[:0]).dtype


def _chunk(x: Tensor, gamma: float, weight: float | Tensor, out: Tensor | None, work: _Workspace) -> Tensor:
    """Return a chunk of negatives' sum, and write their weighted gradient to `out`.

    A number as `weight` is left out of the sum; a tensor (at least as long as x) is in it.
    """
    if out is not None and _is_room_for(out, x):
        work = work._replace(log_q=out)
    p, q, log_q = _sigmoid_and_log(_computed(x), work, precise=gamma < 1)
    slope = p if gamma == 0 else torch.addcmul(p, q, log_q, value=-gamma, out=q)
    power = _power(p, gamma)
    if isinstance(weight, Tensor):
        weights = weight[: len(x)]
        power = weights if power is None else power.mul_(weights)
    # Not torch.dot, which adds up long vectors less carefully.
    total = -(log_q if power is None else log_q.mul_(power)).sum()
    if out is None:
        return total
    scale = _kept_scale(out)
    if power is None:
        torch.mul(slope, weight * scale, out=out)
    elif isinstance(weight, Tensor):
        torch.mul(power, slope if scale == 1 else slope.mul_(scale), out=out)
    elif out.dtype == slope.dtype:
        torch.addcmul(work.zero, power, slope, value=weight, out=out)
    else:
        torch.mul(torch.mul(slope, power, out=slope), weight * scale, out=out)
    return total


def _counted(x: Tensor, gamma: float, work: _Workspace) -> Tensor:
    """What each of some negatives (n,) added to its chunk's sum, with the same rounding."""
    values = torch.empty_like(x)
    size = max(1, len(work.p))
    for some, to in zip(x.split(size), values.split(size), strict=True):
        room = work.first(len(some))._replace(log_q=to)
        p, _, log_q = _sigmoid_and_log(some, room, precise=gamma < 1)
        power = _power(p, gamma)
        torch.neg(log_q if power is None else log_q.mul_(power), out=to)
    return values


def _negatives(x: Tensor, gamma: float) -> _Term:
    """Focal loss of negatives, p^γ softplus(x), and its derivative p^γ (γ (1 - p) softplus(x) + p)."""
    p, q, log_q = _sigmoid_and_log(x, _Workspace.like(x, with_log=True, with_error=True))
    value, slope = -log_q, p - gamma * q * log_q
    power = _power(p.clone(), gamma)
    return _Term(value, slope) if power is None else _Term(power * value, power * slope)


def _power(p: Tensor, gamma: float) -> Tensor | None:
    """p^γ, in the place of p, or None for 1."""
    if gamma == 0:
        return None
    if gamma == 1:
        return p
    if gamma == 2:
        return p.mul_(p)
    return p.pow_(gamma)


def _sigmoid_and_log(x: Tensor, work: _Workspace, *, precise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """p = σ(x), q = 1 - p and log(q) = -softplus(x), from sigmoids and one logarithm.

    log1p is many times slower than log on small arguments. With s = σ(-|x|) ≤ 1/2 and u the rounded 1 - s,
    the rounding error (1 - u) - s is exact, and log(1 - s) is log(u) plus that error: its derivative there,
    1 / u, differs from 1 where s is far larger than a rounding. Where no p of the chunk is near 1, which is
    most chunks, p itself can be s: from 1/2 on, 1 - p is exact. Where p^γ multiplies the logarithm, its
    error of 6e-8 need not be taken out, unless it is asked to be `precise`.
    """
    p = torch.sigmoid(x, out=work.p)
    near_1 = x.numel() > 0 and not p.amax().item() <= _NEAR_1  # NaN goes the longer way
    if near_1:
        q = torch.sigmoid(torch.neg(x, out=work.q), out=work.q)
        s = torch.minimum(p, q)
        u = 1 - s
    else:
        s, u = p, torch.sub(work.one, p, out=work.q)
    log = torch.log(u, out=work.log_q)
    if precise:
        log += torch.sub(work.one, u, out=work.error).sub_(s)
    if near_1:
        return p, q, log.sub_(x.clamp(min=0))
    return s, u, log
