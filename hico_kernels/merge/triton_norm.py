"""layer_norm_metric: a program has whole tokens in registers, as [tokens, heads, width], so that
one load serves the norm over both and the mean over heads.
"""

import triton
import triton.language as tl
from torch import Tensor, float32


@triton.jit(do_not_specialize=["rows", "tokens"])
def layer_norm_metric_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, metric_ptr, rows, tokens, eps,
    x_n, x_t, x_c, weight_step, bias_step,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """x [N, T, C] by any strides -> y [N, T, C], metric [N, T, WIDTH], C = HEADS * WIDTH."""
    C: tl.constexpr = HEADS * WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, w = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    channel = (h[:, None] * WIDTH + w[None, :]).to(tl.int64)
    known = (h < HEADS)[:, None] & (w < WIDTH)[None, :]
    inside = (row < rows)[:, None, None] & known[None]
    at = (row // tokens * x_n + row % tokens * x_t)[:, None, None] + channel[None] * x_c
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=2), axis=1) / C
    centred = tl.where(known[None], x - mean[:, None, None], 0)
    variance = tl.sum(tl.sum(centred * centred, axis=2), axis=1) / C
    share = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weight = tl.load(weight_ptr + channel * weight_step, mask=known, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + channel * bias_step, mask=known, other=0).to(tl.float32)
    y = centred * share[:, None, None] * weight[None] + bias[None]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None, None] * C + channel[None], y, mask=inside)
    metric = tl.sum(y.to(tl.float32), axis=1) / HEADS
    to = metric_ptr + row[:, None] * WIDTH + w[None, :]
    tl.store(to, metric, mask=(row < rows)[:, None] & (w < WIDTH)[None, :])


def layer_norm_metric(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """x [N, T, C], weight and bias [C] -> y [N, T, C], metric [N, T, C / num_heads] float32."""
    n, t, c = x.shape
    if num_heads < 1 or c % num_heads:
        raise ValueError(f"num_heads must divide {c}, got {num_heads}")
    width = c // num_heads
    y, metric = x.new_empty(n, t, c), x.new_empty(n, t, width, dtype=float32)
    if y.numel():
        block_h, block_w = triton.next_power_of_2(num_heads), triton.next_power_of_2(width)
        rows = max(2048 // (block_h * block_w), 1)
        layer_norm_metric_kernel[(triton.cdiv(n * t, rows),)](
            x, weight, bias, y, metric, n * t, t, eps,
            *x.stride(), *weight.stride(), *bias.stride(),
            HEADS=num_heads, WIDTH=width, ROWS=rows, BLOCK_H=block_h, BLOCK_W=block_w,
            num_warps=min(max(rows * block_h * block_w // 512, 4), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return y, metric
