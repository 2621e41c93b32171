"""Merging in Triton."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _spread_gradient(
    grad, assignment, totals, weights, out, rows, t, k, c,
    grad_n, grad_k, grad_c, to_n, to_t, total_n, total_k, weight_n, weight_t,
    WEIGHTED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = row < rows
    n, i = row // t, row % t
    position = tl.load(assignment + n * to_n + i * to_t, mask=inside, other=-1).to(tl.int64)
    known = (position >= 0) & (position < k)  # what is outside was not merged: no gradient
    total = tl.load(totals + n * total_n + position * total_k, mask=known, other=0).to(tl.float32)
    known &= total != 0
    at = (n * grad_n + position * grad_k)[:, None] + column[None, :] * grad_c
    given = tl.load(grad + at, mask=known[:, None] & (column < c)[None, :], other=0)
    share = given.to(tl.float32) / tl.where(total != 0, total, 1)[:, None]
    if WEIGHTED:
        weight = tl.load(weights + n * weight_n + i * weight_t, mask=inside, other=0)
        share *= weight.to(tl.float32)[:, None]
    to = out + row[:, None] * c + column[None, :]
    tl.store(to, share, mask=inside[:, None] & (column < c)[None, :])


def merge_backward(
    grad: Tensor, assignment: Tensor, merged_sizes: Tensor, sizes: Tensor | None
) -> Tensor:
    """Grad [N, K, C], assignment [N, T] -> gradient of x [N, T, C]. A position outside [0, K) gives
    zeros.
    """
    (n, k, c), t = grad.shape, assignment.shape[1]
    out = grad.new_empty(n, t, c)
    if out.numel() == 0:
        return out
    weights = merged_sizes if sizes is None else sizes
    block = min(triton.next_power_of_2(c), 1024)
    rows = max(1, 4096 // block)
    _spread_gradient[triton.cdiv(n * t, rows), triton.cdiv(c, block)](
        grad, assignment, merged_sizes, weights, out, n * t, t, k, c,
        *grad.stride(), *assignment.stride(), *merged_sizes.stride(), *weights.stride(),
        WEIGHTED=sizes is not None, BT=rows, BC=block,
    )  # fmt: skip
    return out
