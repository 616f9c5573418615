"""Set up a job: OUTPUT_DIR, its logs and its config.yaml."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from focal_d2.errors import UserError, reason
from focal_d2.modeling.build import quiet_console
from focal_d2.storage.files import read_file, write_aside
from focal_d2.storage.yaml_text import LONGEST_FILE


def set_up_job(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Call detectron2's `default_setup`, without printing the config on the console; choose the GPU.

    The config is in OUTPUT_DIR/config.yaml and in OUTPUT_DIR/log.txt.

    Raises:
        UserError: if OUTPUT_DIR cannot be written.
    """
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with quiet_console(setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())):
            default_setup(cfg, args)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error
    device = torch.device(cfg.MODEL.DEVICE)
    if device.index is not None:
        # PyTorch's random state, pinned memory and streams are those of the current GPU: "cuda:1" is made it.
        torch.cuda.set_device(device)
    focal = cfg.MODEL.FOCAL
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = focal.TF32
    # focal_d2's log records go to the same files as detectron2's.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="focal_d2")


@contextmanager
def restored_config(folder: str, *, always: bool) -> Iterator[None]:
    """Restore the config.yaml of an earlier job if the block, which replaces the file, fails.

    detectron2's `default_setup` writes the file before the model and data are built.

    Args:
        folder: OUTPUT_DIR.
        always: restore it also if the block succeeds.
    """
    path, before, done = os.path.join(folder, "config.yaml"), b"", False
    if comm.is_main_process() and os.path.isfile(path):
        try:
            before = read_file(path, limit=LONGEST_FILE)
        except OSError as error:
            raise UserError(f"{path}: {reason(error)}") from error
    try:
        yield
        done = True
    finally:
        if before and (always or not done):
            write_aside(path, lambda file: file.write(before))
