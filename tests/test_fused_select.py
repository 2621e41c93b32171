"""Operations that do two things in one pass: what they give beside doing them in turn,
and their gradients. Every implementation that runs here; Triton's in its interpreter.
"""

import pytest
import torch
from torch.autograd import gradcheck

from hico_kernels import gather_rms_norm, gather_tokens, text_guided_scores, why_not
from hico_kernels.testing import assert_same_bits, cu_seqlens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def implementations(operation):
    x = torch.zeros(1, device=DEVICE)
    names = ("reference", "cpu", "triton")
    return [impl for impl in names if why_not(operation, impl, x) is None]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# --- scores of keys without rotary positions ------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("text_guided_scores_rotary"))
def test_rotating_while_loading_is_rotating_before(impl):
    """With positions, as Qwen2's own code does it in float32."""
    q, k = normal(3, 4, 32), normal(50, 2, 32, seed=1)
    frequencies = 1e4 ** -torch.arange(0, 1, 1 / 16, device=DEVICE)
    angles = torch.arange(50, device=DEVICE)[:, None] * frequencies
    cos, sin = (f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))
    low, high = k[..., :16], k[..., 16:]
    turned = k * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    ends = cu_seqlens((1, 2), DEVICE), cu_seqlens((20, 30), DEVICE)
    actual = text_guided_scores(q, k, *ends, cos=cos, sin=sin, impl=impl)
    expected = text_guided_scores(q, turned, *ends, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


# --- several tensors at once ----------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("gather_many"))
def test_each_tensor_gets_the_rows_that_it_would_get_alone(impl):
    x, index = normal(60, 9), torch.tensor([3, 3, 59, 0, 17], device=DEVICE)
    places, table = torch.arange(60, device=DEVICE) * 7, normal(60, 2, 5, dtype=torch.bfloat16)
    rows, kept, tables = gather_tokens(x, index, places, table, impl=impl)
    assert_same_bits(rows, x[index], "rows")
    assert_same_bits(kept, places[index], "positions")
    assert_same_bits(tables, table[index], "tables")


REAL = (
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)


@pytest.mark.parametrize("shape", [(9,), (9, 5), (9, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("impl", implementations("gather_many"))
def test_what_belongs_to_the_rows_may_be_of_any_real_dtype(impl, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype == torch.bool else 256  # every bit pattern, NaN too
    parts = (*shape, dtype.itemsize)
    patterns = torch.randint(0, high, parts, generator=generator, dtype=torch.uint8).to(DEVICE)
    given, index = patterns.view(dtype).squeeze(-1), torch.tensor([8, 0, 0, 3], device=DEVICE)
    stepped = patterns.repeat_interleave(2, 0).view(dtype).squeeze(-1)[::2]
    _, rows, others = gather_tokens(normal(9, 2), index, given, stepped, impl=impl)
    expected = patterns[index].view(dtype).squeeze(-1)
    assert_same_bits(rows, expected, "rows")
    assert_same_bits(others, expected, "rows of a view")
    if len(shape) == 2:
        turned = patterns.transpose(0, 1).contiguous().view(dtype).squeeze(-1).transpose(0, 1)
        for x in (given, turned):
            assert_same_bits(gather_tokens(x, index), expected, "rows alone")


@pytest.mark.parametrize("impl", implementations("gather_many"))
def test_the_bounds_count_what_each_sequence_keeps(impl):
    x, ends = normal(12, 2), cu_seqlens((4, 0, 5, 3), DEVICE)
    index = torch.tensor([0, 3, 4, 5, 5, 8, 11], device=DEVICE)
    _, kept = gather_tokens(x, index, cu_seqlens=ends, impl=impl)
    assert kept.tolist() == [0, 2, 2, 6, 7]
    assert kept.dtype == torch.int32


@pytest.mark.parametrize("impl", implementations("gather_many"))
def test_every_floating_tensor_gets_its_gradient(impl):
    x, table = (normal(8, 3, seed=s).requires_grad_() for s in (1, 2))
    wide, places = normal(8, 2, 2).requires_grad_(), torch.arange(8, device=DEVICE)
    index = torch.tensor([0, 2, 2, 7], device=DEVICE)
    ends = cu_seqlens((5, 3), DEVICE)
    rows, tables, others, _, bounds = gather_tokens(
        x, index, table, wide, places, cu_seqlens=ends, impl=impl
    )
    assert not bounds.requires_grad
    weights = [normal(*y.shape, seed=9) for y in (rows, tables, others)]
    products = zip((rows, tables, others), weights, strict=True)
    grads = torch.autograd.grad(sum((y * w).sum() for y, w in products), (x, table, wide))
    for grad, given, leaf in zip(grads, weights, (x, table, wide), strict=True):
        expected = torch.zeros_like(leaf).index_add(0, index, given)
        torch.testing.assert_close(grad, expected)


def test_only_some_need_a_gradient():
    x, table = normal(8, 3), normal(8, 2).requires_grad_()
    rows, tables = gather_tokens(x, torch.tensor([1, 1], device=DEVICE), table)
    assert not rows.requires_grad or rows.grad_fn is tables.grad_fn
    tables.sum().backward()
    assert table.grad.sum(1).tolist() == [0, 4, 0, 0, 0, 0, 0, 0]


def test_gradients_pass_the_numerical_check():
    x, table = (normal(6, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    index = torch.tensor([5, 0, 0], device=DEVICE)
    assert gradcheck(lambda a, b: gather_tokens(a, index, b, impl="reference"), (x, table))


# --- rows and their norm --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", implementations("gather_rms_norm"))
def test_the_norm_is_that_of_transformers(impl, dtype):
    """Qwen2's on the rows, to the bit but for the order of its sum."""
    norm = pytest.importorskip("transformers.models.qwen2.modeling_qwen2").Qwen2RMSNorm(48, 1e-5)
    norm = norm.to(DEVICE, dtype)
    norm.weight.data += normal(48, seed=3, dtype=dtype) / 4
    x, index = normal(30, 48, dtype=dtype), torch.tensor([0, 29, 4, 4], device=DEVICE)
    rows, normed = gather_rms_norm(x, index, norm.weight.data, 1e-5, impl=impl)
    assert_same_bits(rows, x[index], "rows")
    expected = norm(x[index]).detach()
    torch.testing.assert_close(normed, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("impl", implementations("gather_rms_norm"))
def test_the_gradients_of_rows_and_norm_add_up(impl):
    x, weight = normal(9, 12).requires_grad_(), normal(12, seed=1).requires_grad_()
    index = torch.tensor([8, 0, 0, 3], device=DEVICE)
    a, b = normal(4, 12, seed=2), normal(4, 12, seed=3)

    def by_autograd(x, index, weight):
        rows = x[index]
        share = (rows.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        return rows, rows * share * weight

    results = (gather_rms_norm(x, index, weight, 1e-3, impl=impl), by_autograd(x, index, weight))
    pairs = (torch.autograd.grad((r * a + n * b).sum(), (x, weight)) for r, n in results)
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradients_of_the_norm_pass_the_numerical_check():
    x, weight = (normal(*s, dtype=torch.float64).requires_grad_() for s in ((5, 6), (6,)))
    index = torch.tensor([4, 0, 0], device=DEVICE)
    assert gradcheck(lambda a, w: gather_rms_norm(a, index, w, 1e-3, impl="reference"), (x, weight))
