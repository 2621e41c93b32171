"""Scoring and choosing visual tokens in plain torch: the definition the kernels are tested
against.
"""

import torch
from torch import Tensor

from hico_kernels import checks
from hico_kernels.ops import register_reference
from hico_kernels.select.bits import copyable


@register_reference
def text_guided_scores_reference(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """Attention of a sequence's text rows over all its keys, averaged over heads and rows."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = k.new_zeros(k.shape[0], dtype=wide)
    rows = checks.segments("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = checks.segments("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    groups = k.shape[1]
    for (q0, q1), (k0, k1) in zip(rows, keys, strict=True):
        if q0 == q1 or k0 == k1:
            continue  # no text row: every score stays 0
        text = q[q0:q1].to(wide).unflatten(1, (groups, q.shape[1] // groups))  # [R, G, H/G, D]
        logits = scale * torch.einsum("rghd,sgd->rghs", text, k[k0:k1].to(wide))
        scores[k0:k1] = logits.softmax(dim=-1).mean(dim=(0, 1, 2))
    return scores


def _rotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """k [S, Hkv, D] turned by cos and sin [S, D]: channel d pairs with d + D/2, as in Qwen2 and
    Llama. Rounded once.
    """
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    low, high = k.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    turned = torch.cat([low, high], dim=-1) * cos + torch.cat([-high, low], dim=-1) * sin
    return turned.to(k.dtype)


@register_reference
def text_guided_scores_rotary_reference(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Rotate the keys, then score."""
    k = _rotated(k, cos, sin)
    return text_guided_scores_reference(q, k, cu_seqlens_q, cu_seqlens_k, scale)


@register_reference
def select_topk_reference(scores: Tensor, cu_seqlens: Tensor, keep: list[int]) -> Tensor:
    """The `keep[b]` largest scores of each sequence, as ascending rows."""
    chosen = [scores.new_empty(0, dtype=torch.int64)]
    bounds = checks.segments("cu_seqlens", cu_seqlens, scores.shape[0])
    for (lo, hi), k in zip(bounds, keep, strict=True):
        if not 0 <= k <= hi - lo:
            raise ValueError(f"keep must be at most the sequence's {hi - lo} scores, got {k}")
        own = scores[lo:hi]
        ranked = own.masked_fill(own.isnan(), -torch.inf).argsort(descending=True, stable=True)
        chosen.append(ranked[:k].sort().values + lo)
    return torch.cat(chosen)


@register_reference
def uniform_indices_reference(num_tokens: int, keep: int, device: torch.device) -> Tensor:
    """torch's own rule on the CPU: the lower half counts up from 0, the upper half down from n -
    1.
    """
    i = torch.arange(keep, dtype=torch.float64, device=device)
    step = (num_tokens - 1) / max(keep - 1, 1)
    up, down = step * i, (num_tokens - 1) - step * (keep - 1 - i)
    return torch.where(i < keep // 2, up, down if keep > 1 else up).long()


@register_reference
def gather_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by index."""
    return copyable(x).index_select(0, index).view(x.dtype)


@register_reference
def gather_many_reference(
    x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """The same rows of several tensors. Of ascending rows also how many lie before each bound."""
    out = [gather_tokens_reference(t, index) for t in (x, *more)]
    if cu_seqlens is not None:
        checks.segments("cu_seqlens", cu_seqlens, x.shape[0])
        if bool((index.diff() < 0).any()):
            raise ValueError("index must not fall where cu_seqlens is given")
        before = index[None, :] < cu_seqlens[:, None]
        out.append(before.sum(dim=1, dtype=torch.int32))
    return out


@register_reference
def gather_rms_norm_reference(
    x: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows of x, and what transformers' RMSNorm makes of them: rounded once as they get length 1,
    and once more when multiplied by the weight.
    """
    rows = x.index_select(0, index)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    unit = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return rows, weight * unit.to(x.dtype)


@register_reference
def rms_norm_backward_reference(
    grad_rows: Tensor, grad_normed: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the norm in `gather_rms_norm`, and of what comes to its rows directly. That of
    the weight takes rows at length 1 as the norm rounded them.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    wide, given = rows.to(dtype), grad_normed.to(dtype)
    share = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    unit = wide * share
    of_weight = (given * unit.to(rows.dtype)).sum(dim=0).to(weight.dtype)
    given = given * weight.to(dtype)
    own = share * (given - unit * (given * unit).mean(dim=-1, keepdim=True))
    own = (own + grad_rows.to(dtype)).to(rows.dtype)
    return own.contiguous(), of_weight


@register_reference
def gather_tokens_backward_reference(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Gradient of `gather_tokens`: a row that was taken twice gets both gradients."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    rows = wide.new_zeros(num_rows, grad.shape[1])
    if grad.is_cuda:  # index_add_ is atomic there
        rows.index_put_((index,), wide, accumulate=True)
    else:
        rows.index_add_(0, index, wide)
    return rows.to(grad.dtype)
