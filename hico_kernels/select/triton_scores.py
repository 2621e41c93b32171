"""text_guided_scores: softmax(scale * q k^T) over all keys of a sequence, mean over heads and rows.

Keys are the rows of every product and the query rows of a whole group its columns, so a key is read
once for all heads that share it. Pass 1: programs take chunks of keys and a key head, and leave the
top and the sum of every query row; a small launch makes one of each. Pass 2: weights, summed over
rows and heads. For few query rows pass 1 keeps the logits, which are smaller than the keys, and
pass 2 reads those. Sums run in a fixed order. Keys without RoPE are turned as they are loaded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import architecture, bounds, dot, search, sequence_at, slots

_CHUNK = 512  # keys of a program of pass 1
_KEPT_ROWS = 4  # text rows whose logits are kept: 4 bytes for each head against 2 D for the key
_LOWEST = tl.constexpr(-1e38)  # where a top begins: of -infinity the differences would be NaN
_LOG2E = 1.4426950408889634


@triton.jit
def load_queries(
    q_ptr, start, first, count, group, part, q_row, q_head, q_column,
    SHARE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """M query rows of a group as columns [PART, M]: heads of a text row, then the next row."""
    m = first + tl.arange(0, M)
    d = part + tl.arange(0, PART)
    at = (start + m // SHARE) * q_row + (group * SHARE + m % SHARE).to(tl.int64) * q_head
    wanted = (m < count)[None, :] & (d < D)[:, None]
    return tl.load(q_ptr + at[None, :] + d.to(tl.int64)[:, None] * q_column, mask=wanted, other=0)


@triton.jit
def load_keys(
    k_ptr, cos_ptr, sin_ptr, start, n, length, group, part,
    k_row, k_head, k_column, cos_row, cos_column, sin_row, sin_column,
    ROTARY: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Keys [N, PART] of a group, from column `part` on; zeros outside of the sequence. ROTARY:
    turned, column d with d + D/2, and rounded to their dtype again.
    """
    d = part + tl.arange(0, PART)
    row = (start + n)[:, None]
    wanted = (n < length)[:, None] & (d < D)[None, :]
    at = row * k_row + tl.cast(group, tl.int64) * k_head
    k = tl.load(k_ptr + at + d.to(tl.int64)[None, :] * k_column, mask=wanted, other=0)
    if ROTARY:
        pair = (d + D // 2) % D  # a remainder, not a choice: the loads stay wide
        other = tl.load(k_ptr + at + pair.to(tl.int64)[None, :] * k_column, mask=wanted, other=0)
        d = d.to(tl.int64)[None, :]
        cos = tl.load(cos_ptr + row * cos_row + d * cos_column, mask=wanted, other=0)
        sin = tl.load(sin_ptr + row * sin_row + d * sin_column, mask=wanted, other=0)
        turn = tl.where(d < D // 2, -sin.to(tl.float32), sin.to(tl.float32))
        k = (k.to(tl.float32) * cos.to(tl.float32) + other.to(tl.float32) * turn).to(k.dtype)
    return k


@triton.jit(do_not_specialize=["sequences", "rows", "keys", "kept"])
def partial_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr, top_ptr, sum_ptr, logits_ptr,
    sequences, rows, keys, kept, scale, q_row, q_head, q_column, k_row, k_head, k_column,
    cos_row, cos_column, sin_row, sin_column, cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROTARY: tl.constexpr, CHUNK: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Pass 1: top and sum of exp2(logit - top) of a chunk, and the logits of few rows.

    Every place of a tile of keys has a top and a sum of its own until the end of the chunk: no
    value crosses threads before, and one exp2 a logit is enough.
    """
    SHARE: tl.constexpr = H // G
    slot = tl.program_id(0)
    g = tl.program_id(1)
    b, k_start, length, chunk = sequence_at(slot, cu_k_ptr, cu_k_step, sequences, keys, CHUNK)
    q_start, texts = bounds(cu_q_ptr, cu_q_step, b, rows)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, length)
    if begin < end:
        for first in range(0, texts * SHARE, M):
            q = load_queries(
                q_ptr, q_start, first, texts * SHARE, g, 0, q_row, q_head, q_column,
                SHARE, D, M, PART,
            )  # fmt: skip
            m = first + tl.arange(0, M)
            wanted = m < texts * SHARE
            top = tl.full([N, M], _LOWEST, tl.float32)
            total = tl.zeros([N, M], tl.float32)
            for at in range(begin, end, N):
                n = at + tl.arange(0, N)
                k = load_keys(
                    k_ptr, cos_ptr, sin_ptr, k_start, n, length, g, 0, k_row, k_head, k_column,
                    cos_row, cos_column, sin_row, sin_column, ROTARY, D, PART,
                )  # fmt: skip
                logits = dot(k, q, tl.zeros([N, M], tl.float32))
                for part in tl.static_range(PART, BLOCK_D, PART):
                    more = load_queries(
                        q_ptr, q_start, first, texts * SHARE, g, part, q_row, q_head, q_column,
                        SHARE, D, M, PART,
                    )  # fmt: skip
                    k = load_keys(
                        k_ptr, cos_ptr, sin_ptr, k_start, n, length, g, part, k_row, k_head,
                        k_column, cos_row, cos_column, sin_row, sin_column, ROTARY, D, PART,
                    )  # fmt: skip
                    logits = dot(k, more, logits)
                logits *= scale
                if KEEP:
                    rows_kept = tl.where(texts <= kept, texts * SHARE, 0)
                    kept_here = (n < length)[:, None] & (m < rows_kept)[None, :]
                    place = (g * SHARE * kept + m).to(tl.int64) * keys
                    place = place[None, :] + (k_start + n)[:, None]
                    tl.store(logits_ptr + place, logits, mask=kept_here)
                logits = tl.where((n < length)[:, None], logits, float("-inf"))
                smaller = tl.exp2(-tl.abs(logits - top))
                total = tl.where(logits > top, total * smaller + 1, total + smaller)
                top = tl.maximum(top, logits)
            highest = tl.max(top, 0)
            total = tl.sum(total * tl.exp2(top - highest[None, :]), 0)
            place = (chunk.to(tl.int64) * rows + q_start + m // SHARE) * H + g * SHARE + m % SHARE
            tl.store(top_ptr + place, highest, mask=wanted)
            tl.store(sum_ptr + place, total, mask=wanted)


@triton.jit(do_not_specialize=["sequences", "rows", "keys"])
def combine_kernel(
    cu_q_ptr, cu_k_ptr, top_ptr, sum_ptr, shift_ptr, share_ptr, sequences, rows, keys,
    cu_q_step, cu_k_step,
    H: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of all chunks, for all heads of a text row: the top, and 1 / (sum * heads * text rows).

    The two are not made one log-sum-exp, which would be rounded at the size of the logits.
    """
    r = tl.program_id(0).to(tl.int64)
    b = search(r, cu_q_ptr, cu_q_step, sequences, rows, 1, 0)
    _, length = bounds(cu_k_ptr, cu_k_step, b, keys)
    _, texts = bounds(cu_q_ptr, cu_q_step, b, rows)
    chunks = tl.cdiv(length, CHUNK)
    h = tl.arange(0, BLOCK_H)
    top = tl.full([BLOCK_H], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, chunks, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        place = (chunk.to(tl.int64) * rows + r)[:, None] * H + h[None, :]
        wanted = (chunk < chunks)[:, None] & (h < H)[None, :]
        tops = tl.load(top_ptr + place, mask=wanted, other=_LOWEST)
        sums = tl.load(sum_ptr + place, mask=wanted, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp2(top - higher) + tl.sum(sums * tl.exp2(tops - higher[None, :]), 0)
        top = higher
    tl.store(shift_ptr + r * H + h, top, mask=h < H)
    share = 1.0 / (total * (tl.maximum(texts, 1) * H).to(tl.float32))
    tl.store(share_ptr + r * H + h, share, mask=h < H)


@triton.jit(do_not_specialize=["sequences", "rows", "keys", "kept"])
def weights_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr, shift_ptr, share_ptr, scores_ptr,
    sequences, rows, keys, kept, scale, q_row, q_head, q_column, k_row, k_head, k_column,
    cos_row, cos_column, sin_row, sin_column, cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Pass 2 from the keys, of the sequences whose logits were not kept.

    One loop over key heads and tiles of query rows: nested, Triton would give each key head its
    own buffers.
    """
    SHARE: tl.constexpr = H // G
    slot = tl.program_id(0)
    b, k_start, length, tile = sequence_at(slot, cu_k_ptr, cu_k_step, sequences, keys, N)
    q_start, texts = bounds(cu_q_ptr, cu_q_step, b, rows)
    n = tile * N + tl.arange(0, N)
    if (texts > kept) & (tile * N < length):
        count = texts * SHARE
        scores = tl.zeros([N], tl.float32)
        for step in range(0, tl.cdiv(count, M) * G):
            g = step % G
            first = step // G * M
            logits = tl.zeros([N, M], tl.float32)
            for part in tl.static_range(0, BLOCK_D, PART):
                q = load_queries(
                    q_ptr, q_start, first, count, g, part, q_row, q_head, q_column,
                    SHARE, D, M, PART,
                )  # fmt: skip
                k = load_keys(
                    k_ptr, cos_ptr, sin_ptr, k_start, n, length, g, part, k_row, k_head, k_column,
                    cos_row, cos_column, sin_row, sin_column, ROTARY, D, PART,
                )  # fmt: skip
                logits = dot(k, q, logits)
            m = first + tl.arange(0, M)
            place = (q_start + m // SHARE) * H + g * SHARE + m % SHARE
            shift = tl.load(shift_ptr + place, mask=m < count, other=0.0)
            share = tl.load(share_ptr + place, mask=m < count, other=0.0)
            weights = tl.exp2(logits * scale - shift[None, :]) * share[None, :]
            scores += tl.sum(tl.where((m < count)[None, :], weights, 0.0), 1)
        tl.store(scores_ptr + k_start + n, scores, mask=n < length)


@triton.jit(do_not_specialize=["sequences", "rows", "keys", "kept"])
def kept_weights_kernel(
    logits_ptr, cu_q_ptr, cu_k_ptr, shift_ptr, share_ptr, scores_ptr, sequences, rows, keys, kept,
    cu_q_step, cu_k_step,
    H: tl.constexpr, G: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pass 2 from kept logits; zeros where a sequence has no text row."""
    SHARE: tl.constexpr = H // G
    slot = tl.program_id(0)
    b, k_start, length, tile = sequence_at(slot, cu_k_ptr, cu_k_step, sequences, keys, N)
    q_start, texts = bounds(cu_q_ptr, cu_q_step, b, rows)
    n = tile * N + tl.arange(0, N)
    if (texts <= kept) & (tile * N < length):
        h = tl.arange(0, BLOCK_H).to(tl.int64)
        scores = tl.zeros([N], tl.float32)
        for text in range(0, texts):
            row = h // SHARE * SHARE * kept + text * SHARE + h % SHARE
            place = row[None, :] * keys + (k_start + n)[:, None]
            wanted = (n < length)[:, None] & (h < H)[None, :]
            logits = tl.load(logits_ptr + place, mask=wanted, other=float("-inf"))
            place = (q_start + text) * H + h
            shift = tl.load(shift_ptr + place, mask=h < H, other=0.0)
            share = tl.load(share_ptr + place, mask=h < H, other=0.0)
            scores += tl.sum(tl.exp2(logits - shift[None, :]) * share[None, :], 1)
        tl.store(scores_ptr + k_start + n, scores, mask=n < length)


def tiles_of(q: Tensor, groups: int, sequences: int, rotary: bool) -> dict[str, int]:
    """Sizes of a product: keys N, query rows M, width, and how much of it is added up at once."""
    rows = triton.cdiv(q.shape[0], max(sequences, 1)) * (q.shape[1] // groups)
    width = max(triton.next_power_of_2(q.shape[2]), 16)
    m = max(triton.next_power_of_2(rows), 16)
    if q.dtype == torch.float32:  # no tensor cores: what is multiplied lies in registers
        return {"BLOCK_D": width, "PART": min(width, 32), "M": 16, "N": 32}
    m = min(m, 32 if rotary and width > 128 else 64)
    few = rotary or width > 128 or m > 32  # rotary: four tiles are loaded to make one
    part = 64 if rotary and width > 128 else width
    return {"BLOCK_D": width, "PART": part, "M": m, "N": 64 if few else 128}


def text_guided_scores(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """q [R, H, D], k [S, G, D], cu_seqlens [B+1] -> [S] float32."""
    return _scores(q, k, cu_seqlens_q, cu_seqlens_k, scale)


def text_guided_scores_rotary(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The same with cos and sin [S, D] for k."""
    return _scores(q, k, cu_seqlens_q, cu_seqlens_k, scale, (cos, sin))


def _scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    (rows, heads, width), (keys, groups) = q.shape, k.shape[:2]
    sequences = cu_seqlens_q.shape[0] - 1
    scores = k.new_empty(keys, dtype=torch.float32)
    if not keys:
        return scores
    if not rows or not sequences:
        return scores.zero_()
    shape = {"H": heads, "G": groups}
    tiles = tiles_of(q, groups, sequences, tables is not None) | {"ROTARY": tables is not None}
    # With three stages Triton 3.6 spills 8 bytes of a tile of 64 rows for sm_100.
    shallow = q.dtype == torch.float32 or (architecture() >= 100 and tiles["M"] > 32)
    options = {
        "num_warps": 4 if q.dtype == torch.float32 else 8,
        # with tables and wide heads more does not fit into what a program may have
        "num_stages": 1 if tables and width > 128 else 2 if shallow else 3,
        "enable_fp_fusion": True,
    }
    average = triton.cdiv(rows, sequences)
    kept = rows if rows <= _KEPT_ROWS else average if average <= _KEPT_ROWS else -1
    logits = scores.new_empty(heads * max(kept, 0), keys)
    parts = scores.new_empty(2, keys // _CHUNK + 1, rows, heads)
    whole = scores.new_empty(2, rows, heads)
    ends, steps = (cu_seqlens_q, cu_seqlens_k), (cu_seqlens_q.stride(0), cu_seqlens_k.stride(0))
    cos, sin = tables or (k, k)  # not read without ROTARY
    strides = *q.stride(), *k.stride(), *cos.stride()[:2], *sin.stride()[:2], *steps
    sizes = sequences, rows, keys
    block_h = triton.next_power_of_2(heads)
    partial_kernel[(slots(keys, sequences, _CHUNK), groups)](
        q, k, cos, sin, *ends, *parts, logits, *sizes, kept, scale * _LOG2E, *strides,
        **shape, D=width, **tiles, CHUNK=_CHUNK, KEEP=kept > 0, **options,
    )  # fmt: skip
    combine_kernel[(rows,)](
        *ends, *parts, *whole, *sizes, *steps,
        H=heads, BLOCK_H=block_h, CHUNK=_CHUNK, AT_ONCE=32, enable_fp_fusion=True,
    )  # fmt: skip
    programs = (slots(keys, sequences, tiles["N"]),)
    if kept > 0:
        kept_weights_kernel[programs](
            logits, *ends, *whole, scores, *sizes, kept, *steps,
            **shape, BLOCK_H=block_h, N=tiles["N"], enable_fp_fusion=True,
        )  # fmt: skip
    if kept < rows:
        if tables and options["num_stages"] == 1 and architecture() < 90:
            tiles["PART"] = 32  # with 64, Triton 3.9 spills a value for sm_80
        weights_kernel[programs](
            q, k, cos, sin, *ends, *whole, scores, *sizes, kept, scale * _LOG2E, *strides,
            **shape, D=width, **tiles, **options,
        )  # fmt: skip
    return scores
