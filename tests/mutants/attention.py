"""Wrong attention."""

import torch

from hico_kernels.checks import segments
from mutants.slips import on_changed, on_result, truncated, wrong


def bottom_right(rows, keys, further=0):
    """Which keys a query sees: the last query all, or `further` more than that."""
    last = torch.arange(rows)[:, None] + keys - rows + further
    return torch.arange(keys) <= last


def top_left(rows, keys):
    return torch.arange(keys) <= torch.arange(rows)[:, None]


def everything(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool)


@wrong("ragged_attention", "drops_the_mask", seen=everything)
@wrong("ragged_attention", "causal_from_the_top_left", seen=top_left)
@wrong("ragged_attention", "sees_one_key_too_many", seen=lambda r, s: bottom_right(r, s, 1))
@wrong("ragged_attention", "does_not_see_itself", seen=lambda r, s: bottom_right(r, s, -1))
@wrong("ragged_attention", "loses_the_tail_of_a_tile", tail=16)
@wrong("ragged_attention", "weights_in_bfloat16", rounded=torch.bfloat16)
@wrong("ragged_attention", "interleaved_heads", interleaved=True)
@wrong("ragged_attention", "masked_rows_give_a_mean", masked_mean=True)
@wrong("ragged_attention", "bias_is_scaled_too", scaled_bias=True)
@wrong("ragged_attention", "values_of_the_first_sequence", first_values=True)
def attend(q, k, v, cu_q, cu_k, _max_q, _max_k, causal, scale, bias, seen=bottom_right, **slip):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=wide)
    ends = segments("q", cu_q, len(q)), segments("k", cu_k, len(k))
    for (q0, q1), (k0, k1) in zip(*ends, strict=True):
        rows, keys = q1 - q0, k1 - k0
        if not rows or not keys:
            continue
        fold = q.shape[1] // k.shape[1]
        values = v[:keys] if slip.get("first_values") else v[k0:k1]
        one, two, three = (x.to(wide).transpose(0, 1) for x in (q[q0:q1], k[k0:k1], values))
        if slip.get("interleaved"):
            two, three = two.repeat(fold, 1, 1), three.repeat(fold, 1, 1)
        else:
            two, three = two.repeat_interleave(fold, 0), three.repeat_interleave(fold, 0)
        logits = one @ two.mT * scale
        if bias is not None:
            logits = logits + bias[k0:k1] * (scale if slip.get("scaled_bias") else 1)
        if causal:
            logits = logits.masked_fill(~seen(rows, keys), -torch.inf)
        if tail := slip.get("tail"):
            logits[..., max(keys // tail, 1) * tail :] = -torch.inf
        lse[:, q0:q1] = logits.logsumexp(dim=-1)
        weights = (logits - lse[:, q0:q1, None]).exp().to(slip.get("rounded", wide)).to(wide)
        hidden = lse[:, q0:q1].isneginf()
        weights[hidden] = 1 / keys if slip.get("masked_mean") else 0
        out[q0:q1] = (weights @ three).transpose(0, 1).to(q.dtype)
    return out, lse


def one_sequence(q, k, v, cu_q, cu_k, _max_q, _max_k, *rest):
    ends = [0, -1] if len(cu_q) > 1 else [0]
    return q, k, v, cu_q[ends], cu_k[ends], len(q), len(k), *rest


def nan_where_masked(y, *_):
    return y[0].masked_fill(y[1].T.isneginf()[..., None], torch.nan), y[1]


on_changed("ragged_attention", "forgets_scale", lambda *args: (*args[:8], 1.0, args[9]))
on_changed("ragged_attention", "forgets_key_bias", lambda *args: (*args[:9], None))
on_changed("ragged_attention", "one_sequence_of_all", one_sequence)
on_result("ragged_attention", "nan_in_a_masked_row", nan_where_masked)
on_result(
    "ragged_attention",
    "lse_of_a_masked_row_is_zero",
    lambda y, *_: (y[0], y[1].masked_fill(y[1].isneginf(), 0)),
)
on_result("ragged_attention", "lse_in_base_two", lambda y, *_: (y[0], y[1] * 1.4426950408889634))
on_result("ragged_attention", "rounds_twice", lambda y, *_: (y[0].bfloat16().to(y[0].dtype), y[1]))

truncated("ragged_attention")

# --- gradients ------------------------------------------------------------------------------------

BACKWARD = "ragged_attention_backward"


def without_out(grad, q, k, v, out, *rest):
    return grad, q, k, v, torch.zeros_like(out), *rest


def unscaled_keys(y, *args):
    return y[0], y[1] / args[11], y[2]


def mean_over_group(y, _grad, q, k, *_):
    return y[0], y[1] / (q.shape[1] // k.shape[1]), y[2]


on_changed(BACKWARD, "forgets_the_row_sum", without_out)
on_changed(BACKWARD, "drops_the_mask", lambda *args: (*args[:10], False, *args[11:]))
on_changed(BACKWARD, "forgets_key_bias", lambda *args: (*args[:12], None))
on_result(BACKWARD, "forgets_scale_for_keys", unscaled_keys)
on_result(BACKWARD, "mean_over_the_group", mean_over_group)
on_result(BACKWARD, "keys_and_values_swapped", lambda y, *_: (y[0], y[2], y[1]))

# --- decoding -------------------------------------------------------------------------------------

DECODE = "ragged_decode_attention"


def fewer(q, k, v, lengths, scale):
    return q, k, v, (lengths - 1).clamp(min=0), scale


def more(q, k, v, lengths, scale):
    return q, k, v, (lengths + 1).clamp(max=k.shape[1]), scale


def whole_cache(q, k, v, lengths, scale):
    return q, k.nan_to_num(0), v.nan_to_num(0), torch.full_like(lengths, k.shape[1]), scale


def neighbours_cache(q, k, v, lengths, scale):
    return q, k.roll(1, 0).nan_to_num(0), v.roll(1, 0).nan_to_num(0), lengths, scale


def longest_for_all(q, k, v, lengths, scale):
    longest = lengths.max() if len(lengths) else 0
    return q, k.nan_to_num(0), v.nan_to_num(0), torch.zeros_like(lengths) + longest, scale


on_changed(DECODE, "one_entry_too_few", fewer)
on_changed(DECODE, "one_entry_too_many", more)
on_changed(DECODE, "reads_the_whole_cache", whole_cache)
on_changed(DECODE, "one_length_for_all", longest_for_all)
on_changed(DECODE, "cache_of_the_neighbour", neighbours_cache)
on_changed(DECODE, "forgets_scale", lambda *args: (*args[:4], 1.0))
