"""Build a model: resolve its device, and turn errors into one line."""

from __future__ import annotations

import ast
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from focal_d2.config.ranges import one_of
from focal_d2.errors import UserError, one_line


def resolve_device(cfg: CfgNode) -> None:
    """Replace `MODEL.DEVICE: auto`, and let `SOLVER.AMP.ENABLED` turn on `MODEL.FOCAL.AMP.ENABLED`.

    Args:
        cfg: full config that is not frozen, changed in place.

    Raises:
        UserError: if this machine does not have the device.
    """
    has_cuda = torch.cuda.is_available()
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if has_cuda else "cpu"
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}"; {one_of("auto", "cpu", "cuda").words}')
    if device.type == "cuda" and not has_cuda:
        raise UserError(
            f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}" but PyTorch finds no CUDA device: '
            "set MODEL.DEVICE cpu (or auto)"
        )
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= devices:
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}; it must be numbered from 0 to {devices - 1}")
    amp = cfg.MODEL.FOCAL.AMP
    amp.ENABLED = amp.ENABLED or cfg.SOLVER.AMP.ENABLED
    # detectron2's AMP trainer insists on CUDA and scales the loss, which only float16 needs.
    cfg.SOLVER.AMP.ENABLED = amp.ENABLED and amp.DTYPE == "float16" and device.type == "cuda"


def build_without_memory(cfg: CfgNode) -> nn.Module:
    """Build the model on PyTorch's meta device: shapes without values."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.FOCAL.COMPILE = "meta", False
    with torch.device("meta"):
        return build_model(cfg)


@contextmanager
def quiet_console(logger: logging.Logger) -> Iterator[None]:
    """Print only warnings on the console inside the block; log files still get all records."""
    # Handlers are compared with stdout, because detectron2's log file has a stream handler as well.
    console = [h for h in logger.handlers if getattr(h, "stream", None) is sys.stdout]
    levels = [h.level for h in console]
    for handler in console:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in zip(console, levels, strict=True):
            handler.setLevel(level)


# ImportError: of what detectron2 was not compiled with, such as deformable convolutions.
_MISTAKES = (
    AssertionError,
    ImportError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    ArithmeticError,
)


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn errors of detectron2 about config values, mostly asserts and missing keys, into one line.

    The line quotes an assert, which often has the legal values. The traceback is in OUTPUT_DIR/log.txt.

    Raises:
        UserError: it names the part that could not be built, and the reason.
    """
    try:
        yield
    except UserError:
        raise
    except _MISTAKES as error:
        logger = logging.getLogger("focal_d2")
        with quiet_console(logger):
            logger.info(f"cannot build the {what}", exc_info=True)
        reason = one_line(error)
        if isinstance(error, AssertionError):
            check = _failed_check(error)
            reason = f"{reason} ({check})" if reason else check
        raise UserError(
            f"cannot build the {what} from this config: {type(error).__name__}: {reason}"
        ) from error


def _failed_check(error: AssertionError) -> str:
    """Return the assert statement that failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    try:
        with open(frame.filename, encoding="utf-8") as file:
            statements = ast.walk(ast.parse(file.read()))
    except (OSError, SyntaxError):
        return "a check without a message; its traceback is in log.txt"
    checks = [x for x in statements if isinstance(x, ast.Assert)]
    at = next((x for x in checks if x.lineno <= (frame.lineno or 0) <= (x.end_lineno or 0)), None)
    return (
        f"assert {ast.unparse(at.test)}" if at else "a check without a message; its traceback is in log.txt"
    )
