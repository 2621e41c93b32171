"""Rows by index, and the gradient of that: gather_tokens, gather_many, gather_tokens_backward,
uniform_indices.

An index outside of x cannot be reported without waiting for the device: it reads nothing and
gives a row of zeros, and its gradient goes nowhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.select.bits import copyable

_TILE = 4096  # elements of a program: four loads of 16 bytes in flight for each of 128 threads


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(triton.next_power_of_2(max(width, 16)), _TILE)
    return max(_TILE // columns, 1), columns


def _narrow_tile(width: int) -> tuple[int, int]:
    """The same for a number or a few per row, such as its position."""
    columns = triton.next_power_of_2(width)
    return 512 // columns, columns


@triton.jit
def gather_tile(
    x_ptr, index_ptr, y_ptr, rows, picked, width, x_row, x_column, index_step, down, across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of y[m] = x[index[m]], of ROWS rows and COLUMNS columns."""
    m = tl.cast(down, tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.cast(across, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(index_ptr + m * index_step, mask=m < picked, other=-1)
    inside = (row >= 0) & (row < rows)
    wanted = inside[:, None] & (c < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + c[None, :] * x_column, mask=wanted, other=0)
    written = (m < picked)[:, None] & (c < width)[None, :]
    tl.store(y_ptr + m[:, None] * width + c[None, :], x, mask=written)


@triton.jit(do_not_specialize=["rows", "picked"])
def gather_kernel(
    x_ptr, index_ptr, y_ptr, rows, picked, width, x_row, x_column, index_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program has a tile."""
    gather_tile(
        x_ptr, index_ptr, y_ptr, rows, picked, width, x_row, x_column, index_step,
        tl.program_id(0), tl.program_id(1), ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "picked", "bounds"])
def gather_many_kernel(
    xs, ys, widths, row_steps, column_steps, index_ptr, cu_ptr, kept_ptr,
    rows, picked, bounds, index_step, cu_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for several tensors, of which each has its own tiles, and how many indices are
    below each of the `bounds` of cu.

    The bounds come first: a binary search waits for the memory some 17 times, which the tiles hide.
    """
    program = tl.program_id(0)
    searching = tl.cdiv(bounds, BLOCK)
    if program < searching:
        b = program * BLOCK + tl.arange(0, BLOCK)
        bound = tl.load(cu_ptr + b.to(tl.int64) * cu_step, mask=b < bounds, other=0).to(tl.int64)
        low = tl.zeros([BLOCK], tl.int64)
        high = low + picked
        while tl.max(high - low, 0) > 0:
            middle = (low + high) // 2
            left = low < high
            at = tl.load(index_ptr + middle * index_step, mask=left, other=0)
            low = tl.where(left & (at < bound), middle + 1, low)
            high = tl.where(left & (at >= bound), middle, high)
        tl.store(kept_ptr + b, low.to(tl.int32), mask=b < bounds)
    program -= searching
    for i in tl.static_range(len(xs)):
        wide = tl.cdiv(widths[i], COLUMNS[i])
        tiles = tl.cdiv(picked, ROWS[i]) * wide
        if (program >= 0) & (program < tiles):
            gather_tile(
                xs[i], index_ptr, ys[i], rows, picked, widths[i], row_steps[i], column_steps[i],
                index_step, program // wide, program % wide, ROWS[i], COLUMNS[i],
            )  # fmt: skip
        program -= tiles


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [S, C], index [M] int64 -> [M, C]."""
    y = x.new_empty(index.shape[0], x.shape[1])
    if y.numel():
        rows, columns = _tile(x.shape[1])
        grid = (triton.cdiv(y.shape[0], rows), triton.cdiv(y.shape[1], columns))
        gather_kernel[grid](
            x, index, y, x.shape[0], *y.shape, *x.stride(), *index.stride(),
            ROWS=rows, COLUMNS=columns, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def gather_many(
    x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """x and more [S, ...], index [M] int64 -> [M, ...] each; cu_seqlens [B+1] -> int32 [B+1]."""
    picked, given = index.shape[0], [x, *more]
    out = [t.new_empty(picked, *t.shape[1:]) for t in given]
    pairs = [
        (copyable(t).unsqueeze(1).flatten(1), copyable(y))
        for t, y in zip(given, out, strict=True)
        if y.numel()
    ]
    tiles = [_narrow_tile(t.shape[1]) if t.shape[1] < 16 else _tile(t.shape[1]) for t, _ in pairs]
    programs = sum(
        triton.cdiv(picked, down) * triton.cdiv(t.shape[1], across)
        for (t, _), (down, across) in zip(pairs, tiles, strict=True)
    )
    cu, kept, bounds = index, index, 0  # not touched
    if cu_seqlens is not None:
        cu, bounds = cu_seqlens, cu_seqlens.shape[0]
        kept = cu.new_empty(bounds, dtype=torch.int32)
        out.append(kept)
        programs += triton.cdiv(bounds, 128)
    if programs:
        xs, ys = tuple(t for t, _ in pairs), tuple(y for _, y in pairs)
        gather_many_kernel[(programs,)](
            xs, ys, tuple(t.shape[1] for t in xs),
            tuple(t.stride(0) for t in xs), tuple(t.stride(1) for t in xs),
            index, cu, kept, x.shape[0], picked, bounds, *index.stride(), *cu.stride(),
            ROWS=tuple(down for down, _ in tiles), COLUMNS=tuple(across for _, across in tiles),
            BLOCK=128, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "picked"])
def takers_kernel(index_ptr, ends_ptr, rows, picked, index_step, BLOCK: tl.constexpr):
    """ends[0, s] = the first m that took row s, ends[1, s] = picked - 1 - the last such m.

    Smallest of whole numbers: the same in any order.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + m * index_step, mask=m < picked, other=-1)
    inside = (row >= 0) & (row < rows)
    tl.atomic_min(ends_ptr + row, m, mask=inside)
    tl.atomic_min(ends_ptr + rows + row, picked - 1 - m, mask=inside)


@triton.jit(do_not_specialize=["rows", "picked"])
def scatter_kernel(
    grad_ptr, index_ptr, ends_ptr, out_ptr, rows, picked, width, grad_row, grad_column, index_step,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[s] = sum of grad[m] over the m with index[m] = s, in the order of m.

    A row that was taken once is copied with its tile; one that was taken more often looks through
    the indices between its first and its last taker.
    """
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(ends_ptr + s, mask=s < rows, other=picked)
    last = picked - 1 - tl.load(ends_ptr + rows + s, mask=s < rows, other=picked)
    taken = (first <= last)[:, None] & (c < width)[None, :]
    offset = first[:, None] * grad_row + c[None, :] * grad_column
    once = tl.load(grad_ptr + offset, mask=taken, other=0)
    simple = ((s < rows) & (first >= last))[:, None] & (c < width)[None, :]
    tl.store(out_ptr + s[:, None] * width + c[None, :], once, mask=simple)
    often = tl.min(tl.where(last > first, s, rows))
    while often < rows:
        begin = tl.load(ends_ptr + often)
        end = picked - 1 - tl.load(ends_ptr + rows + often)
        total = tl.zeros([COLUMNS], SUM)
        for block in range(begin, end + 1, BLOCK):
            m = block + tl.arange(0, BLOCK).to(tl.int64)
            near = m <= end
            match = near & (tl.load(index_ptr + m * index_step, mask=near, other=-1) == often)
            taker = tl.min(tl.where(match, m, picked))
            while taker < picked:
                place = grad_ptr + taker * grad_row + c * grad_column
                total += tl.load(place, mask=c < width, other=0).to(SUM)
                taker = tl.min(tl.where(match & (m > taker), m, picked))
        tl.store(out_ptr + often * width + c, total, mask=c < width)
        often = tl.min(tl.where((last > first) & (s > often), s, rows))


def gather_tokens_backward(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Grad [M, C], index [M] -> [S, C]."""
    out = grad.new_empty(num_rows, grad.shape[1])
    if not out.numel():
        return out
    picked = index.shape[0]
    ends = index.new_full((2, num_rows), picked)
    if picked:
        takers_kernel[(triton.cdiv(picked, 1024),)](
            index, ends, num_rows, picked, *index.stride(), BLOCK=1024, enable_fp_fusion=True
        )
    rows, columns = _tile(grad.shape[1])
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(grad.shape[1], columns))
    scatter_kernel[grid](
        grad, index, ends, out, num_rows, *grad.shape, *grad.stride(), *index.stride(),
        SUM=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        ROWS=rows, COLUMNS=columns, BLOCK=1024, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens", "keep"])
def uniform_kernel(out_ptr, num_tokens, keep, BLOCK: tl.constexpr):
    """The closed form of torch.linspace in float64; no product may be fused into a sum."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = tl.cast(num_tokens - 1, tl.float64)
    step = last / tl.cast(tl.maximum(keep - 1, 1), tl.float64)
    up = step * i.to(tl.float64)
    down = last - step * (keep - 1 - i).to(tl.float64)
    spaced = tl.where((i < keep // 2) | (keep == 1), up, down)
    tl.store(out_ptr + i, spaced.to(tl.int64), mask=i < keep)


def uniform_indices(num_tokens: int, keep: int, device: torch.device) -> Tensor:
    """Two host ints -> [keep] int64."""
    out = torch.empty(keep, dtype=torch.int64, device=device)
    if keep:
        uniform_kernel[(triton.cdiv(keep, 1024),)](
            out, num_tokens, keep, BLOCK=1024, enable_fp_fusion=False
        )
    return out
