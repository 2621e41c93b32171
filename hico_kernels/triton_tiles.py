"""What the Triton kernels share: tiles over packed sequences, products, the architecture.

Only hico_kernels/*/triton*.py import this, so that `import hico_kernels` does not import triton.
"""

import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether kernels run as Python: what fits into registers then only costs time."""
    return triton.knobs.runtime.interpret


def architecture() -> int:
    """80 for sm_80, 90 for sm_90 and so on; the interpreter gets what a Hopper GPU does."""
    if interpreted():
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def slots(rows: int, sequences: int, size: int) -> int:
    """Tiles of `size` rows that are enough for `sequences` packed sequences of `rows` rows in all.

    Known without the lengths: sequence b owns the slots from start[b] // size + b on, at least as
    many as its tiles and at most one too many. What is too many ends at once.
    """
    return rows // size + sequences


def row_tile(columns: int) -> tuple[int, int, int]:
    """Rows, padded columns and warps of a program that holds whole rows: 16 to 32 numbers a thread
    up to 16 384 columns.
    """
    padded = triton.next_power_of_2(columns)
    rows = max(2048 // padded, 1)
    return rows, padded, min(max(rows * padded // 1024, 4), 16)


PROGRAMS = 1024  # of a launch that adds up rows: each adds its own, and what they have is added up


def row_shares(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """Programs that share out rows evenly, each holding whole ones -> programs, tiles of each, rows
    and padded columns of a tile, warps: 16 numbers a thread up to 8192 columns. What is added up in
    one chain stays short, as in torch: a program has few tiles, and a tile few rows.
    """
    padded = triton.next_power_of_2(columns)
    count = min(max(2048 // padded, 1), 32)
    tiles = triton.cdiv(rows, count)
    share = max(triton.cdiv(tiles, PROGRAMS), 1)
    return triton.cdiv(tiles, share), share, count, padded, min(max(count * padded // 512, 4), 16)


@triton.jit
def start_of(cu_ptr, place, rows, wanted=True):
    """A cumulative length, cut to [0, rows]: whatever it says, no other memory is touched."""
    start = tl.load(cu_ptr + place, mask=wanted, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), rows)


@triton.jit
def bounds(cu_ptr, stride, b, rows):
    """First row (int64) and length (int32) of sequence b."""
    place = tl.cast(b, tl.int64) * stride
    start = start_of(cu_ptr, place, rows)
    end = start_of(cu_ptr, place + stride, rows)
    return start, tl.maximum(end - start, 0).to(tl.int32)


@triton.jit
def search(slot, cu_ptr, stride, sequences, rows, SIZE: tl.constexpr, GAP: tl.constexpr):
    """The last b with start[b] // SIZE + GAP * b <= slot."""
    b = -1
    for first in range(0, sequences, 128):
        j = first + tl.arange(0, 128)
        start = start_of(cu_ptr, j.to(tl.int64) * stride, rows, j < sequences)
        b += tl.sum(((start // SIZE + GAP * j <= slot) & (j < sequences)).to(tl.int32))
    return tl.maximum(b, 0)


@triton.jit
def sequence_at(slot, cu_ptr, stride, sequences, rows, SIZE: tl.constexpr):
    """The sequence b that owns a slot -> b, its first row, its length, the tile within it."""
    b = search(slot, cu_ptr, stride, sequences, rows, SIZE, 1)
    start, length = bounds(cu_ptr, stride, b, rows)
    tile = slot - ((start // SIZE).to(tl.int32) + b)
    return b, start, length, tl.maximum(tile, 0)  # below 0 only where lengths do not rise


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, float32 without shortcuts."""
    return tl.dot(a, b, acc, input_precision="ieee")
