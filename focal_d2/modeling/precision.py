"""The precision of backbone and head, `MODEL.FOCAL.AMP.*`, and convolutions that PyTorch computes wrongly.

Measured with `avx512_bf16` and without matrix units: on an AMD EPYC, a step of R50 in bfloat16 took 1 / 2.4
of the time of detectron2's float32. On an Intel CPU it took 1.6 times the time of this package's float32, and
convolutions of odd widths wrote outside their memory (PyTorch 2.14.1). So "auto" uses bfloat16 on AMD CPUs
with `avx512_bf16`, and on CPUs with matrix units for it (`amx_bf16`). All other CPUs compute in float32.
"""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from focal_d2.config import focal_config
from focal_d2.errors import UserError
from focal_d2.hardware import Bfloat16Support, cpu_facts, judge_cpu

logger = logging.getLogger(__name__)

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def bfloat16_support() -> Bfloat16Support:
    """Judge the CPU of this machine; see `judge_cpu`."""
    # The oldest versions of PyTorch that the package accepts do not have the function.
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return judge_cpu(get_capabilities(), cpu_facts().get("vendor_id"))


def autocast_type(name: str, *, enabled: bool, device: str) -> torch.dtype | None:
    """Return autocast's type for backbone and head; None: no autocast, they compute in their weights' type.

    On a CPU, the log says which type "auto" chooses and why. "bfloat16" on a CPU for which "auto" chooses
    float32 gives a warning.

    Args:
        name: `MODEL.FOCAL.AMP.DTYPE`.
        enabled: `MODEL.FOCAL.AMP.ENABLED`.
        device: `MODEL.DEVICE`, not "auto".

    Raises:
        UserError: for an unknown type, or one that the device does not have.
    """
    if not enabled:
        return None
    if torch.device(device).type != "cpu":
        return _TYPES["bfloat16" if name == "auto" else name]
    if name == "float16":
        raise UserError("MODEL.FOCAL.AMP.DTYPE is float16, which needs a GPU; on a CPU use auto")
    trusted, reason = bfloat16_support()
    if name == "auto":
        chosen = "bfloat16" if trusted else "float32"
        logger.info(f"MODEL.FOCAL.AMP.DTYPE auto: computing in {chosen}, because this CPU {reason}")
        return _TYPES.get(chosen)
    if not trusted:
        logger.warning(
            f"MODEL.FOCAL.AMP.DTYPE is bfloat16, but this CPU {reason}: bfloat16 may be slower than float32 "
            "and give wrong results; auto computes in float32"
        )
    return _TYPES[name]


def configured_type(cfg: CfgNode) -> torch.dtype | None:
    """Return the `autocast_type` of a full config, whose device is not "auto"."""
    focal = focal_config(cfg)
    return autocast_type(focal.AMP.DTYPE, enabled=focal.AMP.ENABLED, device=cfg.MODEL.DEVICE)


def is_narrow(images: Tensor, *, coarsest_stride: int) -> bool:
    """Return whether images are too narrow for training in bfloat16 on a CPU: then float32 must be used.

    If a convolution of stride 2 reads a map that is one cell wide, some of its weights read only padding. On
    a CPU, PyTorch 2.14.1 does not write the bfloat16 gradient of those weights: it has whatever was in the
    memory. Seen on an AMD EPYC with 3 × 3 and 7 × 7 kernels, at any height and number of channels.

    Args:
        images: (N, C, H, W).
        coarsest_stride: of the last level, which has the narrowest map.
    """
    return images.device.type == "cpu" and images.shape[-1] <= coarsest_stride // 2


def check_channels_last(network: nn.Module) -> None:
    """Refuse a network that PyTorch cannot train in the channels-last layout on a CPU.

    PyTorch 2.14.1 writes outside its memory when it computes the float32 weight gradient of a 1 × 1
    convolution of stride 2 with 3 to 12 input and at most 16 output channels in that layout. The process
    then crashes, or continues with wrong numbers. Seen on an AMD EPYC (Zen 4) in 40 steps of each shape; not
    with 16 or more input channels, 20 or more output channels, stride 3, 3 × 3 kernels, bfloat16, or NCHW.
    No ResNet of the paper has such a convolution.

    Args:
        network: backbone or head.

    Raises:
        UserError: naming the convolution.
    """
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride) == ((1, 1), (2, 2))
            and module.in_channels < 16
            and module.out_channels <= 16
        ):
            raise UserError(
                f"MODEL.FOCAL.CHANNELS_LAST is True, but {name} is a 1 × 1 convolution of stride 2 from "
                f"{module.in_channels} to {module.out_channels} channels, which PyTorch trains wrongly in "
                "that layout on a CPU: use more channels, or CHANNELS_LAST False"
            )
