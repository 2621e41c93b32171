"""Attention over packed sequences of different lengths in plain torch: the definition the kernels
are tested against.
"""

import torch
from torch import Tensor

from hico_kernels import checks
from hico_kernels.ops import register_reference


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, heads: int) -> Tensor:
    """[S, Hkv, D] -> [H, S, D] in accumulation precision, key heads repeated for their group of
    query heads.
    """
    return _wide(x).transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _logits(q: Tensor, k: Tensor, causal: bool, scale: float, bias: Tensor | None) -> Tensor:
    """q [H, Rq, D], k [H, Rk, D] -> [H, Rq, Rk], -inf where a query may not look."""
    logits = scale * (q @ k.mT)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if causal:  # bottom right: the last query sees every key
        seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(~seen.tril(k.shape[1] - q.shape[1]), -torch.inf)
    return logits


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), and 0 in a row that sees nothing."""
    return torch.where(lse.isneginf()[..., None], 0, (logits - lse[..., None]).exp())


@register_reference
def ragged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of each sequence on its own."""
    heads = q.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = _wide(q).new_full((heads, q.shape[0]), -torch.inf)
    queries = checks.segments("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = checks.segments("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        _check_longest("max_seqlen_q", max_seqlen_q, q1 - q0)
        _check_longest("max_seqlen_k", max_seqlen_k, k1 - k0)
        if q0 == q1 or k0 == k1:
            continue
        bias = None if key_bias is None else key_bias[k0:k1]
        logits = _logits(_rows(q[q0:q1], heads), _rows(k[k0:k1], heads), causal, scale, bias)
        lse[:, q0:q1] = logits.logsumexp(dim=-1)
        weights = _weights(logits, lse[:, q0:q1])
        out[q0:q1] = (weights @ _rows(v[k0:k1], heads)).transpose(0, 1).to(q.dtype)
    return out, lse


@register_reference
def ragged_attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691,
    section 3.1.2).
    """
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    queries = checks.segments("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = checks.segments("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        if q0 == q1 or k0 == k1:
            continue
        bias = None if key_bias is None else key_bias[k0:k1]
        qs, ks, vs = (_rows(x, heads) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        do, o = _rows(grad[q0:q1], heads), _rows(out[q0:q1], heads)
        weights = _weights(_logits(qs, ks, causal, scale, bias), lse[:, q0:q1])
        dlogits = weights * (do @ vs.mT - (do * o).sum(dim=-1, keepdim=True))
        dq[q0:q1] = (scale * dlogits @ ks).transpose(0, 1).to(q.dtype)
        for full, part in ((dk, scale * dlogits.mT @ qs), (dv, weights.mT @ do)):
            summed = part.unflatten(0, (groups, heads // groups)).sum(
                dim=1
            )  # over a key head's queries
            full[k0:k1] = summed.transpose(0, 1).to(full.dtype)
    return dq, dk, dv


@register_reference
def ragged_decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_lengths: Tensor, scale: float
) -> Tensor:
    """One query per sequence over the first kv_lengths[b] entries of its cache."""
    heads = q.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, length in enumerate(kv_lengths.tolist()):
        if not 0 <= length <= k_cache.shape[1]:
            raise ValueError(f"kv_lengths must lie in [0, {k_cache.shape[1]}], got {length}")
        if length == 0:
            continue
        keys, values = (_rows(cache[b, :length], heads) for cache in (k_cache, v_cache))
        weights = (scale * (_wide(q[b])[:, None] @ keys.mT)).softmax(dim=-1)
        out[b] = (weights @ values)[:, 0].to(q.dtype)
    return out


def _check_longest(name: str, given: int, length: int) -> None:
    if length > given:
        raise ValueError(f"{name} must be at least the longest sequence, {length}, got {given}")
