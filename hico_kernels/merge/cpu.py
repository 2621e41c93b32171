"""Operations that on the CPU are plain torch, around kernels of csrc/cpu where there are any."""

import torch
from torch import Tensor

from hico_kernels.merge.places import arranged
from hico_kernels.ops import register_cpu

_AT_ONCE = 1 << 18  # numbers that fit in cache
_NARROW = torch.float32, torch.bfloat16  # what kernels of merging take


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


@register_cpu
def layer_norm_backward_cpu(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, a piece of the rows in cache at a time."""
    n, t, c = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_x, scale = x.new_empty(n, t, c), weight.to(wide)
    of_weight, of_bias = scale.new_zeros(c), scale.new_zeros(c)
    rows = max(_AT_ONCE // 4 // max(c, 1), 1)  # four tensors of it
    for given, own, to in zip(*(z.flatten(0, 1).split(rows) for z in (grad, x, of_x)), strict=True):
        given, own = given.to(wide), own.to(wide)
        unit = own - own.mean(dim=-1, keepdim=True)
        share = unit.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        unit.mul_(share)
        of_weight += (given * unit).sum(dim=0)
        of_bias += given.sum(dim=0)
        given = given * scale
        given -= given.mean(dim=-1, keepdim=True)
        along = (given * unit).mean(dim=-1, keepdim=True)
        to.copy_(given.sub_(unit.mul_(along)).mul_(share))
    return of_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


@register_cpu
def merge_similar_cpu(
    x: Tensor,
    metric: Tensor,
    r: int,
    sizes: Tensor | None,
    other: Tensor | None,
    front: int,
    class_token: bool,
    distill_token: bool,
    spatial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels of matching and merging in turn; plain torch for `other` of another dtype."""
    match, merge = (
        torch.ops.hico.bipartite_soft_matching.default,
        torch.ops.hico.merge_apply.default,
    )
    behind = metric[:, front:]
    behind = behind if behind.dtype in _NARROW else behind.float()
    inner = match(behind, r, class_token, distill_token)
    assignment, places = arranged(inner, r, front, spatial)
    tokens, merged = merge(x, assignment, x.shape[1] - r, sizes)
    others = x.new_empty(0)
    if other is not None:
        if other.dtype not in _NARROW:
            merge = torch.ops.hico_reference.merge_apply.default
        others, _ = merge(other, assignment, x.shape[1] - r, sizes)
    return tokens, merged, assignment, places, others
