"""Operations of merging that do several things in one pass: what they give beside doing them in
turn, and their gradients. Every implementation that runs here; Triton's in its interpreter.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from hico_kernels import (
    bipartite_soft_matching,
    layer_norm_metric,
    merge_similar,
    merge_tokens,
    why_not,
)
from hico_kernels.testing import assert_same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def implementations(operation):
    x = torch.zeros(1, device=DEVICE)
    names = ("reference", "cpu", "triton")
    return [impl for impl in names if why_not(operation, impl, x) is None]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# --- the norm before merging, and its metric ------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", implementations("layer_norm_metric"))
def test_a_tower_ends_in_torchs_norm_and_merges_as_without_the_metric(impl, dtype):
    x, weight, bias = (normal(*s, seed=1, dtype=dtype) for s in ((2, 40, 24), (24,), (24,)))
    y, metric = layer_norm_metric(x, weight, bias, 1e-5, 4, impl=impl)
    expected = F.layer_norm(x, (24,), weight, bias, 1e-5)
    rounding = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=2 * rounding)
    ours, theirs = merge_tokens(y, 9, metric=metric), merge_tokens(y, 9, num_heads=4)
    assert_same_bits(ours.assignment, theirs.assignment, "assignment")
    assert_same_bits(ours.sizes, theirs.sizes, "sizes")


@pytest.mark.parametrize("impl", implementations("layer_norm_metric"))
def test_the_gradients_of_the_norm_are_torchs(impl):
    leaves = [normal(*s, seed=2).requires_grad_() for s in ((2, 7, 12), (12,), (12,))]
    given = normal(2, 7, 12, seed=3)
    y, metric = layer_norm_metric(*leaves, 1e-3, 3, impl=impl)
    assert not metric.requires_grad
    expected = F.layer_norm(leaves[0], (12,), *leaves[1:], 1e-3)
    pairs = (torch.autograd.grad((out * given).sum(), leaves) for out in (y, expected))
    for actual, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_the_gradients_of_the_norm_pass_the_numerical_check():
    leaves = [normal(*s, dtype=torch.float64).requires_grad_() for s in ((1, 3, 4), (4,), (4,))]
    assert gradcheck(lambda *a: layer_norm_metric(*a, 1e-2, 2, impl="reference")[0], leaves)


# --- a step of a ViT block ------------------------------------------------------------------------

KINDS = [{}, {"class_token": True}, {"class_token": True, "distill_token": True}]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "class", "distill"])
@pytest.mark.parametrize("impl", implementations("merge_similar"))
def test_a_step_is_matching_and_merging_in_turn(impl, kind):
    x, other = normal(2, 31, 10), normal(2, 31, 4, seed=1)
    metric, sizes = normal(2, 31, 6, seed=2), torch.arange(62, device=DEVICE).view(2, 31) % 7
    step = merge_similar(x, metric, 9, sizes, other=other, order="matching", impl=impl, **kind)
    matching = bipartite_soft_matching(metric, 9, impl="reference", **kind)
    assert_same_bits(step.matching.assignment, matching.assignment, "assignment")
    assert step.matching.num_tokens == 22
    for merged, given in ((step.tokens, x), (step.other, other)):
        expected, total = matching.merge(given, sizes, impl="reference")
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
        assert_same_bits(step.sizes, total, "sizes")


@pytest.mark.parametrize("kind", [{}, {"front": 2}, {"front": 3, "class_token": True}])
@pytest.mark.parametrize("impl", implementations("merge_similar"))
def test_in_spatial_order_every_token_stands_at_its_own_place_or_its_targets(impl, kind):
    x, metric = normal(2, 40, 5), normal(2, 40, 6, seed=1)
    step = merge_similar(x, metric, 11, impl=impl, **kind)
    assert (step.places.diff(dim=1) > 0).all()
    first = kind.get("front", 0) + kind.get("class_token", False)
    rows = torch.arange(29, device=DEVICE)
    for n in range(2):
        into = step.matching.assignment[n]
        assert (into[step.places[n]] == rows).all()  # who gives the place is a member
        assert (into[:first] == rows[:first]).all()
        counts = into.bincount(minlength=29)
        assert_same_bits(step.sizes[n], counts.int(), "sizes")
        targets = step.places[n][counts > 1] - kind.get("front", 0)
        assert (targets % 2 == 1).all()
        means = torch.stack([x[n][into == k].mean(0) for k in range(29)])
        torch.testing.assert_close(step.tokens[n], means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", implementations("merge_similar"))
def test_r_is_at_most_half_of_what_may_merge(impl):
    x = normal(1, 12, 4)
    assert merge_similar(x, x, 99, front=3, class_token=True, impl=impl).tokens.shape[1] == 8
    assert merge_similar(x, x, 99, front=12, impl=impl).tokens.shape[1] == 12


@pytest.mark.parametrize("impl", implementations("merge_similar"))
def test_the_gradients_of_a_step_are_those_in_turn(impl):
    x, other = normal(2, 15, 4).requires_grad_(), normal(2, 15, 3, seed=1).requires_grad_()
    metric, sizes = normal(2, 15, 5, seed=2), torch.arange(30, device=DEVICE).view(2, 15) % 4 + 1
    step = merge_similar(x, metric, 6, sizes, other=other, order="matching", impl=impl)
    matching = bipartite_soft_matching(metric, 6, impl="reference")
    in_turn = [matching.merge(t, sizes, impl="reference")[0] for t in (x, other)]
    weights = [normal(*y.shape, seed=3) for y in in_turn]
    pairs = []
    for tokens in ((step.tokens, step.other), in_turn):
        loss = sum((y * w).sum() for y, w in zip(tokens, weights, strict=True))
        pairs.append(torch.autograd.grad(loss, (x, other)))
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(merge_similar(x, metric, 6, impl=impl).tokens.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", ["auto", *implementations("merge_similar")])
def test_what_is_merged_beside_x_has_a_dtype_of_its_own(impl, dtype):
    """As under autocast, where a residual stream is float32 and what is added to it is not."""
    x, metric = normal(2, 15, 4), normal(2, 15, 5, seed=2)
    other = normal(2, 15, 3, seed=1, dtype=dtype).requires_grad_()
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="every tensor is read as float32, got one of float64"):
            merge_similar(x, metric, 6, other=other, impl=impl)
        return
    step = merge_similar(x, metric, 6, other=other, impl=impl)
    expected, _ = step.matching.merge(other, impl="reference")
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(step.other, expected, rtol=rounding, atol=rounding)
    weights = normal(*expected.shape, seed=3, dtype=dtype)
    pair = (torch.autograd.grad((y * weights).sum(), other)[0] for y in (step.other, expected))
    torch.testing.assert_close(*pair, rtol=rounding, atol=rounding)
