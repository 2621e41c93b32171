"""Attention over packed sequences of different lengths in plain torch: the definition the kernels
are tested against.
"""

import torch
from torch import Tensor

from hico_kernels import checks
from hico_kernels.ops import register_reference

_LOGITS = 1 << 24  # of one block of queries


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, heads: int) -> Tensor:
    """[S, Hkv, D] -> [H, S, D] in accumulation precision, key heads repeated for their group of
    query heads.
    """
    return _wide(x).transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _blocks(queries: int, heads: int, keys: int) -> list[tuple[int, int]]:
    """Rows of queries that are looked at together: at most _LOGITS logits of all heads."""
    step = max(1, _LOGITS // max(heads * keys, 1))
    return [(row, min(row + step, queries)) for row in range(0, queries, step)]


def _logits(
    q: Tensor, k: Tensor, causal: bool, scale: float, bias: Tensor | None, first_unseen: int
) -> Tensor:
    """q [H, Rq, D], k [H, Rk, D] -> [H, Rq, Rk], -inf where a query may not look.

    first_unseen: the key that the first of these queries is the first not to see.
    """
    logits = scale * (q @ k.mT)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(~seen.tril(first_unseen - 1), -torch.inf)
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
    bounds = checks.segments("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, bounds, strict=True):
        _check_longest("max_seqlen_q", max_seqlen_q, q1 - q0)
        _check_longest("max_seqlen_k", max_seqlen_k, k1 - k0)
        if q0 == q1 or k0 == k1:
            continue
        bias = None if key_bias is None else key_bias[k0:k1]
        keys, values = _rows(k[k0:k1], heads), _rows(v[k0:k1], heads)
        unseen = (k1 - k0) - (q1 - q0) + 1  # bottom right: the last query sees every key
        for lo, hi in _blocks(q1 - q0, heads, k1 - k0):
            rows = slice(q0 + lo, q0 + hi)
            logits = _logits(_rows(q[rows], heads), keys, causal, scale, bias, unseen + lo)
            lse[:, rows] = logits.logsumexp(dim=-1)
            out[rows] = (_weights(logits, lse[:, rows]) @ values).transpose(0, 1).to(q.dtype)
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
    bounds = checks.segments("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, bounds, strict=True):
        if q0 == q1 or k0 == k1:
            continue
        bias = None if key_bias is None else key_bias[k0:k1]
        ks, vs = _rows(k[k0:k1], heads), _rows(v[k0:k1], heads)
        sums = torch.zeros_like(ks), torch.zeros_like(vs)  # of dk and dv, per query head
        unseen = (k1 - k0) - (q1 - q0) + 1
        for lo, hi in _blocks(q1 - q0, heads, k1 - k0):
            rows = slice(q0 + lo, q0 + hi)
            qs, do, o = (_rows(x[rows], heads) for x in (q, grad, out))
            logits = _logits(qs, ks, causal, scale, bias, unseen + lo)
            weights = _weights(logits, lse[:, rows])
            dlogits = weights * (do @ vs.mT - (do * o).sum(dim=-1, keepdim=True))
            dq[rows] = (scale * dlogits @ ks).transpose(0, 1).to(q.dtype)
            sums[0].add_(scale * dlogits.mT @ qs)
            sums[1].add_(weights.mT @ do)
        for full, part in zip((dk, dv), sums, strict=True):
            own = part.unflatten(0, (groups, heads // groups)).sum(dim=1)  # over a key head's
            full[k0:k1] = own.transpose(0, 1).to(full.dtype)
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
