"""What a good engineer would write without this library: the figures that ours stand beside."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """text_guided_scores of one sequence: a product per key head, its query heads folded into rows.

    One batched product over all key heads is slower on the CPU: their keys are not contiguous.
    """
    rows, width = q.shape[0], q.shape[2]
    grouped = q.view(rows, k.shape[1], -1, width)
    means = []
    for own, keys in zip(grouped.unbind(1), k.unbind(1), strict=True):
        logits = width**-0.5 * (own.reshape(-1, width) @ keys.T).float()
        means.append(logits.softmax(dim=-1).mean(dim=0))
    return torch.stack(means).mean(dim=0)


def topk_and_sort(scores: Tensor, keep: int) -> Tensor:
    """select_topk of one sequence; which of two equal scores wins is left to torch."""
    return scores.topk(keep).indices.sort().values


def sdpa_each(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal ragged_attention as one call of SDPA per sequence."""
    parts = []
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        batched = (x.transpose(0, 1)[None] for x in (qs, ks, vs))
        out = F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """ragged_decode_attention with equal lengths: SDPA with the heads of a group folded into
    query rows.
    """
    batch, heads, width = q.shape
    folded = q.view(batch, k_cache.shape[2], heads // k_cache.shape[2], width)
    keys, values = (x.transpose(1, 2) for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(folded, keys, values).reshape(batch, heads, width)
