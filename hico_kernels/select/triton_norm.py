"""gather_rms_norm: a program has whole rows in registers: each is read once and written twice."""

import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import row_tile


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
