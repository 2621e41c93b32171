"""Wrong scoring, choosing and gathering."""

import torch

from hico_kernels.checks import segments
from mutants.slips import on_changed, on_result, wrong


def falling(scores):
    """Indices by falling score; the smaller of equal ones first."""
    return scores.argsort(descending=True, stable=True)


def no_nan(scores):
    return scores.masked_fill(scores.isnan(), -torch.inf)


def larger_first(own, k):
    return (len(own) - 1 - falling(no_nan(own).flip(0))[:k]).sort().values


def by_bits(own, k):
    below = 1e-300 * own.signbit().double()
    return falling(no_nan(own).double() - below)[:k].sort().values


def without_end(own, k):
    return falling(no_nan(own[:-1] if 0 < k < len(own) else own))[:k].sort().values


@wrong("select_topk", "by_falling_score", rule=lambda own, k: falling(no_nan(own))[:k])
@wrong("select_topk", "nan_wins", rule=lambda own, k: falling(own)[:k].sort().values)
@wrong("select_topk", "larger_index_wins_a_tie", rule=larger_first)
@wrong("select_topk", "minus_zero_is_smaller", rule=by_bits)
@wrong("select_topk", "one_short_of_the_end", rule=without_end)
@wrong(
    "select_topk",
    "compares_half_the_bits",
    rule=lambda own, k: falling(no_nan(own).bfloat16())[:k].sort().values,
)
def choose(scores, cu_seqlens, keep, rule):
    parts = zip(segments("cu_seqlens", cu_seqlens, len(scores)), keep, strict=True)
    chosen = [lo + rule(scores[lo:hi], k) for (lo, hi), k in parts]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *chosen])


def within_sequence(y, scores, cu_seqlens, keep):
    return y - cu_seqlens[:-1].repeat_interleave(torch.tensor(keep, dtype=torch.int64))


on_result("select_topk", "rows_within_the_sequence", within_sequence)
on_result("select_topk", "rows_in_int32", lambda y, *_: y.int())


@wrong("uniform_indices", "rounded_down_exactly", rule=lambda i, n, k: i * (n - 1) // max(k - 1, 1))
@wrong("uniform_indices", "in_float32", rule=lambda i, n, k: (i * ((n - 1) / max(k - 1, 1))).long())
@wrong("uniform_indices", "without_the_last", rule=lambda i, n, k: i * n // max(k, 1))
@wrong(
    "uniform_indices",
    "to_nearest",
    rule=lambda i, n, k: (i.double() * ((n - 1) / max(k - 1, 1))).round().long(),
)
@wrong(
    "uniform_indices",
    "counts_up_only",
    rule=lambda i, n, k: (i.double() * ((n - 1) / max(k - 1, 1))).long(),
)
def spaced(num_tokens, keep, device, rule):
    return rule(torch.arange(keep), num_tokens, keep)


def mean(attention):
    return attention.mean(dim=(0, 1))


@wrong("text_guided_scores", "sums_over_heads", reduce=lambda a: a.sum(dim=0).mean(dim=0))
@wrong("text_guided_scores", "takes_the_largest_head", reduce=lambda a: a.amax(dim=0).mean(dim=0))
@wrong("text_guided_scores", "first_row_only", reduce=lambda a: mean(a[:, :1]))
@wrong("text_guided_scores", "weights_in_bfloat16", reduce=lambda a: mean(a.bfloat16().float()))
@wrong("text_guided_scores", "softmax_of_the_mean", reduce=lambda a: mean(a.log()).softmax(dim=-1))
@wrong("text_guided_scores", "interleaved_heads", interleaved=True)
@wrong("text_guided_scores", "loses_the_tail_of_a_tile", tail=16)
def score(q, k, cu_q, cu_k, scale, reduce=mean, interleaved=False, tail=1):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = k.new_zeros(k.shape[0], dtype=wide)
    ends = segments("q", cu_q, len(q)), segments("k", cu_k, len(k))
    for (q0, q1), (k0, k1) in zip(*ends, strict=True):
        if q0 == q1 or k0 == k1:
            continue
        keys = k[k0:k1].to(wide).transpose(0, 1)
        fold = q.shape[1] // k.shape[1]
        keys = keys.repeat(fold, 1, 1) if interleaved else keys.repeat_interleave(fold, 0)
        logits = q[q0:q1].to(wide).transpose(0, 1) @ keys.mT * scale
        if tail < k1 - k0:
            logits[..., (k1 - k0) // tail * tail :] = -torch.inf
        scores[k0:k1] = reduce(logits.softmax(dim=-1)).to(wide)
    return scores


def one_sequence(q, k, cu_q, cu_k, scale):
    ends = [0, -1] if len(cu_q) > 1 else [0]
    return q, k, cu_q[ends], cu_k[ends], scale


on_changed("text_guided_scores", "forgets_scale", lambda *args: (*args[:4], 1.0))
on_changed("text_guided_scores", "one_softmax_for_all", one_sequence)
on_result("text_guided_scores", "in_the_dtype_of_q", lambda y, q, *_: y.to(q.dtype))


def turned_the_other_way(q, k, cu_q, cu_k, scale, cos, sin):
    return q, k, cu_q, cu_k, scale, cos, -sin


def neighbours_paired(q, k, cu_q, cu_k, scale, cos, sin):
    k, cos, sin = (x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in (k, cos, sin))
    return q.unflatten(-1, (-1, 2)).mT.flatten(-2), k, cu_q, cu_k, scale, cos, sin


def one_half_for_both(q, k, cu_q, cu_k, scale, cos, sin):
    cos, sin = (x[:, : x.shape[1] // 2].repeat(1, 2) for x in (cos, sin))
    return q, k, cu_q, cu_k, scale, cos, sin


def previous_row(q, k, cu_q, cu_k, scale, cos, sin):
    return q, k, cu_q, cu_k, scale, cos.roll(1, 0), sin.roll(1, 0)


for _slip in (turned_the_other_way, neighbours_paired, one_half_for_both, previous_row):
    on_changed("text_guided_scores_rotary", _slip.__name__, _slip)


def one_further(x, index):
    return x, (index + 1) % max(len(x), 1)


on_changed("gather_tokens", "one_row_further", one_further)
on_result(
    "gather_tokens",
    "last_channel_missing",
    lambda y, *_: y * (torch.arange(y.shape[1]) + 1 < y.shape[1]),
)
on_result("gather_tokens", "transposed_memory", lambda y, *_: y.T.contiguous().view(y.shape))


def others_not_gathered(y, x, index, more, cu):
    return [y[0], *(t[: len(index)] for t in more), *y[1 + len(more) :]]


def bounds_left(y, x, index, more, cu):
    return y if cu is None else [*y[:-1], cu.int()]


def bounds_above(y, x, index, more, cu):
    return y if cu is None else [*y[:-1], (index[None] <= cu[:, None]).sum(1).int()]


def bounds_in_int64(y, x, index, more, cu):
    return y if cu is None else [*y[:-1], y[-1].long()]


for _slip in (others_not_gathered, bounds_left, bounds_above, bounds_in_int64):
    on_result("gather_many", _slip.__name__, _slip)


@wrong("gather_rms_norm", "mean_taken_off", centre=True)
@wrong("gather_rms_norm", "eps_outside_of_the_root", outside=True)
@wrong("gather_rms_norm", "squares_in_the_dtype_of_x", narrow=True)
@wrong("gather_rms_norm", "padded_mean", padded=True)
def normalise(x, index, weight, eps, **slip):
    rows = x[index]
    wide = rows if slip.get("narrow") or x.dtype == torch.float64 else rows.float()
    wide = wide - wide.mean(-1, keepdim=True) if slip.get("centre") else wide
    square = wide.square().mean(-1, keepdim=True)
    if slip.get("padded"):
        square = square * x.shape[1] / (1 << (x.shape[1] - 1).bit_length())
    unit = wide / (square.sqrt() + eps if slip.get("outside") else (square + eps).sqrt())
    return rows, unit.to(x.dtype) * weight


@wrong("rms_norm_backward", "radius_kept", along=0)
@wrong("rms_norm_backward", "padded_mean", padded=True)
@wrong("rms_norm_backward", "rows_not_added", direct=0)
@wrong("rms_norm_backward", "weight_left_out", weighted=False)
@wrong("rms_norm_backward", "weight_gets_rows", of_rows=True)
def normalise_backward(grad_rows, grad, rows, weight, eps, **slip):
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    wide, grad = rows.to(dtype), grad.to(dtype)
    share = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = wide * share
    of_weight = (grad * (wide if slip.get("of_rows") else unit.to(rows.dtype))).sum(0)
    grad = grad * weight.to(dtype) if slip.get("weighted", True) else grad
    along = (grad * unit).mean(-1, keepdim=True) * slip.get("along", 1)
    if slip.get("padded"):
        along = along * rows.shape[1] / (1 << (rows.shape[1] - 1).bit_length())
    own = share * (grad - unit * along) + slip.get("direct", 1) * grad_rows.to(dtype)
    return own.to(rows.dtype), of_weight.to(weight.dtype)


@wrong("gather_tokens_backward", "last_gradient_wins", add=False)
@wrong("gather_tokens_backward", "adds_in_the_dtype_of_grad", add=True)
def scatter(grad, index, num_rows, add):
    rows = grad.new_zeros(num_rows, grad.shape[1])
    for row, at in zip(grad, index.tolist(), strict=True):
        rows[at] = rows[at] + row if add else row
    return rows
