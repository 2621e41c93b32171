"""What a good engineer would write without this library: the figures that ours stand beside."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """text_guided_scores of one sequence: query heads folded into rows, so that keys are not
    repeated.
    """
    rows, heads, width = q.shape
    groups = k.shape[1]
    folded = (
        q.view(rows, groups, heads // groups, width).permute(1, 0, 2, 3).reshape(groups, -1, width)
    )
    logits = width**-0.5 * torch.bmm(folded, k.permute(1, 2, 0)).float()
    return logits.softmax(dim=-1).mean(dim=(0, 1))


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
