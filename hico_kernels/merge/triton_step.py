"""A merge step of a ViT block in one launch: matching, choice of the r best pairs, weighted means.

A program has an image and some of its blocks of columns. It matches the image's tokens by itself,
since no program could wait for another: with many images that costs nothing, as one program has
all columns; with few it is what idle multiprocessors do anyway. What is known of each pair of
tokens 2h and 2h + 1 stays in registers, a number for each h, and nothing is read that this launch
writes.

T tokens behind the `front` ones, sides a (even) and b (odd) as in triton_match.py, of which CLASS
and DISTILL (0 or 1) never merge; L is a power of two, at least the tokens of side a.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import architecture

TOKENS = 1024  # at most: a number for each pair, [16, L] at once in registers
WIDTH = 128  # at most: a row of the metric is normalised in registers
_PROGRAMS = 128  # about the multiprocessors of a GPU: 108 on an A100, 132 on an H200


@triton.jit
def metric_tile(metric, token, known, width, m_t, m_d, part, BD: tl.constexpr):
    """BD columns of rows of the metric, from column `part` on: [len(token), BD] float32."""
    d = part + tl.arange(0, BD)
    at = token.to(tl.int64)[:, None] * m_t + d.to(tl.int64)[None, :] * m_d
    wanted = known[:, None] & (d < width)[None, :]
    return tl.load(metric + at, mask=wanted, other=0).to(tl.float32)


@triton.jit
def lengths(metric, token, known, width, m_t, m_d, BD: tl.constexpr, PARTS: tl.constexpr):
    """Of rows of the metric."""
    square = known.to(tl.float32) * 0
    for part in tl.static_range(PARTS):
        rows = metric_tile(metric, token, known, width, m_t, m_d, part * BD, BD)
        square += tl.sum(rows * rows, axis=1)
    return tl.sqrt_rn(square)[:, None]


@triton.jit
def divided(rows, length):
    """Rows at length 1; a zero row stays zero, and NaN spreads over no more than its row."""
    return tl.where(length > 0, tl.div_rn(rows, tl.where(length > 0, length, 1)), 0 * rows)


@triton.jit
def best_partners(
    metric, t, width, m_t, m_d,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of each token 2h the largest product with a token 2j + 1, and its first j: [L] both."""
    count_a, count_b = t - t // 2, t // 2
    tile = tl.arange(0, L // BM)
    best = tl.full((L // BM, BM), float("-inf"), tl.float32)
    into = tl.zeros((L // BM, BM), tl.int32)
    for first_a in range(0, count_a, BM):
        h = first_a + tl.arange(0, BM)
        length_a = lengths(metric, 2 * h, h < count_a, width, m_t, m_d, BD, PARTS)
        most = tl.full((BM,), float("-inf"), tl.float32)
        place = tl.zeros((BM,), tl.int32) + DISTILL
        for first_b in range(0, count_b, BN):
            j = first_b + tl.arange(0, BN)
            length_b = lengths(metric, 2 * j + 1, j < count_b, width, m_t, m_d, BD, PARTS)
            product = tl.zeros((BM, BN), tl.float32)
            for part in tl.static_range(PARTS):
                a = metric_tile(metric, 2 * h, h < count_a, width, m_t, m_d, part * BD, BD)
                b = metric_tile(metric, 2 * j + 1, j < count_b, width, m_t, m_d, part * BD, BD)
                a, b = divided(a, length_a), divided(b, length_b)
                product = tl.dot(a, tl.trans(b), product, input_precision="tf32x3")
            valid = ((j >= DISTILL) & (j < count_b))[None, :] & (product == product)
            value, where = tl.max(
                tl.where(valid, product, float("-inf")), axis=1, return_indices=True
            )  # the first of equal ones
            better = value > most
            most = tl.where(better, value, most)
            place = tl.where(better, first_b + where, place)
        mine = (tile == first_a // BM)[:, None]
        best = tl.where(mine, most[None, :], best)
        into = tl.where(mine, place[None, :], into)
    return tl.reshape(best, (L,)), tl.reshape(into, (L,))


@triton.jit
def best_pairs(best, t, r, CLASS: tl.constexpr, SORTED: tl.constexpr, L: tl.constexpr):
    """Of each token 2h, 1 if it is among the r with the largest `best`, the first of equal ones;
    and its place: SORTED, how many are better, else how many among the r have a smaller h or its.
    """
    h = tl.arange(0, L)
    key = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)  # -0 is 0
    key = key ^ ((key >> 31) & 0x7FFFFFFF)  # rises with `best`
    key = tl.where((h >= CLASS) & (h < t - t // 2), key, -2147483648)
    if SORTED:
        place = tl.zeros((L,), tl.int32)
        table = tl.reshape(key, (L // 16, 16))
        row, column = tl.arange(0, L // 16), tl.arange(0, 16)
        for first in range(0, t - t // 2, 16):
            other = tl.sum(tl.where((row == first // 16)[:, None], table, 0), axis=0)
            earlier = (first + column)[None, :] < h[:, None]
            ahead = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & earlier)
            place += tl.sum(ahead.to(tl.int32), axis=1)
        gone = (place < r).to(tl.int32)
    else:
        one = tl.full((), 1, tl.int32)
        threshold = one << 31  # the smallest key: its bits are found from the top, by counting
        for bit in range(0, 32):
            candidate = threshold ^ (one << (31 - bit))
            count = tl.sum((key >= candidate).to(tl.int32), axis=0)
            threshold = tl.where(count >= r, candidate, threshold)
        above = (key > threshold).to(tl.int32)
        equal = (key == threshold).to(tl.int32)
        left = r - tl.sum(above, axis=0)
        gone = above + tl.where(tl.cumsum(equal, axis=0) <= left, equal, 0)
        place = tl.cumsum(gone, axis=0)
    return gone, place


@triton.jit
def weigh(sizes, token, known, size_t, WEIGHTED: tl.constexpr):
    """How often a token counts; without sizes once."""
    weight = known.to(tl.int32)
    if WEIGHTED:
        weight = tl.load(sizes + token.to(tl.int64) * size_t, mask=known, other=0)
        if not sizes.dtype.element_ty.is_floating():
            weight = weight.to(tl.int64)
    return weight


@triton.jit
def write_mean(sums, total, out, to, known, column, c):
    """sums / total, zeros where that is 0."""
    by = total.to(tl.float32)[:, None]
    mean = tl.where(by != 0, tl.div_rn(sums, tl.where(by != 0, by, 1)), 0)
    at = to.to(tl.int64)[:, None] * c + column[None, :]
    tl.store(out + at, mean, mask=known[:, None] & (column < c)[None, :])


@triton.jit
def load_rows(x, token, known, column, c, x_t, x_c):
    """float32 rows of some columns."""
    at = token.to(tl.int64)[:, None] * x_t + (column.to(tl.int64) * x_c)[None, :]
    return tl.load(x + at, mask=known[:, None] & (column < c)[None, :], other=0).to(tl.float32)


@triton.jit
def merge_columns(
    x, sizes, out, merged, assignment, places, into, gone, place, t, r, front, c, first_column,
    x_t, x_c, size_t,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, SPATIAL: tl.constexpr, SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr, NOTES: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Some columns of all tokens of an image; NOTES: with the first ones, its sizes, assignment and
    places.

    First those that are what they were: the front ones, and those of side a that stay. Then side
    b, each with what merges into it: mostly nothing, and of members the next one at a time.
    """
    column = first_column + tl.arange(0, BC)
    k, pair = tl.arange(0, BK), tl.arange(0, L)
    count_a, count_b = t - t // 2, t // 2
    notes = NOTES & (first_column + k == k)
    for first in range(0, front, BK):
        token = first + k
        known = token < front
        weight = weigh(sizes, token, known, size_t, WEIGHTED)
        rows = load_rows(x, token, known, column, c, x_t, x_c) * weight.to(tl.float32)[:, None]
        write_mean(rows, weight, out, token, known, column, c)
        tl.store(merged + token, weight, mask=known & notes)
        tl.store(assignment + token, token, mask=known & notes)
        tl.store(places + token, token, mask=known & notes)
    for first in range(0, count_a, BK):
        h = first + k
        near = tl.minimum(h, L - 1)
        known = (h < count_a) & (tl.gather(gone, near, 0) == 0)
        before = tl.gather(place, near, 0)
        if SORTED:
            to = front + before - r
        elif SPATIAL:
            to = front + 2 * h - before
        else:
            to = front + h - before + tl.where(h > 0, DISTILL, 0)
        token = front + 2 * h
        weight = weigh(sizes, token, known, size_t, WEIGHTED)
        rows = load_rows(x, token, known, column, c, x_t, x_c) * weight.to(tl.float32)[:, None]
        write_mean(rows, weight, out, to, known, column, c)
        tl.store(merged + to, weight, mask=known & notes)
        tl.store(assignment + token, to, mask=known & notes)
        tl.store(places + to, token, mask=known & notes)
    for first in range(0, count_b, BK):
        h = first + k
        known = h < count_b
        if SPATIAL:
            to = front + 2 * h + 1 - tl.gather(place, tl.minimum(h, L - 1), 0)
        else:
            to = front + count_a - r + h
            if DISTILL:
                to = tl.where(h == 0, front + 1, to)
        token = front + 2 * h + 1
        total = weigh(sizes, token, known, size_t, WEIGHTED)
        sums = load_rows(x, token, known, column, c, x_t, x_c) * total.to(tl.float32)[:, None]
        tl.store(assignment + token, to, mask=known & notes)
        tl.store(places + to, token, mask=known & notes)
        member = (into[None, :] == h[:, None]) & (gone > 0)[None, :]
        following = tl.min(tl.where(member, pair[None, :], L), axis=1)
        while tl.min(following, axis=0) < L:
            there = following < L
            token = front + 2 * following
            weight = weigh(sizes, token, there, size_t, WEIGHTED)
            rows = load_rows(x, token, there, column, c, x_t, x_c)
            sums += rows * weight.to(tl.float32)[:, None]
            total += weight
            tl.store(assignment + token, to, mask=there & notes)
            later = member & (pair[None, :] > following[:, None])
            following = tl.min(tl.where(later, pair[None, :], L), axis=1)
        write_mean(sums, total, out, to, known, column, c)
        tl.store(merged + to, total, mask=known & notes)


@triton.jit(do_not_specialize=["t", "r", "front", "tokens", "keep", "size_n", "size_t", "programs"])
def merge_step_kernel(
    metric, x, other, sizes, out, out_other, merged, assignment, places,
    t, r, front, tokens, keep, width, c, c_other, programs,
    m_n, m_t, m_d, x_n, x_t, x_c, o_n, o_t, o_c, size_n, size_t,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, SPATIAL: tl.constexpr, SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr, OTHER: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`programs` of them have an image; each takes every so many-th block of columns."""
    n = (tl.program_id(0) // programs).to(tl.int64)
    own = tl.program_id(0) % programs
    best, into = best_partners(
        metric + n * m_n + front * m_t, t, width, m_t, m_d, CLASS, DISTILL, L, BM, BN, BD, PARTS
    )
    gone, place = best_pairs(best, t, r, CLASS, SORTED, L)
    for block in range(own, tl.maximum(tl.cdiv(c, BC), 1), programs):  # one writes the sizes
        merge_columns(
            x + n * x_n, sizes + n * size_n, out + n * keep * c, merged + n * keep,
            assignment + n * tokens, places + n * keep, into, gone, place, t, r, front, c,
            block * BC, x_t, x_c, size_t,
            CLASS, DISTILL, SPATIAL, SORTED, WEIGHTED, True, L, BK, BC,
        )  # fmt: skip
    if OTHER:
        for block in range(own, tl.cdiv(c_other, BC), programs):
            merge_columns(
                other + n * o_n, sizes + n * size_n, out_other + n * keep * c_other,
                merged + n * keep, assignment + n * tokens, places + n * keep, into, gone, place,
                t, r, front, c_other, block * BC, o_t, o_c, size_t,
                CLASS, DISTILL, SPATIAL, SORTED, WEIGHTED, False, L, BK, BC,
            )  # fmt: skip


def fits(metric: Tensor, front: int) -> bool:
    """Whether one launch does it."""
    return metric.shape[1] - front <= TOKENS and metric.shape[2] <= WIDTH


def merge_step(
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
    """Tokens, sizes, assignment, places and tokens of other; see `merge_similar` of triton.py."""
    n, tokens, c = x.shape
    t, keep = tokens - front, tokens - r
    out = x.new_empty(n, keep, c)
    merged = x.new_empty(n, keep, dtype=torch.int32 if sizes is None else sizes.dtype)
    assignment = x.new_empty(n, tokens, dtype=torch.int32)
    places = x.new_empty(n, keep, dtype=torch.int32)
    second = x.new_empty(0) if other is None else other.new_empty(n, keep, other.shape[2])
    given, weights = x if other is None else other, assignment if sizes is None else sizes
    columns = max(c, given.shape[2], 16)
    block = min(triton.next_power_of_2(columns), 512)
    while block > 128 and n * triton.cdiv(columns, block) < _PROGRAMS:
        block //= 2
    side = max(triton.next_power_of_2(t - t // 2), 64)
    programs = max(min(_PROGRAMS // max(n, 1), triton.cdiv(columns, block)), 1)
    parts = triton.cdiv(max(metric.shape[2], 1), 64)
    columns_b = 64 if parts == 1 and architecture() >= 90 else 32  # else registers spill
    merge_step_kernel[(n * programs,)](
        metric, x, given, weights, out, second, merged, assignment, places,
        t, r, front, tokens, keep, metric.shape[2], c, given.shape[2], programs,
        *metric.stride(), *x.stride(), *given.stride(), *weights.stride(),
        CLASS=int(class_token), DISTILL=int(distill_token), SPATIAL=spatial,
        SORTED=not (spatial or class_token), WEIGHTED=sizes is not None, OTHER=other is not None,
        L=side, BM=64, BN=columns_b, BD=64, PARTS=parts, BK=16, BC=block,
        num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, merged, assignment, places, second
