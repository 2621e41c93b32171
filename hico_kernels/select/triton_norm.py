"""gather_rms_norm: a program has whole rows in registers: each is read once and written twice. And
rms_norm_backward, which reads three rows and writes one; a program adds its share of rows to a
gradient of the weight of its own, and those are added up in order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import row_shares, row_tile


@triton.jit(do_not_specialize=["rows", "picked"])
def gather_rms_norm_kernel(
    x_ptr, index_ptr, weight_ptr, rows_ptr, normed_ptr, rows, picked, eps,
    x_row, x_column, index_step, weight_step,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row that is not there is one of zeros."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS).to(tl.int64)
    row = tl.load(index_ptr + m * index_step, mask=m < picked, other=-1)
    there = (row >= 0) & (row < rows)
    inside = (c < C)[None, :]
    at = row[:, None] * x_row + c[None, :] * x_column
    x = tl.load(x_ptr + at, mask=there[:, None] & inside, other=0)
    written = (m < picked)[:, None] & inside
    to = m[:, None] * C + c[None, :]
    tl.store(rows_ptr + to, x, mask=written)
    wide = x.to(tl.float32)
    square = tl.sum(wide * wide, axis=1) / C + eps
    share = tl.div_rn(1.0, tl.sqrt_rn(square))
    unit = (wide * share[:, None]).to(x.dtype)
    weight = tl.load(weight_ptr + c * weight_step, mask=c < C, other=0).to(tl.float32)
    tl.store(normed_ptr + to, unit.to(tl.float32) * weight[None, :], mask=written)


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [S, C], index [M], weight [C] -> rows [M, C], normed [M, C]."""
    rows = x.new_empty(index.shape[0], x.shape[1])
    normed = x.new_empty(rows.shape)
    if rows.numel():
        count, columns, warps = row_tile(x.shape[1])
        gather_rms_norm_kernel[(triton.cdiv(len(rows), count),)](
            x, index, weight, rows, normed, x.shape[0], len(rows), eps,
            *x.stride(), *index.stride(), *weight.stride(),
            C=x.shape[1], ROWS=count, COLUMNS=columns, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return rows, normed


@triton.jit(do_not_specialize=["rows", "share"])
def rms_norm_backward_kernel(
    direct_ptr, grad_ptr, x_ptr, weight_ptr, own_ptr, part_ptr, rows, share, eps,
    direct_row, direct_column, grad_row, grad_column, x_row, x_column, weight_step,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`share` tiles of rows: their gradients, and what they add to that of the weight."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS).to(tl.int64)
    weight = tl.load(weight_ptr + c * weight_step, mask=c < C, other=0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for tile in range(0, share):
        m = (program * share + tile) * ROWS + tl.arange(0, ROWS)
        wanted = (m < rows)[:, None] & (c < C)[None, :]
        at = m[:, None] * x_row + c[None, :] * x_column
        x = tl.load(x_ptr + at, mask=wanted, other=0)
        at = m[:, None] * grad_row + c[None, :] * grad_column
        grad = tl.load(grad_ptr + at, mask=wanted, other=0).to(tl.float32)
        at = m[:, None] * direct_row + c[None, :] * direct_column
        direct = tl.load(direct_ptr + at, mask=wanted, other=0).to(tl.float32)
        wide = x.to(tl.float32)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, axis=1) / C + eps))
        unit = wide * inverse[:, None]
        total += tl.sum(grad * unit.to(x.dtype).to(tl.float32), axis=0)
        grad *= weight[None, :]
        along = tl.sum(grad * unit, axis=1) / C
        own = inverse[:, None] * (grad - unit * along[:, None]) + direct
        tl.store(own_ptr + m[:, None] * C + c[None, :], own, mask=wanted)
    tl.store(part_ptr + program * C + c, total, mask=c < C)


def rms_norm_backward(
    grad_rows: Tensor, grad_normed: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of their norm [M, C] -> of rows with both [M, C], of weight [C]."""
    own = rows.new_empty(rows.shape)
    if not rows.numel():
        return own, weight.new_zeros(weight.shape)
    programs, share, count, columns, warps = row_shares(*rows.shape)
    parts = rows.new_empty(programs, rows.shape[1], dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](
        grad_rows, grad_normed, rows, weight, own, parts, len(rows), share, eps,
        *grad_rows.stride(), *grad_normed.stride(), *rows.stride(), *weight.stride(),
        C=rows.shape[1], ROWS=count, COLUMNS=columns, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return own, parts.sum(dim=0).to(weight.dtype)
