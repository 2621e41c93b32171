"""The gradient of ragged attention, recomputed from the saved log-sum-exp."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hico_kernels.dispatch import backward_overload, overload


class RaggedAttention(torch.autograd.Function):
    """ragged_attention, differentiable in q, k and v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_q, cu_k, rest: tuple, impl: str):  # noqa: D102
        *numbers, key_bias = rest
        cu_k = cu_q if cu_k is None else cu_k
        bias = () if key_bias is None else (key_bias,)  # not every implementation takes one
        run = overload("ragged_attention", impl, q, k, v, *bias)
        out, lse = run(q, k, v, cu_q, cu_k, *numbers, key_bias)
        ctx.numbers, ctx.impl = numbers, impl
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, key_bias)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):  # noqa: D102
        q, k, v, out, lse, cu_q, cu_k, key_bias = ctx.saved_tensors
        bias = () if key_bias is None else (key_bias,)
        run = backward_overload("ragged_attention_backward", ctx.impl, grad, q, k, v, *bias)
        grads = run(grad, q, k, v, out, lse, cu_q, cu_k, *ctx.numbers, key_bias)
        return (*grads, None, None, None, None)
