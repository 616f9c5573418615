"""The optimizer that `SOLVER.FOCAL.OPTIMIZER` names."""

from __future__ import annotations

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build detectron2's SGD or PyTorch's AdamW, with detectron2's parameter groups and gradient clipping."""
    if cfg.SOLVER.FOCAL.OPTIMIZER == "SGD":
        return solver.build_optimizer(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True)
