"""layer_norm_metric: a program has whole tokens in registers, as [tokens, heads, width], so that
one load serves the norm over both and the mean over heads. And layer_norm_backward, whose programs
each add their share of tokens to gradients of weight and bias of their own; those are added up in
order: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from hico_kernels.triton_tiles import row_shares


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


@triton.jit(do_not_specialize=["rows", "tokens", "share"])
def layer_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, own_ptr, part_ptr, rows, tokens, share, eps,
    grad_n, grad_t, grad_c, x_n, x_t, x_c, weight_step,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`share` tiles of tokens: their gradients, and what they add to those of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS).to(tl.int64)
    known = (c < C)[None, :]
    weight = tl.load(weight_ptr + c * weight_step, mask=c < C, other=0).to(tl.float32)
    of_weight = tl.zeros([COLUMNS], tl.float32)
    of_bias = tl.zeros([COLUMNS], tl.float32)
    for tile in range(0, share):
        row = (program * share + tile) * ROWS + tl.arange(0, ROWS)
        wanted = (row < rows)[:, None] & known
        clip, token = (row // tokens)[:, None], (row % tokens)[:, None]
        at = clip * x_n + token * x_t + c[None, :] * x_c
        x = tl.load(x_ptr + at, mask=wanted, other=0).to(tl.float32)
        at = clip * grad_n + token * grad_t + c[None, :] * grad_c
        grad = tl.load(grad_ptr + at, mask=wanted, other=0).to(tl.float32)
        centred = tl.where(known, x - (tl.sum(x, axis=1) / C)[:, None], 0)
        variance = tl.sum(centred * centred, axis=1) / C
        inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        unit = centred * inverse[:, None]
        of_weight += tl.sum(grad * unit, axis=0)
        of_bias += tl.sum(grad, axis=0)
        grad *= weight[None, :]
        grad = tl.where(known, grad - (tl.sum(grad, axis=1) / C)[:, None], 0)
        along = tl.sum(grad * unit, axis=1) / C
        own = inverse[:, None] * (grad - unit * along[:, None])
        tl.store(own_ptr + row[:, None] * C + c[None, :], own, mask=wanted)
    tl.store(part_ptr + 2 * program * C + c, of_weight, mask=c < C)
    tl.store(part_ptr + (2 * program + 1) * C + c, of_bias, mask=c < C)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad and x [N, T, C], weight [C] -> gradients of x, weight and bias."""
    n, t, c = x.shape
    own = x.new_empty(x.shape)
    if not x.numel():
        return own, weight.new_zeros(c), weight.new_zeros(c)
    programs, share, count, columns, warps = row_shares(n * t, c)
    parts = x.new_empty(programs, 2, c, dtype=float32)
    layer_norm_backward_kernel[(programs,)](
        grad, x, weight, own, parts, n * t, t, share, eps,
        *grad.stride(), *x.stride(), *weight.stride(),
        C=c, ROWS=count, COLUMNS=columns, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    of_weight, of_bias = parts.sum(dim=0).to(weight.dtype)
    return own, of_weight.clone(), of_bias.clone()
