"""Merging in Triton: the launches. What is merged and why in this order is in README.md.

Nothing waits for the device: every grid follows from shapes. Positions outside [0, K) are ignored,
since checking them would wait.
"""

import torch
import triton
from torch import Tensor

from hico_kernels.merge import triton_match, triton_mean, triton_step
from hico_kernels.merge.places import arranged
from hico_kernels.merge.triton_norm import layer_norm_backward, layer_norm_metric

__all__ = [
    "bipartite_soft_matching",
    "layer_norm_backward",
    "layer_norm_metric",
    "merge_apply",
    "merge_backward",
    "merge_similar",
    "merge_tokens",
]

_OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 changes its default
_MATCH = {"BM": 64, "BN": 64, "BD": 32, "num_warps": 4, "num_stages": 3, **_OPTIONS}
_COUNT = {"num_warps": 4, **_OPTIONS}


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


class _Rounds:
    """Matching of N clips, round by round, on sums [N, t, D] of the metric."""

    def __init__(self, metric: Tensor, heads: int, protected: tuple[int, int], sides: int):
        n, t, c = metric.shape
        self.n, self.protected = n, protected
        self.width = -(-max(c // heads, 1) // _MATCH["BD"]) * _MATCH["BD"]  # aligned, no masks
        self.sums = metric.new_empty(n, t, self.width, dtype=torch.float32)
        self.unit = torch.empty_like(self.sums)
        self.best = metric.new_empty(n, sides, dtype=torch.float32)
        self.into = torch.empty_like(self.best, dtype=torch.int32)
        self.ranks = torch.empty_like(self.into)
        self.sides = sides  # tokens of side a in all rounds together
        self.offset = 0
        block = _power(self.width)
        rows = max(1, 2048 // block)
        triton_match.head_sums[(triton.cdiv(n * t, rows),)](
            metric, self.sums, self.unit, n * t, t, c // heads, self.width, heads,
            *metric.stride(),
            BT=rows, BD=block, **_OPTIONS,
        )  # fmt: skip

    def match(self, t: int, r: int) -> None:
        """Find each token of side a its partner and, where some stay, its rank."""
        (first_a, first_b), side = self.protected, t - t // 2 - self.protected[0]
        tiles = triton.cdiv(side, _MATCH["BM"])
        place = (self.offset, self.sides)
        triton_match.best_match[(self.n * tiles,)](
            self.unit, self.best, self.into, t, *place, self.width, tiles,
            CLASS=first_a, DISTILL=first_b, **_MATCH,
        )  # fmt: skip
        if r < side:
            self._rank(self.best, t, r, keep_order=False)
            if first_a:
                by_similarity, self.ranks = self.ranks, torch.empty_like(self.ranks)
                self._rank(by_similarity, t, r, keep_order=True)

    def _rank(self, keys: Tensor, t: int, r: int, keep_order: bool) -> None:
        tiles = triton.cdiv(t - t // 2, 64)
        triton_match.rank[(self.n * tiles,)](
            keys, self.ranks, t, r, self.offset, self.sides, tiles,
            CLASS=self.protected[0], KEEP_ORDER=keep_order, BM=64, BN=128, **_COUNT,
        )  # fmt: skip

    def merge(self, t: int, r: int) -> None:
        """Bring the metric to t - r tokens."""
        keep = t - r
        order, first = _list_members(None, self, t, r, keep, self.n)
        merged = self.sums.new_empty(self.n, keep, self.width)
        unit = torch.empty_like(merged)
        block = _power(self.width)
        rows = max(1, 1024 // block)
        tiles = triton.cdiv(keep, rows)
        triton_mean.merge_metric[(self.n * tiles,)](
            self.sums, order, first, merged, unit, t, keep, self.width, tiles,
            BK=rows, BR=2, BD=block, **_COUNT,
        )  # fmt: skip
        self.sums, self.unit = merged, unit
        self.offset += t - t // 2

    def positions(self, t: int, r: int, keep: int, rounds: int) -> Tensor:
        """Where every one of the first t tokens is after all rounds, r merged in the first."""
        out = self.into.new_empty(self.n, t)
        tiles = triton.cdiv(t, 256)
        triton_match.compose[(self.n * tiles,)](
            self.into, self.ranks, out, t, t, r, keep, rounds, self.sides, tiles,
            CLASS=self.protected[0], DISTILL=self.protected[1], BT=256, **_COUNT,
        )  # fmt: skip
        return out


def _list_members(
    assignment: Tensor | None, rounds: _Rounds | None, t: int, r: int, keep: int, n: int
) -> tuple[Tensor, Tensor]:
    """Order [N, t] and first [N, keep + 1] of the positions in `assignment`, or of a round."""
    if rounds is None:
        into, ranks, place, strides = assignment, assignment, (0, 0), assignment.stride()
    else:
        assignment, into, ranks = rounds.into, rounds.into, rounds.ranks
        place, strides = (rounds.offset, rounds.sides), (0, 0)
    order = into.new_empty(n, t, dtype=torch.int32)
    first = into.new_empty(n, keep + 1, dtype=torch.int32)
    tiles = triton.cdiv(t + keep + 1, 64)
    triton_mean.list_members[(n * tiles,)](
        assignment, into, ranks, order, first, t, r, keep, *place, *strides, tiles,
        GIVEN=rounds is None, BE=64, BT=64, **_COUNT,
    )  # fmt: skip
    return order, first


def merge_tokens(
    x: Tensor, num_tokens: int, num_heads: int, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, T, C], metric [N, T, D] -> tokens [N, K, C], int32 sizes [N, K], assignment [N, T]."""
    n, t, c = x.shape
    if not 1 <= num_tokens <= t:
        raise ValueError(f"num_tokens must be in [1, {t}], got {num_tokens}")
    if num_heads < 1 or c % num_heads:
        raise ValueError(f"num_heads must divide {c}, got {num_heads}")
    if num_tokens == t or n == 0:
        assignment = torch.arange(t, dtype=torch.int32, device=x.device).repeat(n, 1)
        copy = x[:, :num_tokens].clone(memory_format=torch.contiguous_format)
        return copy, torch.ones_like(assignment)[:, :num_tokens].clone(), assignment
    steps, left = [], t
    while left > num_tokens:
        steps.append((left, min(left - num_tokens, left // 2)))
        left -= steps[-1][1]
    like = x if metric is None else metric
    rounds = _Rounds(like, num_heads, (0, 0), sum(left - left // 2 for left, _ in steps))
    for left, r in steps[:-1]:
        rounds.match(left, r)
        rounds.merge(left, r)
    rounds.match(*steps[-1])
    assignment = rounds.positions(t, steps[0][1], num_tokens, len(steps))
    return *merge_apply(x, assignment, num_tokens, None), assignment


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool, distill_token: bool
) -> Tensor:
    """Metric [N, T, D] -> assignment [N, T] int32 with values below T - r."""
    n, t, _ = metric.shape
    most = max(t - class_token - distill_token, 0) // 2
    if not 0 <= r <= most:
        raise ValueError(f"r must be in [0, {most}], got {r}")
    if r == 0 or n == 0:
        return torch.arange(t, dtype=torch.int32, device=metric.device).repeat(n, 1)
    rounds = _Rounds(metric, 1, (int(class_token), int(distill_token)), t - t // 2 - class_token)
    rounds.match(t, r)
    return rounds.positions(t, r, t - r, 1)


def merge_apply(
    x: Tensor, assignment: Tensor, num_tokens: int, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [N, T, C], assignment [N, T], sizes [N, T] -> tokens [N, K, C], sizes [N, K]."""
    n, t, c = x.shape
    tokens = x.new_empty(n, num_tokens, c)
    merged = x.new_empty(n, num_tokens, dtype=torch.int32 if sizes is None else sizes.dtype)
    if merged.numel() == 0:
        return tokens, merged
    order, first = _list_members(assignment, None, t, 0, num_tokens, n)
    weights = assignment if sizes is None else sizes
    block = min(256, _power(c))
    members = min(16, _power(triton.cdiv(t, num_tokens)))
    rows = 16 // members
    tiles = triton.cdiv(num_tokens, rows)
    triton_mean.mean[n * tiles, max(1, triton.cdiv(c, block))](
        x, weights, order, first, tokens, merged, t, num_tokens, c, *x.stride(), *weights.stride(),
        tiles, WEIGHTED=sizes is not None, BK=rows, BR=members, BC=block, **_COUNT,
    )  # fmt: skip
    return tokens, merged


def merge_similar(
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
    """x [N, T, C], metric [N, T, D], sizes [N, T], other [N, T, E] -> tokens, sizes [N, T - r],
    assignment [N, T], places [N, T - r], other.
    """
    rest = front, class_token, distill_token, spatial
    most = max(x.shape[1] - front - class_token - distill_token, 0) // 2
    if not (0 <= front <= x.shape[1] and 0 <= r <= most):
        raise ValueError(f"r must be in [0, {most}], got {r}")
    if r and len(x) and triton_step.fits(metric, front):
        return triton_step.merge_step(x, metric, r, sizes, other, *rest)
    inner = bipartite_soft_matching(metric[:, front:], r, class_token, distill_token)
    assignment, places = arranged(inner, r, front, spatial)
    tokens, merged = merge_apply(x, assignment, x.shape[1] - r, sizes)
    others = x.new_empty(0)
    if other is not None:
        others, _ = merge_apply(other, assignment, x.shape[1] - r, sizes)
    return tokens, merged, assignment, places, others


def merge_backward(
    grad: Tensor, assignment: Tensor, merged_sizes: Tensor, sizes: Tensor | None
) -> Tensor:
    """Grad [N, K, C], assignment [N, T] -> gradient of x [N, T, C]."""
    (n, k, c), t = grad.shape, assignment.shape[1]
    out = grad.new_empty(n, t, c)
    if out.numel() == 0:
        return out
    weights = assignment if sizes is None else sizes
    block = min(1024, _power(c))
    rows = max(1, 2048 // block)
    triton_mean.spread_gradient[triton.cdiv(n * t, rows), triton.cdiv(c, block)](
        grad, assignment, merged_sizes, weights, out, n * t, t, k, c,
        *grad.stride(), *assignment.stride(), *merged_sizes.stride(), *weights.stride(),
        WEIGHTED=sizes is not None, BT=rows, BC=block, **_COUNT,
    )  # fmt: skip
    return out
