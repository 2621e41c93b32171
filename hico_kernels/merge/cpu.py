"""Operations that on the CPU are plain torch, a piece in cache at a time."""

import torch
from torch import Tensor

from hico_kernels.ops import register_cpu

_AT_ONCE = 1 << 18  # numbers


@register_cpu
def layer_norm_metric_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Not torch's LayerNorm: with channels that are all equal its variance is off."""
    n, t, c = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, metric = x.new_empty(n, t, c), x.new_empty(n, t, c // num_heads, dtype=wide)
    weight, bias = weight.to(wide), bias.to(wide)
    rows = max(_AT_ONCE // max(c, 1), 1)
    pieces = (z.flatten(0, 1).split(rows) for z in (x, y, metric))
    for own, to, means in zip(*pieces, strict=True):
        own = own.to(wide)
        centred = own - own.mean(dim=-1, keepdim=True)
        share = centred.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        to.copy_(centred.mul_(share).mul_(weight).add_(bias))
        means.copy_(to.unflatten(-1, (num_heads, c // num_heads)).mean(dim=-2, dtype=wide))
    return y, metric
