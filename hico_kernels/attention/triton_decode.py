"""ragged_decode_attention: one query per sequence over a cache in which every sequence has its own
length.

Programs share out the valid entries of a sequence and key head evenly, whatever the length is: how
many there are follows from shapes, so that a graph may hold the launch. The query heads of a group
are the columns of each product, so an entry of the cache is read once for all of them. A second
launch adds up the parts in a fixed order. Weights are multiplied with the cache in two parts of its
dtype: the arithmetic is free here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.attention.triton_tiles import (
    LOG2E,
    LOWEST,
    load_columns,
    numbers_in,
    place_of,
    product,
    step_of,
    strides_in,
)
from hico_kernels.triton_tiles import dot, interpreted

_PROGRAMS = 512  # about four for each multiprocessor of a large GPU
_SPLITS = 64  # of one sequence at most, so that adding up stays short


@triton.jit
def length_of(lengths_ptr, b, step, longest):
    """Valid entries, cut to those that there are."""
    length = tl.load(lengths_ptr + tl.cast(b, tl.int64) * step).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), longest).to(tl.int32)


@triton.jit(do_not_specialize=["longest", "splits"])
def part_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, top_ptr, sum_ptr, longest, splits, scale,
    q_batch, q_head, q_column, k_batch, k_row, k_head, k_column, v_batch, v_row, v_head, v_column,
    lengths_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A share of the entries: top, sum of weights and their sum of values, for each head. Strides
    count STEP numbers, those of columns one.
    """
    q_batch, q_head = numbers_in(q_batch, STEP), numbers_in(q_head, STEP)
    k_batch, v_batch = numbers_in(k_batch, STEP), numbers_in(v_batch, STEP)
    k_row, k_head = numbers_in(k_row, STEP), numbers_in(k_head, STEP)
    v_row, v_head = numbers_in(v_row, STEP), numbers_in(v_head, STEP)
    SHARE: tl.constexpr = H // G
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    split = tl.program_id(2)
    length = length_of(lengths_ptr, b, lengths_step, longest)
    share = tl.cdiv(tl.cdiv(length, splits), N) * N
    begin = split * share
    end = tl.minimum(begin + share, length)
    m = tl.arange(0, M)
    heads = m < SHARE
    start = tl.zeros([], tl.int64)
    q_at = place_of(b, tl.zeros([M], tl.int32), q_batch, 0, 0)
    q_at += (g * SHARE + m).to(tl.int64) * q_head
    q = load_columns(q_ptr, q_at, heads, 0, q_column, D, PART)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([BLOCK_D, M], tl.float32)
    for first in range(begin, end, N):
        j = first + tl.arange(0, N)
        inside = j < end
        k_at = place_of(start, j, k_row, g, k_head) + b * k_batch
        v_at = place_of(start, j, v_row, g, v_head) + b * v_batch
        k = load_columns(k_ptr, k_at, inside, 0, k_column, D, PART)
        logits = product(
            k, k_ptr, k_at, inside, k_column, q, q_ptr, q_at, heads, q_column, D, BLOCK_D, PART
        )
        logits = tl.where(inside[:, None], logits * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        weights = tl.exp2(logits - higher[None, :])
        shrunk = tl.exp2(top - higher)
        v = tl.trans(load_columns(v_ptr, v_at, inside, 0, v_column, D, BLOCK_D))
        rounded = weights.to(v.dtype)
        out = dot(v, rounded, out * shrunk[None, :])
        if v.dtype != tl.float32:
            out = dot(v, (weights - rounded.to(tl.float32)).to(v.dtype), out)
        total = total * shrunk + tl.sum(weights, 0)
        top = higher
    place = (b * splits + split) * H + g * SHARE + m
    tl.store(top_ptr + place, top, mask=heads)
    tl.store(sum_ptr + place, total, mask=heads)
    d = tl.arange(0, BLOCK_D)
    at = place[None, :] * D + d[:, None]
    tl.store(out_ptr + at, out, mask=heads[None, :] & (d < D)[:, None])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    part_ptr, top_ptr, sum_ptr, out_ptr, splits,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The output of a head from its parts; zeros where a sequence has no entry."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    place = (b * splits + s) * H + h
    top = tl.load(top_ptr + place, mask=s < splits, other=LOWEST)
    total = tl.load(sum_ptr + place, mask=s < splits, other=0.0)
    wanted = (s < splits)[:, None] & (d < D)[None, :]
    parts = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=wanted, other=0.0)
    factor = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * factor, 0)
    out = tl.sum(parts * factor[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (b * H + h) * D + d, out, mask=d < D)


def tiles_of(q: Tensor, step: int) -> dict[str, int]:
    """Entries N of a tile, width, and the part of it that is multiplied at once."""
    width = max(triton.next_power_of_2(q.shape[2]), 16)
    if q.dtype == torch.float32:  # no tensor cores: operands lie in registers
        part, n, warps, stages = min(width, 32), 64 if interpreted() else 16, 8, 1
    else:
        odd = q.shape[2] % 16 > 0 and step == 1  # an address for every value
        part, n, stages = width, 64 if width > 128 or odd else 128, 2
        warps = 4 if width <= 64 else 8
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"BLOCK_D": width, "PART": part, "N": n, **options}


def ragged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_lengths: Tensor, scale: float
) -> Tensor:
    """q [B, H, D], caches [B, L, G, D], kv_lengths [B] -> [B, H, D]."""
    (sequences, heads, width), (_, longest, groups, _) = q.shape, k_cache.shape
    out = q.new_empty(q.shape)
    if not out.numel():
        return out
    step = step_of(q, k_cache, v_cache)
    tiles = tiles_of(q, step) | {"STEP": step}
    wanted = min(triton.cdiv(longest, tiles["N"]), _SPLITS, _PROGRAMS // (sequences * groups))
    splits = max(wanted, 1)
    parts = q.new_empty(sequences, splits, heads, width, dtype=torch.float32)
    tops, sums = q.new_empty(2, sequences, splits, heads, dtype=torch.float32)
    part_kernel[(sequences, groups, splits)](
        q, k_cache, v_cache, kv_lengths, parts, tops, sums, longest, splits, scale * LOG2E,
        *strides_in(step, q, k_cache, v_cache), kv_lengths.stride(0),
        H=heads, G=groups, D=width, M=max(triton.next_power_of_2(heads // groups), 16), **tiles,
    )  # fmt: skip
    combine_kernel[(sequences, heads)](
        parts, tops, sums, out, splits,
        H=heads, D=width, BLOCK_D=tiles["BLOCK_D"], SPLITS=triton.next_power_of_2(splits),
        enable_fp_fusion=True,
    )  # fmt: skip
    return out
