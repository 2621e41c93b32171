"""Triton kernels of matching: all rounds run on the metric of the tokens, in float32.

Programs never read what another program of the same launch writes, and there are no atomics. Where
the CPU sorts, these count: the place of a key is the number of keys before it.

Letters: N clips, t tokens in a round of which r merge, D width of the metric. Side a has the even
tokens, side b the odd ones; CLASS and DISTILL (0 or 1) of them take no part.
"""

import triton
import triton.language as tl

# Not worth a compilation for each value that is 1 or a multiple of 16, as Triton makes otherwise.
COUNTS = ("t", "r", "k", "keep", "rows", "heads", "tokens", "rounds", "offset", "total", "tiles")


@triton.jit
def unit_rows(sums):
    """Rows at length 1; a zero row stays zero, and NaN spreads over no more than its row."""
    length = tl.sqrt_rn(tl.sum(sums * sums, axis=1))[:, None]
    return tl.where(length > 0, tl.div_rn(sums, tl.where(length > 0, length, 1)), 0 * sums)


@triton.jit(do_not_specialize=COUNTS)
def head_sums(
    x, sums, unit, rows, t, width, padded, heads, x_n, x_t, x_c,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x [N, T, heads * width] -> sums over the heads [N, T, D], and their rows at length 1. D is
    `padded`: zeros from `width` on.
    """
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (d < width)[None, :]
    source = x + (row // t * x_n + row % t * x_t)[:, None] + (d.to(tl.int64) * x_c)[None, :]
    total = tl.zeros((BT, BD), tl.float32)
    for _ in range(heads):
        total += tl.load(source, mask=inside, other=0).to(tl.float32)
        source += width * x_c
    to = row[:, None] * padded + d[None, :]
    inside = (row < rows)[:, None] & (d < padded)[None, :]
    tl.store(sums + to, total, mask=inside)
    tl.store(unit + to, unit_rows(total), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def best_match(
    unit, best, into, t, offset, total, width, tiles,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Of each token of side a the largest product with side b, and the first place of it.

    unit [N, t, D], D = width, a multiple of BD; best and into [N, total], of which this round's
    begin at `offset`.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    count_a, count_b = t - t // 2 - CLASS, t // 2 - DISTILL
    d = tl.arange(0, BD)
    clip = unit + n * t * width
    rows = clip + (2 * (i + CLASS)).to(tl.int64)[:, None] * width + d[None, :]
    most = tl.full((BM,), float("-inf"), tl.float32)
    first = tl.zeros((BM,), tl.int32)
    for start in range(0, count_b, BN):
        j = start + tl.arange(0, BN)
        columns = clip + (2 * (j + DISTILL) + 1).to(tl.int64)[None, :] * width + d[:, None]
        product = tl.zeros((BM, BN), tl.float32)
        for at in range(0, width, BD):
            a = tl.load(rows + at, mask=(i < count_a)[:, None], other=0)
            b = tl.load(columns + at, mask=(j < count_b)[None, :], other=0)
            product = tl.dot(a, b, product, input_precision="tf32x3")  # float32 in three products
        valid = (j < count_b)[None, :] & (product == product)
        value, place = tl.max(
            tl.where(valid, product, float("-inf")), axis=1, return_indices=True
        )  # the first of equal ones
        better = value > most
        most = tl.where(better, value, most)
        first = tl.where(better, start + place, first)
    to = n * total + offset + i
    tl.store(best + to, most, mask=i < count_a)
    tl.store(into + to, first, mask=i < count_a)


@triton.jit(do_not_specialize=COUNTS)
def rank(
    keys, ranks, t, r, offset, total, tiles,
    CLASS: tl.constexpr, KEEP_ORDER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of each token of side a, how many come before it when the best go first; equal ones keep
    their order.

    KEEP_ORDER: keys are such ranks, and those that do not merge are counted again in their order.
    keys and ranks as `best` in `best_match`.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    count = t - t // 2 - CLASS
    clip = keys + n * total + offset
    own = tl.load(clip + i, mask=i < count, other=0)
    before = tl.zeros((BM,), tl.int32)
    for start in range(0, count, BN):
        j = start + tl.arange(0, BN)
        key = tl.load(clip + j, mask=j < count, other=0)[None, :]
        earlier = (j < count)[None, :] & (j[None, :] < i[:, None])
        if KEEP_ORDER:
            ahead = earlier & (key >= r)
        else:
            larger = (j < count)[None, :] & (key > own[:, None])
            ahead = larger | (earlier & (key == own[:, None]))
        before += tl.sum(ahead.to(tl.int32), axis=1)
    if KEEP_ORDER:
        before = tl.where(own < r, own, r + before)
    tl.store(ranks + n * total + offset + i, before, mask=i < count)


@triton.jit
def position(token, into, ranks, t, r, known, CLASS: tl.constexpr, DISTILL: tl.constexpr):
    """Where tokens go in a round. into and ranks begin at this round's side a of the clip."""
    stay = t - t // 2 - r
    half, odd = token // 2, token % 2 == 1
    i = half - CLASS
    mine = known & (token % 2 == 0) & (i >= 0)
    side = t - t // 2 - CLASS
    ranked = tl.where(r < side, side, 0)  # if all of side a merges, nobody counted
    place = tl.load(ranks + i, mask=mine & (i < ranked), other=0)
    j = tl.where(odd, half, tl.load(into + i, mask=mine, other=0) + DISTILL)
    target, kept = stay + j, place - r + CLASS + DISTILL
    if DISTILL:
        target = tl.where(j == 0, 1, target)
    out = tl.where(odd | (place < r), target, kept)
    return tl.where((token == 0) & (CLASS > 0), 0, out)


@triton.jit(do_not_specialize=COUNTS)
def compose(
    into, ranks, assignment, tokens, t, r, keep, rounds, total, tiles,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The position [N, T] of every token after all rounds. r: of the first; the others have the
    rule of `merge_tokens`.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    known = token < tokens
    now = token
    clip = n * total
    for _ in range(rounds):
        now = position(now, into + clip, ranks + clip, t, r, known, CLASS, DISTILL)
        clip += t - t // 2 - CLASS
        t -= r
        r = tl.minimum(t - keep, t // 2)
    tl.store(assignment + n * tokens + token, now, mask=known)
