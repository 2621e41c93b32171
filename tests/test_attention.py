"""Ragged attention against dense attention of every sequence on its own, and by its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from hico_kernels import ragged_attention, ragged_decode_attention, why_not
from hico_kernels.testing import assert_same_bits, assert_within_budget, cu_seqlens

EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None)
SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5)


def implementations(operation: str) -> list[str]:
    """Those for float32 on the CPU."""
    x = torch.zeros(1)
    return [impl for impl in ("reference", "cpu") if why_not(operation, impl, x) is None]


def normal(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(rows, keys, heads=4, groups=2, width=8, seed=0, dtype=torch.float32):
    q = normal(sum(rows), heads, width, seed=seed, dtype=dtype)
    k = normal(sum(keys), groups, width, seed=seed + 1, dtype=dtype)
    return q, k, normal(sum(keys), groups, width, seed=seed + 2, dtype=dtype)


def attend(q, k, v, rows, keys, **kwargs):
    ends = cu_seqlens(rows), cu_seqlens(keys)
    longest = max(rows, default=0), max(keys, default=0)
    return ragged_attention(q, k, v, *ends, *longest, **kwargs)


# --- against torch, one sequence at a time --------------------------------------------------------


def dense(q, k, v, causal, bias=None, wide=torch.float64):
    """One sequence in float64, causal from the bottom right: out [S, H, D] and lse [H, S]."""
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    fold = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(fold, 1).transpose(0, 1) for x in (k, v))
    mask = torch.zeros(q.shape[1], k.shape[1], dtype=wide)
    if bias is not None:
        mask = mask + bias.to(wide)
    if causal:
        last = k.shape[1] - q.shape[1]  # the key that query 0 sees last
        row, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        mask = mask.masked_fill(key > row + last, -math.inf)
    lse = torch.logsumexp(q @ k.mT / q.shape[2] ** 0.5 + mask, dim=-1)
    sees = (
        mask.amax(dim=-1) > -math.inf if k.shape[1] else torch.zeros(q.shape[1], dtype=torch.bool)
    )
    out = torch.zeros_like(q)
    if sees.any():
        out[:, sees] = scaled_dot_product_attention(
            q[None, :, sees], k[None], v[None], attn_mask=mask[sees]
        )[0]
    return out.transpose(0, 1), lse


def each_dense(q, k, v, rows, keys, causal, bias=None, wide=torch.float64):
    pieces = zip(
        q.split(rows), k.split(keys), v.split(keys),
        [None] * len(rows) if bias is None else bias.split(keys), strict=True,
    )  # fmt: skip
    results = [dense(*piece[:3], causal, piece[3], wide) for piece in pieces]
    nothing = [q.to(wide)], [q[..., 0].T.to(wide)]
    outs, lses = zip(*results, strict=True) if results else nothing
    return torch.cat(outs), torch.cat(lses, dim=1)


def plain_dense(q, *rest):
    """The same in plain torch, in the precision of the call: float32 inside, one rounding."""
    out, lse = each_dense(q, *rest, wide=torch.float32)
    return out.to(q.dtype), lse


def size_of_terms(q, k, v, bias=None):
    """How large what is added up gets: for out, and for lse. A handful of terms may well cancel."""
    if not q.numel() or not k.numel():
        return 0.0, 0.0
    logit = q.double().norm(dim=2).max() * k.double().norm(dim=2).max() / q.shape[2] ** 0.5
    logit = logit.item() + (0 if bias is None else bias.abs().max().item())
    return v.double().abs().max().item() * max(logit, 1), logit


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.booleans(), SEEDS)
@EXAMPLES
def test_every_sequence_is_dense_attention(
    impl, dtype, causal, lengths, groups, fold, width, biased, seed
):
    rows, keys = ([pair[i] for pair in lengths] for i in (0, 1))
    q, k, v = qkv(rows, keys, groups * fold, groups, width, seed, dtype)
    bias = normal(sum(keys), seed=seed + 3) if biased else None
    kwargs = {"causal": causal, "key_bias": bias, "return_lse": True}
    actual = attend(q, k, v, rows, keys, impl=impl, **kwargs)
    plain = plain_dense(q, k, v, rows, keys, causal, bias)
    exact = each_dense(q, k, v, rows, keys, causal, bias)
    terms = size_of_terms(q, k, v, bias)
    for i, name in enumerate(("out", "lse")):
        assert_within_budget(actual[i], exact[i], plain[i], name, terms=terms[i])


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_the_last_query_sees_every_key_and_the_first_fewer(impl):
    q, k, v = qkv([2], [4])
    out = attend(q, k, v, [2], [4], impl=impl)
    full = attend(q, k, v, [2], [4], causal=False, impl=impl)
    short = attend(q[:1], k[:3], v[:3], [1], [3], causal=False, impl=impl)
    torch.testing.assert_close(out[1], full[1], rtol=0, atol=5e-7)
    torch.testing.assert_close(out[0], short[0], rtol=0, atol=5e-7)
    assert (out[0] - full[0]).abs().max() > 1e-2


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_a_query_that_sees_no_key_gives_zeros(impl):
    q, k, v = qkv([5, 3], [2, 0])
    out, lse = attend(q, k, v, [5, 3], [2, 0], return_lse=True, impl=impl)
    hidden = [0, 1, 2, 5, 6, 7]
    assert (out[hidden] == 0).all()
    assert (lse[:, hidden] == -math.inf).all()
    assert (out[3:5] != 0).all()
    assert lse[:, 3:5].isfinite().all()


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_does_not_depend_on_its_neighbours(impl, causal):
    rows, keys = [70, 33, 20], [70, 40, 20]
    q, k, v = qkv(rows, keys, 8, 2, 32)
    mine = slice(70, 103), slice(70, 110)
    alone = attend(
        q[mine[0]], k[mine[1]], v[mine[1]], [33], [40], causal=causal, return_lse=True, impl=impl
    )
    for x, own in ((q, mine[0]), (k, mine[1]), (v, mine[1])):
        x[: own.start], x[own.stop :] = torch.nan, torch.inf
    out, lse = attend(q, k, v, rows, keys, causal=causal, return_lse=True, impl=impl)
    assert_same_bits(out[mine[0]], alone[0], "out")
    assert_same_bits(lse[:, mine[0]], alone[1], "lse")


# --- key bias: one merged key stands for all its members ------------------------------------------


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=3), SEEDS)
@EXAMPLES
def test_the_log_of_a_size_is_that_many_equal_keys(sizes, seed):
    keys = [len(own) for own in sizes]
    flat = torch.tensor([size for own in sizes for size in own])
    q, k, v = qkv([3] * len(keys), keys, seed=seed, dtype=torch.float64)
    merged = attend(
        q, k, v, [3] * len(keys), keys, causal=False, key_bias=flat.double().log(),
        return_lse=True, impl="reference",
    )  # fmt: skip
    many = [x.repeat_interleave(flat, dim=0) for x in (k, v)]
    repeated = attend(
        q, *many, [3] * len(keys), [sum(own) for own in sizes], causal=False,
        return_lse=True, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(merged, repeated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_a_key_bias_of_minus_infinity_hides_a_key(impl):
    q, k, v = qkv([4], [6])
    bias = torch.zeros(6)
    bias[3] = -torch.inf
    out = attend(q, k, v, [4], [6], causal=False, key_bias=bias, impl=impl)
    left = [0, 1, 2, 4, 5]
    without = attend(q, k[left], v[left], [4], [5], causal=False, impl=impl)
    torch.testing.assert_close(out, without, rtol=0, atol=5e-7)


# --- grouped heads, scale, gradients --------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_consecutive_query_heads_share_a_key_head(impl):
    q, k, v = qkv([5], [5], heads=6, groups=2)
    shared = attend(q, k, v, [5], [5], impl=impl)
    for head in range(6):
        own = slice(head // 3, head // 3 + 1)
        one = attend(q[:, head : head + 1], k[:, own], v[:, own], [5], [5], impl=impl)
        torch.testing.assert_close(shared[:, head], one[:, 0], rtol=0, atol=5e-7)


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_scale_is_one_over_the_root_of_the_width_unless_given(impl):
    q, k, v = qkv([5], [5], width=16)
    default = attend(q, k, v, [5], [5], impl=impl)
    assert torch.equal(default, attend(q, k, v, [5], [5], scale=0.25, impl=impl))
    assert not torch.equal(default, attend(q, k, v, [5], [5], scale=1.0, impl=impl))


@pytest.mark.parametrize("biased", [False, True], ids=["", "key_bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("rows", "keys"), [([3, 2], [3, 2]), ([2, 1], [4, 3]), ([4, 2], [2, 0]), ([0, 2], [2, 2])]
)
def test_gradients_of_attention(rows, keys, causal, biased):
    x = [y.requires_grad_() for y in qkv(rows, keys, width=3, dtype=torch.float64)]
    bias = normal(sum(keys), dtype=torch.float64) if biased else None
    assert gradcheck(
        lambda *x: attend(*x, rows, keys, causal=causal, key_bias=bias, impl="reference"), x
    )


def test_one_tensor_may_be_queries_keys_and_values_and_collects_all_gradients():
    x = normal(5, 2, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: attend(x, x, x, [3, 2], [3, 2], impl="reference"), x)


@pytest.mark.parametrize("impl", implementations("ragged_attention"))
def test_every_implementation_has_the_gradients_of_dense_attention(impl):
    rows, keys = [9, 4, 3], [9, 7, 1]
    base, weight = qkv(rows, keys), normal(16, 4, 8, seed=9)
    leaves = [x.clone().requires_grad_() for x in base]
    wide = [x.double().requires_grad_() for x in base]
    own = torch.autograd.grad((attend(*leaves, rows, keys, impl=impl) * weight).sum(), leaves)
    out, _ = each_dense(*wide, rows, keys, True)
    exact = torch.autograd.grad((out * weight).sum(), wide)
    for name, a, b in zip("qkv", own, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6, msg=f"gradient of {name}")


def test_the_lse_carries_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv([3], [3]))
    out, lse = attend(q, k, v, [3], [3], return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("ragged_decode_attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.lists(st.integers(0, 14), max_size=4), st.integers(0, 3), st.integers(1, 3), SEEDS)
@EXAMPLES
def test_decoding_is_ragged_attention_with_one_query(impl, dtype, lengths, spare, groups, seed):
    longest, b = max(lengths, default=0) + spare, len(lengths)
    q = normal(b, 2 * groups, 8, seed=seed, dtype=dtype)
    caches = [normal(b, longest, groups, 8, seed=seed + i, dtype=dtype) for i in (1, 2)]
    valid = torch.arange(longest) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    for cache in caches:
        cache[~valid] = torch.nan  # entries that are not valid yet
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)
    actual = ragged_decode_attention(q, *caches, kv_lengths, impl=impl)
    packed = [cache[valid] for cache in caches]
    exact, _ = each_dense(q, *packed, [1] * b, lengths, True)
    plain, _ = plain_dense(q, *packed, [1] * b, lengths, True)
    terms, _ = size_of_terms(q, *packed)
    assert_within_budget(actual, exact, plain, "decode", terms=terms)
    ragged = attend(q, *packed, [1] * b, lengths)
    assert_within_budget(ragged, exact, plain, "as ragged attention", terms=terms)


@pytest.mark.parametrize("impl", implementations("ragged_decode_attention"))
def test_entries_beyond_the_length_change_no_bit(impl):
    q, lengths = normal(3, 4, 32), torch.tensor([100, 1, 0])
    k, v = normal(3, 130, 2, 32, seed=1), normal(3, 130, 2, 32, seed=2)
    out = ragged_decode_attention(q, k, v, lengths, impl=impl)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = torch.nan, torch.inf
    assert_same_bits(ragged_decode_attention(q, k, v, lengths, impl=impl), out, "out")
    assert (out[2] == 0).all()


def test_blocks_of_queries_give_what_all_at_once_give(monkeypatch):
    q = torch.randn(23, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(19, 2, 8, dtype=torch.float64, requires_grad=True)
    ends = cu_seqlens((9, 14)), cu_seqlens((12, 7))

    def everything(causal):
        out, lse = ragged_attention(
            q, k, 2 * k, *ends, 14, 12, causal=causal, return_lse=True, impl="reference"
        )
        return out, lse, *torch.autograd.grad(out.sin().sum(), (q, k))

    for causal in (True, False):
        expected = everything(causal)
        with monkeypatch.context() as patch:
            patch.setattr("hico_kernels.attention.reference._LOGITS", 4 * 12 * 3)
            torch.testing.assert_close(everything(causal), expected)
