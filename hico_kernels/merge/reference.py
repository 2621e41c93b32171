"""Bipartite soft matching and merging in plain torch: the definition the kernels are tested
against.

Tokens at even positions (side a) look for their most similar token at odd positions (side b); the
r best pairs merge (Bolya et al., arXiv 2210.09461, section 3). VideoChat-Flash repeats this on
the encoder's tokens until a clip has 64 of them (arXiv 2501.00574, section 3.1), with the mean
over heads as the metric.
"""

import torch
from torch import Tensor

from hico_kernels.ops import register_reference


def merge_rounds(num_tokens: int, target: int) -> list[int]:
    """How many pairs merge in each round on the way from `num_tokens` to `target`: halve while
    that is too many.
    """
    if target < 1:
        raise ValueError(f"num_tokens must be at least 1, got {target}")
    rounds = []
    while num_tokens > target:
        rounds.append(min(num_tokens - target, num_tokens // 2))
        num_tokens -= rounds[-1]
    return rounds


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero, so its similarity to anything is 0."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, 0 * x)


def _match(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Tensor:
    """metric [N, T, D] -> the new position [N, T] of every token, below T - r. Smaller index wins
    a tie.
    """
    n, t, _ = metric.shape
    if r == 0:
        return torch.arange(t, device=metric.device).expand(n, t)
    first_a, first_b = int(class_token), int(distill_token)  # protected tokens take no part
    unit = _unit(metric)
    a, b = unit[:, ::2][:, first_a:], unit[:, 1::2][:, first_b:]
    similarity = (a @ b.mT).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best, into = similarity.max(dim=-1)  # the first maximum
    order = best.argsort(dim=-1, descending=True, stable=True) + first_a
    into = into + first_b
    merged, stay = order[:, :r], order[:, r:]
    if class_token:  # [class, the others in their order], as in ToMe
        stay = torch.cat([stay.new_zeros(n, 1), stay.sort(dim=-1).values], dim=1)

    kept = torch.arange(stay.shape[1], device=metric.device)
    targets = stay.shape[1] + torch.arange(t // 2, device=metric.device)
    if distill_token:  # [class, distill, the rest of a, the rest of b]
        kept[1:] += 1
        targets[0] = 1
    position_a = stay.new_empty(n, t - t // 2)
    position_a.scatter_(1, stay, kept.expand_as(stay))
    position_a.scatter_(1, merged, targets[into.gather(1, merged - first_a)])
    out = stay.new_empty(n, t)
    out[:, ::2], out[:, 1::2] = position_a, targets
    return out


def _segment_sum(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    """x [N, T, C], assignment [N, T] -> [N, K, C], summed in token order: the same bits on every
    run.
    """
    n, t, c = x.shape
    rows = (assignment + k * torch.arange(n, device=x.device)[:, None]).flatten()
    out = x.new_zeros(n * k, c)
    if x.is_cuda:  # index_add_ is atomic there
        out.index_put_((rows,), x.reshape(n * t, c), accumulate=True)
    else:
        out.index_add_(0, rows, x.reshape(n * t, c))
    return out.view(n, k, c)


def _counts(assignment: Tensor, k: int) -> Tensor:
    ones = torch.ones_like(assignment)
    return assignment.new_zeros(len(assignment), k).scatter_add_(1, assignment, ones)


def _head_mean(x: Tensor, num_heads: int) -> Tensor:
    return _wide(x).unflatten(-1, (num_heads, x.shape[-1] // num_heads)).mean(dim=-2)


@register_reference
def bipartite_soft_matching_reference(
    metric: Tensor, r: int, class_token: bool, distill_token: bool
) -> Tensor:
    """One round of matching; see `hico_kernels.bipartite_soft_matching`."""
    return _match(_wide(metric), r, class_token, distill_token).int().contiguous()


def _checked(assignment: Tensor, k: int) -> Tensor:
    rows = assignment.long()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < k:
        raise ValueError(f"assignment must lie in [0, {k})")
    return rows


@register_reference
def merge_apply_reference(
    x: Tensor, assignment: Tensor, num_tokens: int, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the tokens that share a new position, and their summed sizes."""
    rows = _checked(assignment, num_tokens)
    if sizes is None:
        counts = _counts(rows, num_tokens)
        sums, merged = _segment_sum(_wide(x), rows, num_tokens), counts.int()
    else:
        weights = sizes.to(_wide(x).dtype)[..., None]
        sums = _segment_sum(_wide(x) * weights, rows, num_tokens)
        exact = weights if sizes.is_floating_point() else sizes[..., None]
        merged = _segment_sum(exact, rows, num_tokens)[..., 0]
    total = merged.to(sums.dtype)[..., None]
    tokens = torch.where(total != 0, sums / total, 0).to(x.dtype)
    return tokens, merged if sizes is None else merged.to(sizes.dtype)


@register_reference
def merge_similar_reference(
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
    """Match the tokens behind the `front` ones, order what is left, merge x and other."""
    n, t, _ = x.shape
    behind = metric[:, front:].to(_wide(x[:0]).dtype)
    inner = _match(behind, r, class_token, distill_token).long()
    token = torch.arange(t, device=x.device).expand(n, t)
    assignment = torch.cat([token[:, :front], inner + front], dim=1)
    places = token.new_empty(n, t - r)
    places.scatter_(1, assignment, token)
    odd = assignment[:, front + 1 :: 2]  # what merges goes to an odd token: that gives the place
    places.scatter_(1, odd, token[:, front + 1 :: 2])
    if spatial:
        places, slots = places.sort(dim=1)
        assignment = slots.argsort(dim=1).gather(1, assignment)
    into = assignment.int().contiguous()
    tokens, merged = merge_apply_reference(x, into, t - r, sizes)
    others = x.new_empty(0)
    if other is not None:
        others, _ = merge_apply_reference(other, into, t - r, sizes)
    return tokens, merged, into, places.int(), others


@register_reference
def merge_backward_reference(
    grad: Tensor, assignment: Tensor, merged_sizes: Tensor, sizes: Tensor | None
) -> Tensor:
    """Gradient of `merge_apply` in x: every member takes its share of its position's gradient."""
    wide = _wide(grad)
    total = merged_sizes.to(wide.dtype)[..., None]
    share = torch.where(total != 0, wide / total, 0)
    rows = _checked(assignment, grad.shape[1])
    members = torch.take_along_dim(share, rows[..., None], dim=1)
    if sizes is not None:
        members = members * sizes.to(wide.dtype)[..., None]
    return members.to(grad.dtype)


@register_reference
def merge_tokens_reference(
    x: Tensor, num_tokens: int, num_heads: int, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, then merge: all rounds run on the metric alone, then one mean over each token's
    members.

    The metric is linear in the tokens and merging is a weighted mean, so the metric of merged
    tokens is the merge of the metrics, and a mean of means weighted by sizes is the plain mean of
    all members.
    """
    n, t, _ = x.shape
    if num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(f"num_heads must divide {x.shape[2]}, got {num_heads}")
    if num_tokens == t:
        assignment = torch.arange(t, dtype=torch.int32, device=x.device).repeat(n, 1)
        copy = x.clone(memory_format=torch.contiguous_format)
        return copy, torch.ones_like(assignment), assignment
    assignment = torch.arange(t, device=x.device).repeat(n, 1)
    own = _head_mean(x, num_heads) if metric is None else metric
    sums, left = own.to(_wide(x[:0]).dtype), t
    for r in merge_rounds(t, num_tokens):  # lengths differ only by a factor, which matching ignores
        position = _match(sums, r)
        left -= r
        sums = _segment_sum(sums, position, left)
        assignment = position.gather(1, assignment)
    tokens, sizes = merge_apply_reference(x, assignment, num_tokens, None)
    return tokens, sizes, assignment.int()


@register_reference
def layer_norm_metric_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """LayerNorm, rounded once, and the metric that `merge_tokens` would take of the result."""
    wide = _wide(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    unit = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = (unit * _wide(weight) + _wide(bias)).to(x.dtype).contiguous()
    return y, _head_mean(y, num_heads)


@register_reference
def layer_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the norm in `layer_norm_metric`; the metric is a constant."""
    unit, given = _wide(x), _wide(grad)
    unit = unit - unit.mean(dim=-1, keepdim=True)
    share = (unit.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    unit = unit * share
    of_weight = (given * unit).sum(dim=(0, 1)).to(weight.dtype)
    of_bias = given.sum(dim=(0, 1)).to(weight.dtype)
    given = given * _wide(weight)
    given = given - given.mean(dim=-1, keepdim=True)
    of_x = share * (given - unit * (given * unit).mean(dim=-1, keepdim=True))
    return of_x.to(x.dtype).contiguous(), of_weight, of_bias


def merge_tokens_round_by_round(
    x: Tensor, num_tokens: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The literal algorithm: in every round, match the current tokens, then merge them weighted
    by size.
    """
    n, t, _ = x.shape
    assignment = torch.arange(t, device=x.device).repeat(n, 1)
    tokens, sizes = _wide(x), torch.ones(n, t, dtype=torch.int32, device=x.device)
    for r in merge_rounds(t, num_tokens):
        position = _match(_head_mean(tokens, num_heads), r)
        tokens, sizes = merge_apply_reference(tokens, position, tokens.shape[1] - r, sizes)
        assignment = position.gather(1, assignment)
    return tokens.to(x.dtype), sizes, assignment.int()
