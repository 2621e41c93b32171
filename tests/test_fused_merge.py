"""Operations of merging that do several things in one pass: what they give beside doing them in
turn, and their gradients. Every implementation that runs here; Triton's in its interpreter.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from hico_kernels import layer_norm_metric, merge_tokens, why_not
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
