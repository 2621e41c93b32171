"""ragged_attention: softmax(scale * q k^T + bias) v within every sequence of a packed batch.

A program has a tile of query rows of one head, goes over the keys that they may see and keeps a
running maximum, sum and output (FlashAttention-2, arXiv 2307.08691, algorithm 1). Tiles are found
from cu_seqlens on the device: one launch, no host wait, and a short sequence costs no more than its
tiles. Tiles at the end come first, since under a causal mask they are the longest. Weights are
rounded to the dtype of v for its tensor cores; sums are float32.
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
from hico_kernels.triton_tiles import architecture, bounds, dot, interpreted, sequence_at, slots

_OLD = triton.__version__.startswith("3.6.")  # its ptxas is the one of CUDA 12.8


@triton.jit
def attend(
    q, top, total, out, first, i, unseen, k_start, keys,
    q_ptr, k_ptr, v_ptr, bias_ptr, q_at, q_wanted, head, scale,
    q_column, k_row, k_head, k_column, v_row, v_head, v_column, bias_step,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The next N keys: -> top, total, out. MASKED: not every row sees all of them.

    unseen: the first key that row 0 of the sequence does not see.
    """
    j = first + tl.arange(0, N)
    inside = j < keys
    k_at = place_of(k_start, j, k_row, head, k_head)
    k = load_columns(k_ptr, k_at, inside, 0, k_column, D, PART)
    logits = product(
        q, q_ptr, q_at, q_wanted, q_column, k, k_ptr, k_at, inside, k_column, D, BLOCK_D, PART
    )
    logits *= scale
    if BIAS:
        bias = tl.load(bias_ptr + (k_start + j) * bias_step, mask=inside, other=0)
        logits += (bias.to(tl.float32) * 1.4426950408889634)[None, :]
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] < (i + unseen)[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    shrunk = tl.exp2(top - higher)
    v_at = place_of(k_start, j, v_row, head, v_head)
    v = load_columns(v_ptr, v_at, inside, 0, v_column, D, BLOCK_D)
    out = dot(weights.to(v.dtype), v, out * shrunk[:, None])
    return higher, total * shrunk + tl.sum(weights, 1), out


@triton.jit(do_not_specialize=["sequences", "rows", "all_keys"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    sequences, rows, all_keys, scale,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    bias_step, cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """M query rows of a head of a sequence. Strides of rows and heads count STEP numbers."""
    q_row, q_head = numbers_in(q_row, STEP), numbers_in(q_head, STEP)
    k_row, k_head = numbers_in(k_row, STEP), numbers_in(k_head, STEP)
    v_row, v_head = numbers_in(v_row, STEP), numbers_in(v_head, STEP)
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    g = h // (H // G)
    b, q_start, queries, tile = sequence_at(slot, cu_q_ptr, cu_q_step, sequences, rows, M)
    k_start, keys = bounds(cu_k_ptr, cu_k_step, b, all_keys)
    if tile * M < queries:
        i = tile * M + tl.arange(0, M)
        wanted = i < queries
        q_at = place_of(q_start, i, q_row, h, q_head)
        q = load_columns(q_ptr, q_at, wanted, 0, q_column, D, PART)
        top = tl.full([M], LOWEST, tl.float32)
        total = tl.zeros([M], tl.float32)
        out = tl.zeros([M, BLOCK_D], tl.float32)
        unseen = keys - queries + 1
        whole = keys  # keys that all rows of the tile see, and that any of them sees
        some = keys
        if CAUSAL:
            whole = tl.minimum(tl.maximum(tile * M + unseen, 0), keys)
            some = tl.minimum(tl.maximum(tile * M + M - 1 + unseen, 0), keys)
        whole = whole // N * N
        for first in range(0, whole, N):
            top, total, out = attend(
                q, top, total, out, first, i, unseen, k_start, keys,
                q_ptr, k_ptr, v_ptr, bias_ptr, q_at, wanted, g, scale,
                q_column, k_row, k_head, k_column, v_row, v_head, v_column, bias_step,
                D, BLOCK_D, PART, N, CAUSAL, BIAS, False,
            )  # fmt: skip
        for first in range(whole, some, N):
            top, total, out = attend(
                q, top, total, out, first, i, unseen, k_start, keys,
                q_ptr, k_ptr, v_ptr, bias_ptr, q_at, wanted, g, scale,
                q_column, k_row, k_head, k_column, v_row, v_head, v_column, bias_step,
                D, BLOCK_D, PART, N, CAUSAL, BIAS, True,
            )  # fmt: skip
        blind = total == 0.0
        out = out / tl.where(blind, 1.0, total)[:, None]
        lse = tl.where(blind, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
        d = tl.arange(0, BLOCK_D)
        at = ((q_start + i) * H + h)[:, None] * D + d[None, :]
        tl.store(out_ptr + at, out, mask=wanted[:, None] & (d < D)[None, :])
        tl.store(lse_ptr + tl.cast(h, tl.int64) * rows + q_start + i, lse, mask=wanted)


def tiles_of(q: Tensor, step: int) -> dict[str, int]:
    """Rows M and keys N of a tile, width, and the part of it that is multiplied at once."""
    width = max(triton.next_power_of_2(q.shape[2]), 16)
    older = architecture() < 90
    odd = q.shape[2] % 16 > 0 and step == 1  # an address for every value
    if q.dtype == torch.float32:
        m, n, warps, stages = (128, 64, 4, 1) if interpreted() else (32, 16, 4, 1)
    elif width <= 64 and not odd:
        m, n, warps, stages = 128, 64, 8, 3
    elif width <= 128:
        m, n, warps, stages = (64, 32, 8, 3) if older or odd else (128, 64, 8, 3)
    else:
        m, n, warps, stages = 64, 32 if older or odd else 64, 8, 2
    part = 16 if q.dtype == torch.float32 else width
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"BLOCK_D": width, "PART": part, "M": m, "N": n, **options}


def registers_of(tiles: dict[str, int], causal: bool, bias: bool) -> int | None:
    """The most that a thread may have, where ptxas left alone stops at what two or three programs
    of a multiprocessor can have and spills values: that much where it then finds a way without,
    else all there are.
    """
    width, generation = tiles["BLOCK_D"], architecture() // 10
    if interpreted():
        return None
    if tiles["PART"] < width:  # float32
        return 255 if width <= 64 and not (causal or bias) else None
    if generation == 8 and width == 128:
        return 255
    if generation >= 10 and width <= 64 and not bias:
        return (128 if _OLD else None) if causal else 255
    return None


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [Sq, H, D], k and v [Sk, G, D] -> out [Sq, H, D], lse [H, Sq]; max_* are not needed."""
    rows, heads, width = q.shape
    sequences = cu_seqlens_q.shape[0] - 1
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    if not rows or not sequences:
        return out, lse
    step = step_of(q, k, v)
    tiles = tiles_of(q, step) | {"STEP": step}
    if most := registers_of(tiles, causal, key_bias is not None):
        tiles["maxnreg"] = most
    forward_kernel[(slots(rows, sequences, tiles["M"]), heads)](
        q, k, v, key_bias, out, lse, cu_seqlens_q, cu_seqlens_k,
        sequences, rows, k.shape[0], scale * LOG2E, *strides_in(step, q, k, v),
        0 if key_bias is None else key_bias.stride(0), cu_seqlens_q.stride(0),
        cu_seqlens_k.stride(0),
        H=heads, G=k.shape[1], D=width, CAUSAL=causal, BIAS=key_bias is not None, **tiles,
    )  # fmt: skip
    return out, lse
