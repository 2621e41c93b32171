"""The two ways in which attention takes the sizes of tokens, and what it may err by."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hico_kernels.testing.budget import assert_within_budget
from hico_kernels.tome.attention import Proportional, attend, by_channels


def defined(q, k, v, bias, scale):
    logits = q @ k.mT * (scale or q.shape[-1] ** -0.5) + bias[:, None, None].to(q.dtype)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("way", [attend, by_channels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "scale"), [(64, None), (72, None), (20, 0.3)])
def test_sizes_count(way, dtype, width, scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, width).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 200, (2, 50))
    sizes[1, 40:] = 0  # padding
    bias = sizes.float().log()
    exact = defined(q.double(), k.double(), v.double(), sizes.double().log(), scale)
    plain = defined(q, k, v, bias, scale)
    assert_within_budget(way(q, k, v, bias, scale), exact, plain, way.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "scale"), [(72, None), (20, 0.3)])
@pytest.mark.parametrize("counted", [True, False])
def test_sizes_count_in_packed_sequences(dtype, width, scale, counted):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 50, width).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 200, (1, 50)) if counted else torch.ones(1, 50)
    ends = torch.tensor([0, 9, 10, 50], dtype=torch.int32)

    def each(q, k, v):
        bias = sizes.to(torch.float64 if q.dtype == torch.float64 else torch.float32).log()
        parts = [(*(y[:, :, a:b] for y in (q, k, v)), bias[:, a:b]) for a, b in pairwise(ends)]
        return torch.cat([defined(*part, scale) for part in parts], dim=2)

    with Proportional(sizes.log() if counted else None, (ends, 40)) as seen:
        got = F.scaled_dot_product_attention(q, k, v, scale=scale)
    exact = each(q.double(), k.double(), v.double())
    assert_within_budget(got, exact, each(q, k, v), "packed")
    assert seen.keys[0] is k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_channels_hold_a_bias_as_well_as_a_mask(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, 64).mul(0.01).to(dtype) for _ in range(3))
    bias = torch.linspace(0, 6, 100).view(2, 50)
    exact = defined(q.double(), k.double(), v.double(), bias, None)
    by_mask = attend(q, k, v, bias, None)
    assert_within_budget(by_channels(q, k, v, bias, None), exact, by_mask, "by_channels")


@pytest.mark.parametrize("way", [attend, by_channels])
def test_gradients_flow(way):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float32, requires_grad=True) for _ in range(3))
    bias = torch.randint(1, 9, (1, 9)).float().log()
    mine = torch.autograd.grad(way(q, k, v, bias, None).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(defined(q, k, v, bias, None).square().sum(), (q, k, v))
    torch.testing.assert_close(mine, theirs)


def test_other_calls_are_left_alone():
    q = torch.randn(1, 2, 9, 8)
    with Proportional(torch.zeros(1, 9)) as seen:
        x = F.softmax(q, -1) + q.relu()
        assert torch.equal(x, torch.softmax(q, -1) + torch.relu(q))
        assert not seen.keys
        F.scaled_dot_product_attention(q, q, q)
    assert len(seen.keys) == 1
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert len(seen.keys) == 1


@pytest.mark.parametrize("settings", [{"is_causal": True}, {"attn_mask": torch.zeros(9, 9)}])
def test_masks_are_refused(settings):
    q = torch.randn(1, 2, 9, 8)
    with Proportional(None), pytest.raises(ValueError, match="attention_mask: merged tokens"):
        F.scaled_dot_product_attention(q, q, q, **settings)
