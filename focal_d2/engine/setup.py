"""Set up a job: OUTPUT_DIR, its logs, its seed and its config.yaml."""

from __future__ import annotations

import argparse
import os

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from focal_d2.errors import UserError
from focal_d2.modeling.build import quiet_console
from focal_d2.storage.files import write_aside


def set_up_job(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set up the logs, the GPU and the random generators of this process, and log what runs here.

    It logs and sets what detectron2's `default_setup` does. It differs in three ways: the config is in
    OUTPUT_DIR/log.txt but not on the console, `save_config` is called later, and the config is not converted
    to another type for each key that is read (0.6 seconds on a CPU).

    Raises:
        UserError: if OUTPUT_DIR cannot be written.
    """
    rank = comm.get_rank()
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        # All of them write to the same file.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
        d2_logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="focal_d2")
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error
    with quiet_console(d2_logger):
        d2_logger.info(f"Rank {rank} of {comm.get_world_size()} processes")
        d2_logger.info(f"Environment:\n{collect_env_info()}")
        d2_logger.info(f"Arguments: {args}")
        d2_logger.info(f"Running with full config:\n{cfg.dump()}")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.index is not None:
        # PyTorch's random state, pinned memory and streams are those of the current GPU: "cuda:1" is made it.
        torch.cuda.set_device(device)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    # Test images have many sizes, for each of which cuDNN would try its algorithms.
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    focal = cfg.MODEL.FOCAL
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = focal.TF32


def save_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml, in the main process only.

    It is called when all parts of the job have been built: a job that fails before does not replace the file
    of an earlier job.

    Raises:
        UserError: if the file cannot be written.
    """
    if not comm.is_main_process():
        return
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    try:
        write_aside(path, lambda file: file.write(cfg.dump().encode()))
    except OSError as error:
        raise UserError(f"{path}: {error}") from error
