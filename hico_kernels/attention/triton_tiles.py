"""What the Triton attention kernels share: rows of a tile and products of two of them."""

import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import dot

LOG2E = 1.4426950408889634  # weights are powers of 2: logits, bias and lse are multiplied by it
LOWEST = tl.constexpr(-1e38)  # where a maximum begins: of -infinity the differences would be NaN


def step_of(*tensors: Tensor) -> int:
    """8 where a head is no multiple of 16 numbers wide (SigLIP's have 72), which is all that Triton
    looks at, but all rows and heads begin at multiples of 8: else it would load one by one.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    return 8 if tensors[0].shape[-1] % 16 and all(n % 8 == 0 for n in strides) else 1


def strides_in(step: int, *tensors: Tensor) -> list[int]:
    """The strides of all tensors for a kernel, in steps but for the last of each."""
    return [n for x in tensors for n in (*(m // step for m in x.stride()[:-1]), x.stride(-1))]


@triton.jit
def numbers_in(stride, STEP: tl.constexpr):
    """A stride that was given in steps, so that Triton knows it to be a multiple of STEP."""
    return tl.cast(stride, tl.int64) * STEP


@triton.jit
def place_of(start, i, row_step, head, head_step):
    """Offsets of rows start + i of a head."""
    return (start + i) * row_step + tl.cast(head, tl.int64) * head_step


@triton.jit
def load_columns(ptr, at, wanted, first, column_step, D: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] at the offsets `at`, from column `first` on; zeros beyond D or not wanted."""
    d = first + tl.arange(0, WIDTH)
    at = at[:, None] + d.to(tl.int64)[None, :] * column_step
    return tl.load(ptr + at, mask=wanted[:, None] & (d < D)[None, :], other=0)


@triton.jit
def product(
    a, a_ptr, a_at, a_wanted, a_column, b, b_ptr, b_at, b_wanted, b_column,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """a @ b^T of two tiles of rows, of which the first PART columns are here.

    Float32 has no tensor cores: its operands lie in registers, so it goes by parts of the width.
    """
    total = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32))
    for part in tl.static_range(PART, BLOCK_D, PART):
        more = load_columns(a_ptr, a_at, a_wanted, part, a_column, D, PART)
        other = load_columns(b_ptr, b_at, b_wanted, part, b_column, D, PART)
        total = dot(more, tl.trans(other), total)
    return total
