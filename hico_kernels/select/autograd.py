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


class GatherMany(torch.autograd.Function):
    """gather_many, differentiable in every floating tensor."""

    @staticmethod
    def forward(ctx, *given):  # noqa: D102
        # Named ones before *more: dynamo forgets ctx where a call has one argument more than names.
        x, index, cu_seqlens, impl, *more = given
        ctx.impl, ctx.num_rows = impl, x.shape[0]
        ctx.save_for_backward(index)
        ends = () if cu_seqlens is None else (cu_seqlens,)
        run = overload("gather_many", impl, x, index, *more, *ends)
        out = run(x, index, more, cu_seqlens)
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:], False  # cu_seqlens is last
        fixed = [y for y, wants in zip(out, wanted, strict=False) if not wants]
        ctx.mark_non_differentiable(*fixed)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *grads: Tensor):  # noqa: D102
        (index,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
        rows = []
        for wants, of in zip(wanted, (grad, *grads), strict=False):  # cu_seqlens is last
            if not wants:
                rows.append(None)
                continue
            flat = of.unsqueeze(1).flatten(1)
            run = backward_overload("gather_tokens_backward", ctx.impl, flat, index)
            back = run(flat, index, ctx.num_rows)
            rows.append(back.view(ctx.num_rows, *of.shape[1:]))
        return rows[0], None, None, None, *rows[1:]


class GatherRmsNorm(torch.autograd.Function):
    """gather_rms_norm, differentiable in x and weight: by the gradient of the norm, and by that of
    a gather.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, eps: float, impl: str):  # noqa: D102
        run = overload("gather_rms_norm", impl, x, index, weight)
        rows, normed = run(x, index, weight, eps)
        ctx.impl, ctx.num_rows, ctx.eps = impl, x.shape[0], eps
        ctx.save_for_backward(rows, index, weight)
        return rows, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows: Tensor, grad_normed: Tensor):  # noqa: D102
        rows, index, weight = ctx.saved_tensors
        given = grad_rows, grad_normed, rows, weight
        run = backward_overload("rms_norm_backward", ctx.impl, *given)
        own, grad_weight = run(*given, ctx.eps)
        grad = None
        if ctx.needs_input_grad[0]:
            run = backward_overload("gather_tokens_backward", ctx.impl, own, index)
            grad = run(own, index, ctx.num_rows)
        return grad, None, grad_weight, None, None
