"""Wrong merging."""

import torch

from hico_kernels.merge import reference
from mutants.slips import on_changed, on_result, truncated, wrong

# --- one step -------------------------------------------------------------------------------------


@wrong("bipartite_soft_matching", "larger_index_wins_a_tie", last_wins=True)
@wrong("bipartite_soft_matching", "larger_index_is_ranked_first", last_first=True)
@wrong("bipartite_soft_matching", "nan_wins", nan=torch.inf)
@wrong("bipartite_soft_matching", "product_instead_of_cosine", unit=False)
@wrong("bipartite_soft_matching", "merges_the_least_similar", falling=False)
@wrong("bipartite_soft_matching", "keeps_the_unmerged_in_their_order", ordered=True)
@wrong("bipartite_soft_matching", "misses_the_last_target", skip_last=True)
@wrong("bipartite_soft_matching", "matches_in_bfloat16", precision=torch.bfloat16)
def step(metric, r, class_token=False, distill_token=False, **slip):
    if class_token or r == 0:
        right = reference.bipartite_soft_matching_reference
        return right(metric, r, class_token, distill_token)
    n, t, _ = metric.shape
    rows = reference._unit(metric.float()) if slip.get("unit", True) else metric.float()
    rows = rows.to(slip.get("precision", torch.float32))
    similarity = (rows[:, ::2] @ rows[:, 1::2].mT).float()
    similarity = similarity.nan_to_num(slip.get("nan", -torch.inf), torch.inf, -torch.inf)
    if slip.get("skip_last") and t > 3:
        similarity[..., -1] = -torch.inf
    best, into = similarity.max(dim=-1)
    if slip.get("last_wins"):
        into = t // 2 - 1 - similarity.flip(-1).argmax(dim=-1)
    if slip.get("last_first"):
        best = best.flip(-1)
    order = best.argsort(dim=-1, descending=slip.get("falling", True), stable=True)
    if slip.get("last_first"):
        order = t - t // 2 - 1 - order
    merged, stay = order[:, :r], order[:, r:]
    if slip.get("ordered"):
        stay = stay.sort(dim=-1).values
    odd = stay.shape[1] + torch.arange(t // 2)
    even = stay.new_empty(n, t - t // 2)
    even.scatter_(1, stay, torch.arange(stay.shape[1]).expand_as(stay))
    even.scatter_(1, merged, odd[into.gather(1, merged)])
    out = torch.empty(n, t, dtype=torch.int32)
    out[:, ::2], out[:, 1::2] = even, odd
    return out


# --- all rounds -----------------------------------------------------------------------------------


@wrong("merge_tokens", "mean_of_means", weighted=False)
@wrong("merge_tokens", "groups_of_neighbouring_channels", grouped=True)
@wrong("merge_tokens", "ignores_num_heads", headless=True)
@wrong("merge_tokens", "merges_a_quarter_a_round", part=4)
@wrong("merge_tokens", "larger_index_wins_a_tie", last_wins=True)
@wrong("merge_tokens", "nan_wins", nan=torch.inf)
@wrong("merge_tokens", "keeps_the_unmerged_in_their_order", ordered=True)
def rounds(
    x, num_tokens, num_heads, metric=None, weighted=True, grouped=False, headless=False, part=2,
    **slip,
):  # fmt: skip
    if metric is not None:
        return reference.merge_tokens_reference(x, num_tokens, num_heads, metric)
    n, t, c = x.shape
    tokens, sizes = reference._wide(x), torch.ones(n, t, dtype=torch.int32)
    assignment = torch.arange(t).repeat(n, 1)
    while tokens.shape[1] > num_tokens:
        left = tokens.shape[1]
        r = min(left - num_tokens, left // 2, max(left // part, 1))
        if grouped:
            metric = tokens.unflatten(-1, (c // num_heads, num_heads)).mean(dim=-1)
        else:
            metric = reference._head_mean(tokens, 1 if headless else num_heads)
        into = step(metric, r, **slip).long()
        means, counts = reference.merge_apply_reference(tokens, into, left - r, sizes)
        if not weighted:
            means, _ = reference.merge_apply_reference(tokens, into, left - r, None)
        tokens, sizes, assignment = means, counts, into.gather(1, assignment)
    return tokens.to(x.dtype), sizes, assignment.int()


def without_last_channel(x):
    return x * (torch.arange(x.shape[-1]) < x.shape[-1] - 1)


def times_size(y, *_):
    return (y[0] * y[1][..., None]).to(y[0].dtype), *y[1:]


def twice_rounded(y, *_):
    return y[0].bfloat16().to(y[0].dtype), *y[1:]


on_changed("merge_tokens", "forgets_a_channel", lambda x, *rest: (without_last_channel(x), *rest))
on_changed("merge_tokens", "plans_the_first_clip", lambda x, *rest: (x[:1].expand_as(x), *rest))
on_changed("merge_tokens", "ignores_the_metric", lambda x, k, heads, metric: (x, k, heads, None))
on_result("merge_tokens", "sums_instead_of_means", times_size)
on_result("merge_tokens", "sizes_in_int64", lambda y, *_: (y[0], y[1].long(), y[2]))
on_result("merge_tokens", "rounds_twice", twice_rounded)

# --- the mean and its gradient --------------------------------------------------------------------


@wrong("merge_apply", "adds_in_the_dtype_of_x")
def narrow_mean(x, into, k, sizes):
    tokens, merged = reference.merge_apply_reference(x, into, k, sizes)
    weights = torch.ones_like(into) if sizes is None else sizes
    sums = torch.zeros_like(tokens)
    for token in range(x.shape[1]):  # one rounding for every member
        part = (x[:, token] * weights[:, token, None].to(x.dtype))[:, None]
        sums.scatter_add_(1, into[:, token, None, None].long().expand_as(part), part)
    return torch.where(merged[..., None] != 0, sums / merged[..., None].to(x.dtype), 0), merged


def without_sizes(x, into, k, sizes):
    return x, into, k, None if sizes is None else torch.ones_like(sizes)


on_changed("merge_apply", "ignores_sizes", without_sizes)
on_changed("merge_apply", "plan_of_the_neighbour", lambda x, to, *rest: (x, to.roll(1, 0), *rest))
on_changed("merge_apply", "forgets_a_channel", lambda x, *rest: (without_last_channel(x), *rest))
on_result("merge_apply", "forgets_to_divide", times_size)
on_result("merge_apply", "rounds_twice", twice_rounded)
truncated("merge_tokens")
truncated("merge_apply")
on_changed("merge_backward", "ignores_sizes", lambda *args: (*args[:3], None))
on_changed(
    "merge_backward", "forgets_to_divide", lambda g, to, n, s: (g, to, torch.ones_like(n), s)
)
on_changed("merge_backward", "divides_by_the_neighbour", lambda g, to, n, s: (g, to, n.roll(1), s))


@wrong("layer_norm_backward", "mean_kept", mean=0)
@wrong("layer_norm_backward", "radius_kept", along=0)
@wrong("layer_norm_backward", "x_not_centred", centred=False)
@wrong("layer_norm_backward", "weight_left_out", weighted=False)
@wrong("layer_norm_backward", "bias_gets_that_of_the_weight", swapped=True)
def normalise_backward(grad, x, weight, eps, **slip):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    unit, given = x.to(dtype), grad.to(dtype)
    unit = unit - unit.mean(-1, keepdim=True) if slip.get("centred", True) else unit
    share = (unit.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = unit * share
    of_weight, of_bias = (given * unit).sum((0, 1)), given.sum((0, 1))
    of_bias = of_weight.clone() if slip.get("swapped") else of_bias
    given = given * weight.to(dtype) if slip.get("weighted", True) else given
    given = given - slip.get("mean", 1) * given.mean(-1, keepdim=True)
    along = slip.get("along", 1) * (given * unit).mean(-1, keepdim=True)
    own = share * (given - unit * along)
    return own.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


# --- step of a ViT block --------------------------------------------------------------------------


on_changed("merge_similar", "forgets_the_class_token", lambda *a: (*a[:6], False, False, a[8]))
on_changed("merge_similar", "other_order", lambda *a: (*a[:8], not a[8]))
on_changed("merge_similar", "unweighted", lambda *a: (*a[:3], None, *a[4:]))
on_changed("merge_similar", "front_takes_part", lambda *a: (*a[:5], 0, *a[6:]))
on_changed("merge_similar", "merges_one_less", lambda *a: (*a[:2], max(a[2] - 1, 0), *a[3:]))
on_result("merge_similar", "other_of_x", lambda y, *a: (*y[:4], y[0][..., : y[4].shape[-1]]))
on_result(
    "merge_similar",
    "a_place_is_that_of_the_first_member",
    lambda y, *a: (*y[:3], first_members(y[2], y[3]), y[4]),
)


def first_members(assignment, places):
    k = torch.arange(places.shape[1])
    return (assignment[:, :, None] == k).int().argmax(dim=1).int()


# --- the norm before ------------------------------------------------------------------------------


@wrong("layer_norm_metric", "metric_of_what_came_in", source="x")
@wrong("layer_norm_metric", "metric_before_rounding", source="unrounded")
@wrong("layer_norm_metric", "groups_of_neighbouring_channels", neighbours=True)
@wrong("layer_norm_metric", "sums_over_heads", mean=False)
@wrong("layer_norm_metric", "unbiased_variance", off=1)
@wrong("layer_norm_metric", "mean_left_in", centred=False)
def norm(x, weight, bias, eps, num_heads, **slip):
    wide = x if x.dtype == torch.float64 else x.float()
    middle = wide - wide.mean(-1, keepdim=True)
    share = middle.square().sum(-1, keepdim=True) / max(x.shape[2] - slip.get("off", 0), 1)
    unit = (middle if slip.get("centred", True) else wide) / (share + eps).sqrt()
    unrounded = unit * weight.to(wide.dtype) + bias.to(wide.dtype)
    y = unrounded.to(x.dtype)
    of = {"x": wide, "y": y.to(wide.dtype), "unrounded": unrounded}[slip.get("source", "y")]
    parts = of.unflatten(-1, (num_heads, x.shape[2] // num_heads))
    if slip.get("neighbours"):
        parts = of.unflatten(-1, (x.shape[2] // num_heads, num_heads)).mT
    return y, parts.mean(-2) if slip.get("mean", True) else parts.sum(-2)
