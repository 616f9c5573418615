"""Part 4: three steps of training with the fused loss and kernels, beside the reference.

Losses and weights must agree to rounding. Two runs of the reference show how far equal runs differ on a GPU,
where some sums have no fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import build_ours, make_batch
from focal_d2.analysis.benchmark.step import trainer_step
from focal_d2.analysis.benchmark.timing import peak_bytes
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, FUSED, REFERENCE, Check, Line, Measurement

_STEPS = 3
_RATE = ("SOLVER.BASE_LR", "0.001")
# By precision: how far losses, and the weights' changes, may differ from the reference's, relatively.
_LIMITS = {"fp32": (1e-5, 1e-3), "bf16": (2e-3, 2e-2), "fp16": (2e-3, 2e-2)}
_SPREADS = 3  # times the difference of two runs of the reference is as good


class _Training(NamedTuple):
    """What three steps lead to."""

    losses: Tensor  # (steps, losses)
    change: Tensor  # of all weights
    peak: int  # bytes of a later step


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    for precision in check.sizes.precisions:
        for layout in ("NCHW", "NHWC"):
            yield Measurement(
                f"3 steps in {precision}, {layout}", partial(_compare, check, precision, layout)
            )


def _compare(check: Check, precision: str, layout: str) -> list[Line]:
    # Rounding inputs to 10 bits would hide differences.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    more = CHANNELS_LAST if layout == "NHWC" else ()
    reference, again, fused = (
        _train(check, precision, [*implementation, *more]) for implementation in (REFERENCE, REFERENCE, FUSED)
    )
    name, lines = f"{precision}, {layout}", []
    for what, limit in zip(("losses", "change"), _LIMITS[precision], strict=True):
        expected = getattr(reference, what)
        difference = _relative(getattr(fused, what), expected)
        spread = _relative(getattr(again, what), expected)
        words = "losses" if what == "losses" else "changes of weights"
        lines.append(
            Line(
                f"{words} of {_STEPS} steps, {name}: relative difference",
                difference,
                beside=f"two runs of the reference: {spread:.2g}",
                aim=f"{limit:.0e}, or {_SPREADS} times that of two runs",
                met=difference <= max(limit, _SPREADS * spread),
            )
        )
    lines.append(
        Line(
            f"peak memory of a step, {name}",
            fused.peak / 2**20,
            "MiB",
            beside=f"reference {reference.peak / 2**20:.0f} MiB",
            aim="at most the reference's",
            met=fused.peak <= reference.peak if check.on_gpu else None,
        )
    )
    return lines


def _train(check: Check, precision: str, overrides: list[str]) -> _Training:
    sizes = check.sizes
    setting = Setting(
        check.device, sizes.parity_size, sizes.parity_batch, sizes.step_classes, 20, 1, precision
    )
    cfg = check.config(*overrides, *_RATE)
    model = build_ours(cfg, setting)
    start = _weights(model)
    step = trainer_step(cfg, model, make_batch(setting), setting)
    losses = torch.tensor([list(step().values()) for _ in range(_STEPS)])
    change = _weights(model) - start
    return _Training(losses, change, peak_bytes(step, check.device))


def _weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def _relative(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())
