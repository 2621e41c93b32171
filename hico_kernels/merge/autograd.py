"""Gradients of merging: a gather, since every token goes into exactly one position."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hico_kernels.dispatch import backward_overload, overload


def _backward(
    ctx, grad: Tensor, assignment: Tensor, merged: Tensor, sizes: Tensor | None
) -> Tensor:
    return backward_overload("merge_backward", ctx.impl, grad)(grad, assignment, merged, sizes)


class MergeTokens(torch.autograd.Function):
    """merge_tokens, differentiable in x."""

    @staticmethod
    def forward(ctx, x: Tensor, num_tokens: int, num_heads: int, metric, impl: str):  # noqa: D102
        run = overload("merge_tokens", impl, *(t for t in (x, metric) if t is not None))
        tokens, sizes, assignment = run(x, num_tokens, num_heads, metric)
        ctx.impl = impl
        ctx.save_for_backward(assignment, sizes)
        ctx.mark_non_differentiable(sizes, assignment)
        return tokens, sizes, assignment

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):  # noqa: D102
        assignment, sizes = ctx.saved_tensors
        return _backward(ctx, grad, assignment, sizes, None), None, None, None, None


class MergeApply(torch.autograd.Function):
    """merge_apply, differentiable in x; the sizes are counts and get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, assignment: Tensor, num_tokens: int, sizes, impl: str):  # noqa: D102
        run = overload("merge_apply", impl, x)
        tokens, merged = run(x, assignment, num_tokens, sizes)
        ctx.impl = impl
        ctx.save_for_backward(assignment, merged, sizes)
        ctx.mark_non_differentiable(merged)
        return tokens, merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):  # noqa: D102
        assignment, merged, sizes = ctx.saved_tensors
        return _backward(ctx, grad, assignment, merged, sizes), None, None, None, None
