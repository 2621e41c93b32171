"""Triton kernels of merging: sums over the members of every position, and their gradient.

Members are listed by counting (no sort, no atomics), in the order of the tokens: the same bits on
every run. Letters as in triton_match.py; K positions, C channels.
"""

import triton
import triton.language as tl

from hico_kernels.merge.triton_match import COUNTS, position, unit_rows


@triton.jit(do_not_specialize=(*COUNTS, "to_n"))
def list_members(
    assignment, into, ranks, order, first, t, r, keep, offset, total, to_n, to_t, tiles,
    GIVEN: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Tokens by position, then index: order [N, t]. Those of position k begin at first[n, k], first
    [N, keep + 1].

    GIVEN: positions are read from assignment [N, t], and those outside [0, keep) are in no list;
    else they follow from a round of `merge_tokens`.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BE + tl.arange(0, BE)  # tokens, then starts of positions
    is_token = e < t
    clip = n * total + offset
    to = assignment + n * to_n
    if GIVEN:
        own = tl.load(to + e.to(tl.int64) * to_t, mask=is_token, other=0)
    else:
        own = position(e, into + clip, ranks + clip, t, r, is_token, 0, 0)
    own = tl.where(is_token, own, e - t)
    index = tl.where(is_token, e, -1)  # a start comes before all tokens of its position
    before = tl.zeros((BE,), tl.int32)
    for start in range(0, t, BT):
        other = start + tl.arange(0, BT)
        there = other < t
        if GIVEN:
            key = tl.load(to + other.to(tl.int64) * to_t, mask=there, other=0)
        else:
            key = position(other, into + clip, ranks + clip, t, r, there, 0, 0)
        smaller = key[None, :] < own[:, None]
        equal = (key[None, :] == own[:, None]) & (other[None, :] < index[:, None])
        before += tl.sum((there[None, :] & (smaller | equal)).to(tl.int32), axis=1)
    tl.store(order + n * t + before, e, mask=is_token)
    k = e - t
    tl.store(first + n * (keep + 1) + k, before, mask=(k >= 0) & (k <= keep))


@triton.jit
def member_sums(
    x, order, weights, begin, count, column, c, x_t, x_c, weight_t, total,
    WEIGHTED: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums [BK, BC] over the members of BK positions, BR members at a time; and `total` [BK] plus
    their weights.
    """
    sums = tl.zeros((BK, BC), tl.float32)
    channel = (column.to(tl.int64) * x_c)[None, None, :]
    for start in range(0, tl.max(count, axis=0), BR):
        m = start + tl.arange(0, BR)
        member = m[None, :] < count[:, None]
        token = tl.load(order + begin[:, None] + m[None, :], mask=member, other=0).to(tl.int64)
        inside = member[:, :, None] & (column < c)[None, None, :]
        rows = tl.load(x + (token * x_t)[:, :, None] + channel, mask=inside, other=0)
        rows = rows.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + token * weight_t, mask=member, other=0)
            rows *= weight.to(tl.float32)[:, :, None]
            total += tl.sum(weight.to(total.dtype), axis=1)
        sums += tl.sum(rows, axis=1)
    return sums, total


@triton.jit(do_not_specialize=(*COUNTS, "weight_n", "weight_t"))
def mean(
    x, weights, order, first, tokens, sizes, t, keep, c, x_n, x_t, x_c, weight_n, weight_t, tiles,
    WEIGHTED: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean of the members of every position: x [N, t, C] -> tokens [N, keep, C], sizes [N, keep].

    A position whose weights add to 0 gives zeros.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    starts = first + n * (keep + 1) + k
    begin = tl.load(starts, mask=k < keep, other=0)
    count = tl.load(starts + 1, mask=k < keep, other=0) - begin
    if WEIGHTED and weights.dtype.element_ty.is_floating():
        total = tl.zeros((BK,), tl.float32)
    elif WEIGHTED:
        total = tl.zeros((BK,), tl.int64)
    else:
        total = count
    sums, total = member_sums(
        x + n * x_n, order + n * t, weights + n * weight_n, begin, count, column, c, x_t, x_c,
        weight_t, total, WEIGHTED, BK, BR, BC,
    )  # fmt: skip
    by = total.to(tl.float32)[:, None]
    result = tl.where(by != 0, tl.div_rn(sums, tl.where(by != 0, by, 1)), 0)
    row = n * keep + k
    inside = (k < keep)[:, None] & (column < c)[None, :]
    tl.store(tokens + row[:, None] * c + column[None, :], result, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sizes + row, total, mask=k < keep)


@triton.jit(do_not_specialize=COUNTS)
def merge_metric(
    sums, order, first, merged, unit, t, keep, width, tiles,
    BK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The metric after a round: sums [N, t, D] over members -> merged [N, keep, D], and its rows at
    length 1.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    d = tl.arange(0, BD)
    starts = first + n * (keep + 1) + k
    begin = tl.load(starts, mask=k < keep, other=0)
    count = tl.load(starts + 1, mask=k < keep, other=0) - begin
    clip = sums + n * t * width
    result, _ = member_sums(
        clip, order + n * t, clip, begin, count, d, width, width, 1, 0, count, False, BK, BR, BD
    )
    to = (n * keep + k)[:, None] * width + d[None, :]
    inside = (k < keep)[:, None] & (d < width)[None, :]
    tl.store(merged + to, result, mask=inside)
    tl.store(unit + to, unit_rows(result), mask=inside)


@triton.jit(
    do_not_specialize=(*COUNTS, "to_n", "to_t", "total_n", "total_k", "weight_n", "weight_t")
)
def spread_gradient(
    grad, assignment, totals, weights, out, rows, t, k, c,
    grad_n, grad_k, grad_c, to_n, to_t, total_n, total_k, weight_n, weight_t,
    WEIGHTED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A token takes its share of the gradient of its position: grad [N, K, C] -> out [N, T, C]."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = row < rows
    n, i = row // t, row % t
    to = tl.load(assignment + n * to_n + i * to_t, mask=inside, other=-1).to(tl.int64)
    known = (to >= 0) & (to < k)
    total = tl.load(totals + n * total_n + to * total_k, mask=known, other=0).to(tl.float32)
    known &= total != 0
    at = (n * grad_n + to * grad_k)[:, None] + (column.to(tl.int64) * grad_c)[None, :]
    given = tl.load(grad + at, mask=known[:, None] & (column < c)[None, :], other=0)
    share = tl.div_rn(given.to(tl.float32), tl.where(total != 0, total, 1)[:, None])
    if WEIGHTED:
        weight = tl.load(weights + n * weight_n + i * weight_t, mask=inside, other=0)
        share *= weight.to(tl.float32)[:, None]
    where = out + row[:, None] * c + column[None, :]
    tl.store(where, share, mask=inside[:, None] & (column < c)[None, :])
