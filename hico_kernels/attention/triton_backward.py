"""The gradients of ragged_attention, from the weights made again out of the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691, algorithm 2), without atomics: dq by tiles of query rows, dk
and dv by tiles of keys, which go over the query rows of all heads that share a key head.

Like in the forward pass, weights and their gradients are rounded to the dtype of the input for its
tensor cores, and sums are float32. Only dq takes the gradients of logits in two parts: those of a
row add to 0, so what all keys have in common cancels, and the rounding of one part would not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.attention.triton_tiles import (
    LOG2E,
    load_columns,
    numbers_in,
    place_of,
    product,
    step_of,
    strides_in,
)
from hico_kernels.triton_tiles import architecture, bounds, dot, interpreted, sequence_at, slots

# Registers a thread where two programs of 8 warps share a multiprocessor. Left alone, the ptxas of
# Triton 3.6 stops there with a value spilled; told of it, it does without, like the one of 3.9.
_TWO_PROGRAMS = 128


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    grad_ptr, out_ptr, delta_ptr, rows,
    grad_row, grad_head, grad_column, out_row, out_head, out_column,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, M: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """delta[h, i] = grad[i, h] . out[i, h]: what the softmax takes off the gradient of a weight.

    The diagonal of a product, so that it is rounded like grad . v and equal values cancel.
    """
    grad_row, grad_head = numbers_in(grad_row, STEP), numbers_in(grad_head, STEP)
    out_row, out_head = numbers_in(out_row, STEP), numbers_in(out_head, STEP)
    i = tl.program_id(0) * M + tl.arange(0, M)
    wanted = i < rows
    h = tl.program_id(1)
    start = tl.zeros([], tl.int64)
    grad_at = place_of(start, i, grad_row, h, grad_head)
    out_at = place_of(start, i, out_row, h, out_head)
    grad = load_columns(grad_ptr, grad_at, wanted, 0, grad_column, D, PART)
    out = load_columns(out_ptr, out_at, wanted, 0, out_column, D, PART)
    products = product(
        grad, grad_ptr, grad_at, wanted, grad_column, out, out_ptr, out_at, wanted, out_column,
        D, BLOCK_D, PART,
    )  # fmt: skip
    diagonal = tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :]
    delta = tl.sum(tl.where(diagonal, products, 0.0), 1)
    tl.store(delta_ptr + tl.cast(h, tl.int64) * rows + i, delta, mask=wanted)


@triton.jit
def load_lse(lse_ptr, start, i, wanted, head, lse_head, lse_row):
    """In powers of 2; infinite where a row sees nothing, so that its weights are 0."""
    lse = tl.load(
        lse_ptr + tl.cast(head, tl.int64) * lse_head + (start + i) * lse_row, mask=wanted, other=0.0
    )
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def weights_of(logits, lse, bias_ptr, k_start, j, keys, bias_step, scale, BIAS: tl.constexpr):
    """exp2 of the logits of rows of keys j, columns of query rows, over their lse."""
    logits *= scale
    if BIAS:
        bias = tl.load(bias_ptr + (k_start + j) * bias_step, mask=j < keys, other=0)
        logits += (bias.to(tl.float32) * 1.4426950408889634)[:, None]
    return tl.exp2(logits - lse[None, :])


@triton.jit(do_not_specialize=["sequences", "rows", "all_keys"])
def dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    sequences, rows, all_keys, scale, plain_scale,
    grad_row, grad_head, grad_column, q_row, q_head, q_column, k_row, k_head, k_column,
    v_row, v_head, v_column, lse_head, lse_row, bias_step, cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum over keys of weight * (grad . v - delta) * k, for M rows of a head."""
    grad_row, grad_head = numbers_in(grad_row, STEP), numbers_in(grad_head, STEP)
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
        grad_at = place_of(q_start, i, grad_row, h, grad_head)
        q = load_columns(q_ptr, q_at, wanted, 0, q_column, D, PART)
        grad = load_columns(grad_ptr, grad_at, wanted, 0, grad_column, D, PART)
        lse = load_lse(lse_ptr, q_start, i, wanted, h, lse_head, lse_row)
        delta = tl.load(
            delta_ptr + tl.cast(h, tl.int64) * rows + q_start + i, mask=wanted, other=0.0
        )
        dq = tl.zeros([M, BLOCK_D], tl.float32)
        unseen = keys - queries + 1
        some = keys
        if CAUSAL:
            some = tl.minimum(tl.maximum(tile * M + M - 1 + unseen, 0), keys)
        for first in range(0, some, N):
            j = first + tl.arange(0, N)
            inside = j < keys
            k_at = place_of(k_start, j, k_row, g, k_head)
            v_at = place_of(k_start, j, v_row, g, v_head)
            k = load_columns(k_ptr, k_at, inside, 0, k_column, D, PART)
            v = load_columns(v_ptr, v_at, inside, 0, v_column, D, PART)
            logits = product(
                k, k_ptr, k_at, inside, k_column, q, q_ptr, q_at, wanted, q_column,
                D, BLOCK_D, PART,
            )  # fmt: skip
            seen = inside[:, None] & wanted[None, :]
            if CAUSAL:
                seen = seen & (j[:, None] < (i + unseen)[None, :])
            weights = weights_of(logits, lse, bias_ptr, k_start, j, keys, bias_step, scale, BIAS)
            change = product(
                v, v_ptr, v_at, inside, v_column, grad, grad_ptr, grad_at, wanted, grad_column,
                D, BLOCK_D, PART,
            )  # fmt: skip
            dlogits = tl.where(seen, weights * (change - delta[None, :]), 0.0)
            if PART < BLOCK_D:
                k = load_columns(k_ptr, k_at, inside, 0, k_column, D, BLOCK_D)
            dlogits = tl.trans(dlogits)
            high = dlogits.to(k.dtype)
            dq = dot(high, k, dq)
            if k.dtype != tl.float32:
                dq = dot((dlogits - high.to(tl.float32)).to(k.dtype), k, dq)
        d = tl.arange(0, BLOCK_D)
        at = ((q_start + i) * H + h)[:, None] * D + d[None, :]
        tl.store(dq_ptr + at, dq * plain_scale, mask=wanted[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["sequences", "rows", "all_keys"])
def dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    sequences, rows, all_keys, scale, plain_scale,
    grad_row, grad_head, grad_column, q_row, q_head, q_column, k_row, k_head, k_column,
    v_row, v_head, v_column, lse_head, lse_row, bias_step, cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dv = sum of weight * grad, dk = scale * sum of weight * (grad . v - delta) * q, over the rows
    of all heads of a group, for N keys.
    """
    grad_row, grad_head = numbers_in(grad_row, STEP), numbers_in(grad_head, STEP)
    q_row, q_head = numbers_in(q_row, STEP), numbers_in(q_head, STEP)
    k_row, k_head = numbers_in(k_row, STEP), numbers_in(k_head, STEP)
    v_row, v_head = numbers_in(v_row, STEP), numbers_in(v_head, STEP)
    SHARE: tl.constexpr = H // G
    g = tl.program_id(1)
    b, k_start, keys, tile = sequence_at(
        tl.program_id(0), cu_k_ptr, cu_k_step, sequences, all_keys, N
    )
    q_start, queries = bounds(cu_q_ptr, cu_q_step, b, rows)
    if tile * N < keys:
        j = tile * N + tl.arange(0, N)
        inside = j < keys
        k_at = place_of(k_start, j, k_row, g, k_head)
        v_at = place_of(k_start, j, v_row, g, v_head)
        k = load_columns(k_ptr, k_at, inside, 0, k_column, D, PART)
        v = load_columns(v_ptr, v_at, inside, 0, v_column, D, PART)
        dk = tl.zeros([N, BLOCK_D], tl.float32)
        dv = tl.zeros([N, BLOCK_D], tl.float32)
        unseen = keys - queries + 1
        begin = 0
        if CAUSAL:  # the first row that sees the first of these keys
            begin = tl.minimum(tl.maximum(tile * N + 1 - unseen, 0), queries)
        tiles = tl.cdiv(queries - begin, M)
        for step in range(0, tiles * SHARE):
            h = g * SHARE + step // tiles
            i = begin + step % tiles * M + tl.arange(0, M)
            wanted = i < queries
            q_at = place_of(q_start, i, q_row, h, q_head)
            grad_at = place_of(q_start, i, grad_row, h, grad_head)
            q = load_columns(q_ptr, q_at, wanted, 0, q_column, D, PART)
            grad = load_columns(grad_ptr, grad_at, wanted, 0, grad_column, D, PART)
            lse = load_lse(lse_ptr, q_start, i, wanted, h, lse_head, lse_row)
            delta = tl.load(
                delta_ptr + tl.cast(h, tl.int64) * rows + q_start + i, mask=wanted, other=0.0
            )
            logits = product(
                k, k_ptr, k_at, inside, k_column, q, q_ptr, q_at, wanted, q_column,
                D, BLOCK_D, PART,
            )  # fmt: skip
            seen = inside[:, None] & wanted[None, :]
            if CAUSAL:
                seen = seen & (j[:, None] < (i + unseen)[None, :])
            weights = weights_of(logits, lse, bias_ptr, k_start, j, keys, bias_step, scale, BIAS)
            weights = tl.where(seen, weights, 0.0)
            change = product(
                v, v_ptr, v_at, inside, v_column, grad, grad_ptr, grad_at, wanted, grad_column,
                D, BLOCK_D, PART,
            )  # fmt: skip
            if PART < BLOCK_D:
                q = load_columns(q_ptr, q_at, wanted, 0, q_column, D, BLOCK_D)
                grad = load_columns(grad_ptr, grad_at, wanted, 0, grad_column, D, BLOCK_D)
            dv = dot(weights.to(grad.dtype), grad, dv)
            dlogits = tl.where(seen, weights * (change - delta[None, :]), 0.0)
            dk = dot(dlogits.to(q.dtype), q, dk)
        d = tl.arange(0, BLOCK_D)
        at = ((k_start + j) * G + g)[:, None] * D + d[None, :]
        written = inside[:, None] & (d < D)[None, :]
        tl.store(dk_ptr + at, dk * plain_scale, mask=written)
        tl.store(dv_ptr + at, dv, mask=written)


def tiles_of(q: Tensor, step: int) -> dict[str, int]:
    """As in the forward pass, one size for all kernels."""
    width = max(triton.next_power_of_2(q.shape[2]), 16)
    part = width
    if q.dtype == torch.float32:
        m, n, warps, stages = (64, 64, 4, 1) if interpreted() else (16, 16, 16, 1)
        part = 16
    elif width <= 128:
        odd = q.shape[2] % 16 > 0 and step == 1  # an address for every value
        m, n, warps, stages = 32, 32 if odd else 64, 8, 2
    else:
        m, n, warps, stages = 32, 32, 8, 1
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if part == width == 128 and n == 32 and not interpreted():
        options["maxnreg"] = _TWO_PROGRAMS
    return {"BLOCK_D": width, "PART": part, "M": m, "N": n, **options}


def ragged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad and out [Sq, H, D], lse [H, Sq] -> gradients of q, k and v."""
    (rows, heads, width), (keys, groups) = q.shape, k.shape[:2]
    sequences = cu_seqlens_q.shape[0] - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not (sequences and width):
        return dq, dk, dv
    delta = q.new_empty(heads, rows, dtype=torch.float32)
    step = step_of(q, k, v, grad, out)
    tiles = tiles_of(q, step) | {"STEP": step}
    if rows:
        delta_kernel[(triton.cdiv(rows, 64), heads)](
            grad, out, delta, rows, *strides_in(step, grad, out),
            D=width, BLOCK_D=tiles["BLOCK_D"], PART=tiles["PART"], M=64, STEP=step, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    read = grad, q, k, v, key_bias, lse, delta
    rest = (
        cu_seqlens_q, cu_seqlens_k, sequences, rows, keys, scale * LOG2E, scale,
        *strides_in(step, grad, q, k, v), *lse.stride(),
        0 if key_bias is None else key_bias.stride(0), cu_seqlens_q.stride(0),
        cu_seqlens_k.stride(0),
    )  # fmt: skip
    shape = {"H": heads, "G": groups, "D": width, "CAUSAL": causal, "BIAS": key_bias is not None}
    if rows:
        programs = (slots(rows, sequences, tiles["M"]), heads)
        own = dict(tiles)
        if tiles["PART"] < tiles["BLOCK_D"] <= 128:
            own["num_stages"] = 2  # float32: with one, Triton 3.6 spills
        dq_kernel[programs](*read, dq, *rest, **shape, **own)
    if keys:
        programs = (slots(keys, sequences, tiles["N"]), groups)
        if tiles["PART"] == tiles["BLOCK_D"] == 128 and architecture() >= 100:
            tiles["maxnreg"] = _TWO_PROGRAMS
        dkv_kernel[programs](*read, dk, dv, *rest, **shape, **tiles)
    return dq, dk, dv
