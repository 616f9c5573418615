"""The optimizer that `SOLVER.FOCAL.OPTIMIZER` names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from focal_d2.errors import UserError
from focal_d2.modeling.backbones.stages import learning_rate_factors


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build detectron2's SGD or PyTorch's AdamW, with detectron2's parameter groups and gradient clipping.

    `SOLVER.FOCAL.LAYER_DECAY` gives the stages of the backbone lower learning rates.

    Raises:
        UserError: if there is a decay, and the backbone has no stages or biases have another rate.
    """
    decay = cfg.SOLVER.FOCAL.LAYER_DECAY
    is_sgd = cfg.SOLVER.FOCAL.OPTIMIZER == "SGD"
    if is_sgd and decay == 1.0:
        return solver.build_optimizer(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=_factor_of(cfg, model) if decay < 1.0 else None,
    )
    settings = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY}
    if is_sgd:
        sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        momentum, nesterov = cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV
        return sgd(groups, momentum=momentum, nesterov=nesterov, foreach=True, **settings)
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, fused=True, **settings)


def _factor_of(cfg: CfgNode, model: torch.nn.Module) -> Callable[[str], float]:
    """Return a function from a parameter's name to the factor of its learning rate."""
    if cfg.SOLVER.BIAS_LR_FACTOR != 1.0:  # detectron2 would give all biases the same rate
        raise UserError(
            f"SOLVER.BIAS_LR_FACTOR is {cfg.SOLVER.BIAS_LR_FACTOR}; it must be 1.0 with "
            "SOLVER.FOCAL.LAYER_DECAY"
        )
    factors = learning_rate_factors(model, cfg.SOLVER.FOCAL.LAYER_DECAY)
    return lambda name: factors.get(name, 1.0)
