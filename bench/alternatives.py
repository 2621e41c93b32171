"""What a good engineer would write without this library: the figures that ours stand beside."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hico_kernels.merge.reference import merge_rounds


def eager_merge(x: Tensor, keep: int, heads: int) -> Tensor:
    """merge_tokens as models have it: every round moves the tokens themselves, in their dtype."""
    sizes = x.new_ones(*x.shape[:2], 1)
    for r in merge_rounds(x.shape[1], keep):
        metric = x.unflatten(-1, (heads, -1)).mean(dim=2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        best, into = (metric[:, ::2] @ metric[:, 1::2].mT).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        x, sizes = (_eager_step(v, order, into[..., None], r) for v in (x * sizes, sizes))
        x = x / sizes
    return x


def eager_vit_step(metric: Tensor, x: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """bipartite_soft_matching with a class token, and its merge: x [N, T, C], sizes [N, T, 1]."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].mT
    similarity[:, 0] = -torch.inf
    best, into = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    order = torch.cat([order[:, :r], order[:, r:].sort(dim=1).values], dim=1)
    x, sizes = (_eager_step(v, order, into[..., None], r) for v in (x * sizes, sizes))
    return x / sizes, sizes


def _eager_step(x: Tensor, order: Tensor, into: Tensor, r: int) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    gone, stay = order[:, :r], order[:, r:]

    def rows(index: Tensor) -> Tensor:
        return index.expand(-1, -1, x.shape[-1])

    merged = odd.scatter_add(1, rows(into.gather(1, gone)), even.gather(1, rows(gone)))
    return torch.cat([even.gather(1, rows(stay)), merged], dim=1)


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


def layer_norm_and_mean(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, heads: int
) -> tuple[Tensor, Tensor]:
    """layer_norm_metric as two steps."""
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y, y.unflatten(-1, (heads, -1)).mean(dim=-2, dtype=torch.float32)


def rotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [S, Hkv, D] with rotary positions, as models turn them: in their dtype."""
    turned = torch.cat([-k[..., k.shape[-1] // 2 :], k[..., : k.shape[-1] // 2]], dim=-1)
    return k * cos[:, None] + turned * sin[:, None]


def gather_each(x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    """gather_tokens with companions and bounds, one call for each."""
    bounds = torch.searchsorted(index, cu_seqlens, out_int32=True)
    return [*(t.index_select(0, index) for t in (x, *more)), bounds]


def gather_and_rms_norm(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> tuple:
    """gather_rms_norm as two steps."""
    rows = x.index_select(0, index)
    return rows, F.rms_norm(rows, weight.shape, weight, eps)


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


def gradient(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The backward pass of what made `out`, which may be asked for again."""
    return torch.autograd.grad(out, inputs, grad, retain_graph=True)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """ragged_decode_attention with equal lengths: SDPA with the heads of a group folded into
    query rows.
    """
    batch, heads, width = q.shape
    folded = q.view(batch, k_cache.shape[2], heads // k_cache.shape[2], width)
    keys, values = (x.transpose(1, 2) for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(folded, keys, values).reshape(batch, heads, width)
