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


class MergeSimilar(torch.autograd.Function):
    """merge_similar, differentiable in x and other."""

    @staticmethod
    def forward(ctx, x: Tensor, other, metric: Tensor, r: int, sizes, rest: tuple, impl: str):  # noqa: D102
        run = overload("merge_similar", impl, *(t for t in (x, metric, other) if t is not None))
        tokens, merged, assignment, places, others = run(x, metric, r, sizes, other, *rest)
        ctx.impl = impl
        ctx.save_for_backward(assignment, merged, sizes)
        ctx.mark_non_differentiable(merged, assignment, places)
        return tokens, others, merged, assignment, places

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_other: Tensor, *_):  # noqa: D102
        of_x, of_other = (
            _backward(ctx, given, *ctx.saved_tensors) if wants else None
            for given, wants in zip((grad, grad_other), ctx.needs_input_grad[:2], strict=True)
        )
        return of_x, of_other, None, None, None, None, None


class LayerNormMetric(torch.autograd.Function):
    """layer_norm_metric, differentiable in x, weight and bias; the metric is a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int, impl):  # noqa: D102
        y, metric = overload("layer_norm_metric", impl, x, weight, bias)(
            x, weight, bias, eps, num_heads
        )
        ctx.eps, ctx.impl = eps, impl
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(metric)
        return y, metric

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):  # noqa: D102
        x, weight = ctx.saved_tensors
        run = backward_overload("layer_norm_backward", ctx.impl, grad, x, weight)
        of_x, of_weight, of_bias = run(grad, x, weight, ctx.eps)
        return of_x, of_weight, of_bias, None, None, None
