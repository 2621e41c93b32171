"""What a call must cost at least: bytes that have to cross memory, and the arithmetic it defines.

Every function takes the arguments of the registered operation. What the result depends on counts
as read once, the outputs as written once; nothing that a better algorithm could avoid is counted.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from hico_kernels.flops import merge_flops, visible_pairs


class Cost(NamedTuple):
    """The floor of one call."""

    bytes: int
    flops: int


COSTS: dict[str, Callable[..., Cost]] = {}


def _cost_of(operation: str) -> Callable:
    def keep(cost: Callable[..., Cost]) -> Callable[..., Cost]:
        COSTS[operation] = cost
        return cost

    return keep


def _size(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return [b - a for a, b in pairwise(cu_seqlens.tolist())]


@_cost_of("merge_tokens")
def merge_tokens(x: Tensor, num_tokens: int, num_heads: int, metric: Tensor | None = None) -> Cost:
    """x in, tokens, sizes and assignment out; head mean, all pairs of every round, one mean. A
    metric that is given comes in as well, and the head mean falls away.
    """
    n, t, c = x.shape
    out = num_tokens * c * x.element_size() + 4 * (num_tokens + t)
    if metric is None:
        flops = 2 * t * c + merge_flops(t, num_tokens, c // num_heads)
        return Cost(_size(x) + n * out, n * flops)
    flops = t * c + merge_flops(t, num_tokens, metric.shape[2])
    return Cost(_size(x) + _size(metric) + n * out, n * flops)


@_cost_of("bipartite_soft_matching")
def bipartite_soft_matching(metric: Tensor, r: int, *_) -> Cost:
    """Metric in, assignment out; every even token times every odd one."""
    n, t, d = metric.shape
    if r == 0:
        return Cost(4 * n * t, 0)
    return Cost(_size(metric) + 4 * n * t, n * 2 * (t - t // 2) * (t // 2) * d)


@_cost_of("merge_apply")
def merge_apply(x: Tensor, assignment: Tensor, num_tokens: int, sizes: Tensor | None) -> Cost:
    """x, assignment and sizes in; tokens and sizes out."""
    n, _, c = x.shape
    size = 4 if sizes is None else sizes.element_size()
    out = n * num_tokens * (c * x.element_size() + size)
    return Cost(_size(x, assignment, sizes) + out, x.numel() * (1 if sizes is None else 2))


@_cost_of("merge_similar")
def merge_similar(x, metric, r, sizes, other, front, class_token, distill_token, _) -> Cost:
    """What goes in, and tokens, sizes, assignment and places out: matching and two merges."""
    n, t, c = x.shape
    size = 4 if sizes is None else sizes.element_size()
    row = c * x.element_size() + (0 if other is None else other.shape[2] * other.element_size())
    bytes_ = _size(x, sizes, other) + n * ((t - r) * (row + size + 4) + 4 * t)
    flops = x.numel() * (1 if sizes is None else 2)
    if r:
        bytes_ += _size(metric)
        side = t - front
        flops += n * 2 * (side - side // 2) * (side // 2) * metric.shape[2]
    return Cost(bytes_, flops)


@_cost_of("merge_backward")
def merge_backward(grad: Tensor, assignment: Tensor, merged: Tensor, sizes: Tensor | None) -> Cost:
    """The gradient of the merged tokens in, that of all tokens out."""
    rows = assignment.numel() * grad.shape[2]
    return Cost(_size(grad, assignment, merged, sizes) + rows * grad.element_size(), rows)


@_cost_of("layer_norm_metric")
def layer_norm_metric(x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int) -> Cost:
    """Tokens in and out, the metric out; mean, variance, scaling and mean over heads."""
    wide = 8 if x.element_size() == 8 else 4
    metric = x.numel() // num_heads * wide
    return Cost(_size(x, x, weight, bias) + metric, 8 * x.numel())


@_cost_of("layer_norm_backward")
def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, _) -> Cost:
    """The gradient and tokens in, the gradient of tokens out, those of weight and bias; the norm
    again, and ten operations a number.
    """
    return Cost(_size(grad, x, x, weight, weight, weight), 15 * x.numel())


@_cost_of("text_guided_scores")
def text_guided_scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, _) -> Cost:
    """Keys in once, scores out; one product per row, head and key."""
    score = 8 if q.element_size() == 8 else 4
    products = sum(r * s for r, s in zip(_lengths(cu_q), _lengths(cu_k), strict=True))
    heads, width = q.shape[1:]
    return Cost(_size(q, k, cu_q, cu_k) + score * k.shape[0], 2 * heads * width * products)


@_cost_of("text_guided_scores_rotary")
def text_guided_scores_rotary(q, k, cu_q, cu_k, scale, cos, sin) -> Cost:
    """The same, and both tables in; four operations turn a number."""
    scored = text_guided_scores(q, k, cu_q, cu_k, scale)
    return Cost(scored.bytes + _size(cos, sin), scored.flops + 4 * k.numel())


@_cost_of("select_topk")
def select_topk(scores: Tensor, cu_seqlens: Tensor, keep: list[int]) -> Cost:
    """Scores in, rows out."""
    return Cost(_size(scores, cu_seqlens) + 8 * sum(keep), 0)


@_cost_of("uniform_indices")
def uniform_indices(_, keep: int, __) -> Cost:
    """Rows out."""
    return Cost(8 * keep, 0)


@_cost_of("gather_tokens")
def gather_tokens(x: Tensor, index: Tensor) -> Cost:
    """The taken rows in (each once, however often it is taken) and out."""
    row = x.shape[1] * x.element_size()
    return Cost((index.unique().numel() + len(index)) * row + _size(index), 0)


@_cost_of("gather_many")
def gather_many(x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor | None) -> Cost:
    """The same of each tensor, and the bounds in and out."""
    several = (gather_tokens(t.unsqueeze(1).flatten(1), index).bytes for t in (x, *more))
    again = len(more) * _size(index)  # which is read once
    ends = 0 if cu_seqlens is None else _size(cu_seqlens) + 4 * cu_seqlens.numel()
    return Cost(sum(several) - again + ends, 0)


@_cost_of("gather_rms_norm")
def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, _) -> Cost:
    """The taken rows in and out, and out once more; four operations a number."""
    out = len(index) * x.shape[1]
    return Cost(gather_tokens(x, index).bytes + out * x.element_size() + _size(weight), 4 * out)


@_cost_of("rms_norm_backward")
def rms_norm_backward(
    grad_rows: Tensor, grad_normed: Tensor, rows: Tensor, weight: Tensor, _
) -> Cost:
    """Both gradients and rows in, one gradient out, that of the weight; ten operations a number."""
    return Cost(_size(grad_rows, grad_normed, rows, rows, weight, weight), 10 * rows.numel())


@_cost_of("gather_tokens_backward")
def gather_tokens_backward(grad: Tensor, index: Tensor, num_rows: int) -> Cost:
    """The gradient of the taken rows in, that of all rows out."""
    out = num_rows * grad.shape[1] * grad.element_size()
    return Cost(_size(grad, index) + out, grad.numel())


def _attention_pairs(cu_q: Tensor, cu_k: Tensor, causal: bool) -> int:
    lengths = zip(_lengths(cu_q), _lengths(cu_k), strict=True)
    return sum(visible_pairs(rows, keys, causal) for rows, keys in lengths)


@_cost_of("ragged_attention")
def ragged_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, key_bias) -> Cost:
    """q, k, v in, out and lse out; two products per visible pair."""
    lse = q.shape[0] * q.shape[1] * (8 if q.element_size() == 8 else 4)
    flops = 4 * q.shape[1] * q.shape[2] * _attention_pairs(cu_q, cu_k, causal)
    return Cost(_size(q, k, v, q, cu_q, cu_k, key_bias) + lse, flops)


@_cost_of("ragged_attention_backward")
def ragged_attention_backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale, key_bias
) -> Cost:
    """All of the forward and its gradient in, three gradients out; five products per pair."""
    flops = 10 * q.shape[1] * q.shape[2] * _attention_pairs(cu_q, cu_k, causal)
    return Cost(_size(grad, q, k, v, out, lse, cu_q, cu_k, key_bias, q, k, v), flops)


@_cost_of("ragged_decode_attention")
def ragged_decode_attention(q, k_cache, v_cache, kv_lengths, _) -> Cost:
    """The used part of both caches in; two products per head and entry."""
    entries = int(kv_lengths.sum())
    row = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    flops = 4 * q.shape[1] * q.shape[2] * entries
    return Cost(_size(q, q, kv_lengths) + 2 * entries * row, flops)
