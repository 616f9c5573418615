"""Frozen batch norm folded into the convolution before it."""

from __future__ import annotations

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from focal_d2.modeling.traced import is_recording

# PyTorch's batch norms with statistics of their own; their common base is private.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FoldedConv2d(Conv2d):
    """detectron2's convolution whose frozen norm scales the weights instead of the output.

    The result is the same function of the same parameters, without passes over the output. Scaling the
    weights takes passes over the weights, and a copy of them until the backward pass. So the norm is applied
    to the weights or to the output, whichever is smaller. The norm stays a submodule: names in checkpoints do
    not change, and values that are loaded into it are used at the next call. In a recorded network the norm
    is always applied to the weights, because the recorded choice must not depend on the image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See detectron2's `Conv2d`."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d) or not (is_recording() or self._folding_pays(x)):
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _folding_pays(self, x: Tensor) -> bool:
        cells = x.shape[0] * x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        return cells >= self.weight[0].numel()


def fold_norms(module: nn.Module) -> int:
    """Turn every convolution with a frozen batch norm into a `FoldedConv2d`, in place; return how many."""
    foldable = [m for m in module.modules() if type(m) is Conv2d and isinstance(m.norm, FrozenBatchNorm2d)]
    for convolution in foldable:
        convolution.__class__ = FoldedConv2d
    return len(foldable)
