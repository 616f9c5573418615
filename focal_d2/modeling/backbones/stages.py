"""The stages of a backbone, by which learning rates decay towards its beginning."""

from __future__ import annotations

from detectron2.modeling import ResNet
from torch import nn

from focal_d2.errors import UserError
from focal_d2.modeling.backbones.timm_fpn import TimmBottomUp

_LAST_STAGE = 5  # of stride 2^5 = 32


def learning_rate_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factors of the parameters of a model's backbone; all other parameters have the factor 1.

    Args:
        model: with a ResNet of detectron2 or a network of timm.
        decay: d. The stage of stride 2^s has the factor d^(6-s): d for C5, d^2 for C4, …, and d^5 for a stem
            of stride 2. Transformers are fine-tuned with such a decay by layers (arXiv 2106.08254).

    Raises:
        UserError: if the model has no such backbone.
    """
    stages: dict[str, int] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, TimmBottomUp):
            stages |= {f"{module_name}.{name}": stage for name, stage in module.parameter_stages().items()}
        elif isinstance(module, ResNet):
            for name, _ in module.named_parameters():
                part = name.split(".")[0]  # stem, res2, …
                stages[f"{module_name}.{name}"] = int(part[3:]) if part.startswith("res") else 1
    if not stages:
        raise UserError(
            f"SOLVER.FOCAL.LAYER_DECAY is {decay}; it must be 1.0 unless the backbone is a ResNet or of timm"
        )
    return {name: decay ** (_LAST_STAGE + 1 - stage) for name, stage in stages.items()}
