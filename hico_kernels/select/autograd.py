"""The gradient of gathering rows."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hico_kernels.dispatch import backward_overload, overload


class GatherTokens(torch.autograd.Function):
    """gather_tokens, differentiable in x."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, impl: str) -> Tensor:  # noqa: D102
        ctx.impl, ctx.num_rows = impl, x.shape[0]
        ctx.save_for_backward(index)
        return overload("gather_tokens", impl, x, index)(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        (index,) = ctx.saved_tensors
        run = backward_overload("gather_tokens_backward", ctx.impl, grad, index)
        return run(grad, index, ctx.num_rows), None, None
