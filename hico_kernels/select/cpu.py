"""Operations that on the CPU are plain torch around a kernel of csrc/cpu."""

import torch
from torch import Tensor

from hico_kernels import checks
from hico_kernels.ops import register_cpu

_AT_ONCE = 1 << 18  # numbers that are turned at once: in cache as float32


@register_cpu
def text_guided_scores_rotary_cpu(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Turned keys are written once and read once more."""
    turned = torch.empty_like(k, memory_format=torch.contiguous_format)
    rows = max(_AT_ONCE // max(k[:1].numel(), 1), 1)
    half = k.shape[2] // 2
    for to, *parts in zip(*(x.split(rows) for x in (turned, k, cos, sin)), strict=True):
        x, c, s = (part.float() for part in parts)
        y = x * c[:, None]
        y[..., :half].addcmul_(x[..., half:], s[:, None, :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], s[:, None, half:])
        to.copy_(y)
    score = torch.ops.hico.text_guided_scores.default
    return score(q, turned, cu_seqlens_q, cu_seqlens_k, scale)


@register_cpu
def gather_many_cpu(
    x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """A call of gather_tokens for each."""
    gather = torch.ops.hico.gather_tokens.default
    out = []
    for t in (x, *more):
        rows = gather(t.unsqueeze(1).flatten(1), index)
        out.append(rows.view(index.shape[0], *t.shape[1:]))
    if cu_seqlens is not None:
        checks.segments("cu_seqlens", cu_seqlens, x.shape[0])
        if (index[1:] < index[:-1]).any():
            raise ValueError("index must not fall where cu_seqlens is given")
        ends = cu_seqlens.to(torch.int64)
        out.append(torch.searchsorted(index.contiguous(), ends.contiguous(), out_int32=True))
    return out


@register_cpu
def gather_rms_norm_cpu(
    x: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows by the kernel of gather_tokens; torch normalises them, a piece in cache at a time."""
    rows = torch.ops.hico.gather_tokens.default(x, index)
    normed = torch.empty_like(rows)
    step = max(_AT_ONCE // max(rows.shape[1], 1), 1)
    for part, to in zip(rows.split(step), normed.split(step), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        share = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul((wide * share).to(x.dtype), weight, out=to)
    return rows, normed


@register_cpu
def rms_norm_backward_cpu(
    grad_rows: Tensor, grad_normed: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference, a piece of the rows in cache at a time."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    of_rows, scale = torch.empty_like(rows, memory_format=torch.contiguous_format), weight.to(wide)
    of_weight = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    step = max(_AT_ONCE // 4 // max(rows.shape[1], 1), 1)  # four tensors of it
    tensors = (x.split(step) for x in (grad_rows, grad_normed, rows, of_rows))
    for direct, given, own, to in zip(*tensors, strict=True):
        given, own = given.to(wide), own.to(wide)
        share = own.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        unit = own * share
        of_weight += (given * unit.to(rows.dtype)).sum(dim=0)
        given = given * scale
        along = (given * unit).mean(dim=-1, keepdim=True)
        to.copy_(given.sub_(unit.mul_(along)).mul_(share).add_(direct))
    return of_rows, of_weight.to(weight.dtype)
