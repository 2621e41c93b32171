"""Scores against the full softmax, selection against sorting, even spacing against linspace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hico_kernels import (
    gather_tokens,
    select_topk,
    text_guided_scores,
    uniform_indices,
    why_not,
)
from hico_kernels.testing import assert_same_bits, assert_within_budget, cu_seqlens

EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None)
SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.lists(st.integers(0, 12), max_size=5)


def implementations(operation: str) -> list[str]:
    """Those for float32 on the CPU."""
    x = torch.zeros(1)
    return [impl for impl in ("reference", "cpu") if why_not(operation, impl, x) is None]


def normal(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- even spacing ---------------------------------------------------------------------------------


def linspace(n: int, keep: int) -> list[int]:
    return torch.linspace(0, n - 1, keep, dtype=torch.long).tolist()


@pytest.mark.parametrize("impl", implementations("uniform_indices"))
def test_even_spacing_is_linspace_for_every_small_pair(impl):
    for n in range(1, 90):
        for keep in range(1, n + 1):
            assert uniform_indices(n, keep, impl=impl).tolist() == linspace(n, keep), (n, keep)


@pytest.mark.parametrize("impl", implementations("uniform_indices"))
@given(st.integers(1, 300_000), st.floats(0, 1))
@EXAMPLES
def test_even_spacing_is_linspace_for_long_videos(impl, n, ratio):
    keep = math.ceil(n * ratio) if n < 20_000 else min(n, 1 + int(20_000 * ratio))
    assert uniform_indices(n, keep, impl=impl).tolist() == linspace(n, keep)


GOLDEN = {  # (n, keep) -> sum, first, last: from torch 2.13 on the CPU
    (8192, 6144): (25159681, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14], [8186, 8188, 8189, 8191]),
    (1024, 768): (392449, [0, 1, 2], [1023]),
    (8192, 4096): (16773121, [0], [8191]),
    (6144, 2048): (6289409, [0, 3, 6, 9], [6133, 6136, 6139, 6143]),
}


@pytest.mark.parametrize("impl", implementations("uniform_indices"))
@pytest.mark.parametrize(("pair", "golden"), GOLDEN.items(), ids=lambda x: str(x)[:12])
def test_even_spacing_has_the_golden_values(pair, golden, impl):
    total, first, last = golden
    indices = uniform_indices(*pair, impl=impl).tolist()
    assert sum(indices) == total
    assert indices[: len(first)] == first
    assert indices[-len(last) :] == last


# --- selection ------------------------------------------------------------------------------------


def naive_topk(scores: list[float], keep: int) -> list[int]:
    """By sorting pairs of score and index; NaN counts as the smallest score."""
    ranked = sorted(
        range(len(scores)), key=lambda i: (math.inf if math.isnan(scores[i]) else -scores[i], i)
    )
    return sorted(ranked[:keep])


def assert_is_naive(scores, lengths, keep, impl):
    chosen = select_topk(scores, cu_seqlens(lengths), keep, impl=impl)
    start, expected = 0, []
    for length, count in zip(lengths, keep, strict=True):
        own = scores[start : start + length].tolist()
        expected += [start + i for i in naive_topk(own, count)]
        start += length
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected


SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1.0, -1.0, 1e-45, -1e-45, 3.4e38]


@pytest.mark.parametrize("impl", implementations("select_topk"))
@pytest.mark.parametrize("values", ["normal", "few_values", "special"])
@given(LENGTHS, st.data(), SEEDS)
@EXAMPLES
def test_selection_is_the_naive_sort(impl, values, lengths, data, seed):
    keep = [data.draw(st.integers(0, n)) for n in lengths]
    scores = normal(sum(lengths), seed=seed)
    if values == "few_values":
        scores = scores.round()
    if values == "special":
        scores = torch.tensor(SPECIAL)[
            normal(sum(lengths), seed=seed).mul(1e4).long() % len(SPECIAL)
        ]
    assert_is_naive(scores, lengths, keep, impl)


@pytest.mark.parametrize("impl", implementations("select_topk"))
@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], 2, [0, 1]),
        ([1.0, 5.0, 1.0, 5.0, 5.0], 2, [1, 3]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([math.nan, 0.0, math.nan, -5.0], 2, [1, 3]),
        ([math.nan, -math.inf, 1.0], 2, [0, 2]),
        ([-math.inf, math.nan, 1.0], 2, [0, 2]),
        ([math.inf, math.nan, 3e38, math.inf], 3, [0, 2, 3]),
        ([math.nan] * 3, 2, [0, 1]),
        ([1.0, 1.0 + 2**-23, 1.0], 2, [0, 1]),
        ([-1e-45, 0.0, 1e-45], 2, [1, 2]),
    ],
)
def test_ties_nan_zeros_and_infinities_have_one_answer(scores, keep, expected, impl):
    chosen = select_topk(torch.tensor(scores), cu_seqlens([len(scores)]), [keep], impl=impl)
    assert chosen.tolist() == expected


@pytest.mark.parametrize("impl", implementations("select_topk"))
def test_a_long_sequence_with_thousands_of_ties_is_the_naive_sort(impl):
    scores = normal(40_000).mul(3).round() / 8
    assert_is_naive(scores, [33_000, 0, 7_000], [12_345, 0, 6_999], impl)


@pytest.mark.parametrize("impl", implementations("select_topk"))
@pytest.mark.parametrize("outlier", [-100.0, 100.0, math.nan])
@pytest.mark.parametrize("keep", [1, 100, 20_000, 39_900, 40_000])
def test_scores_with_a_period_mislead_no_sample(keep, outlier, impl):
    scores = normal(40_000)
    scores[:: 40_000 // 1024] = outlier  # what a kernel that looks at every n-th score would see
    assert_is_naive(scores, [40_000], [keep], impl)


@pytest.mark.parametrize("impl", implementations("select_topk"))
def test_the_largest_keys_of_a_narrow_range_are_found(impl):
    largest = torch.tensor([0x7F800000 - i for i in range(40_000)], dtype=torch.int32)
    scores = largest.flip(0).view(torch.float32)  # inf and the numbers below it, one ulp apart
    assert_is_naive(scores, [40_000], [7], impl)


# --- scores ---------------------------------------------------------------------------------------


def naive_scores(q, k, rows, keys, scale=None, wide=torch.float64):
    """The whole softmax of every sequence, keys repeated for every query head, in float64."""
    heads, groups = q.shape[1], k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out, row, key = [], 0, 0
    for r, s in zip(rows, keys, strict=True):
        own_q = q[row : row + r].to(wide).transpose(0, 1)
        own_k = k[key : key + s].to(wide).repeat_interleave(heads // groups, dim=1).transpose(0, 1)
        attention = torch.softmax(own_q @ own_k.mT * scale, dim=-1)
        out.append(attention.mean(dim=(0, 1)) if r else torch.zeros(s, dtype=wide))
        row, key = row + r, key + s
    return torch.cat([torch.zeros(0, dtype=wide), *out])


@pytest.mark.parametrize("impl", implementations("text_guided_scores"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(LENGTHS, st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), SEEDS)
@EXAMPLES
def test_scores_are_the_mean_of_the_full_softmax(
    impl, dtype, keys, data, groups, fold, width, seed
):
    rows = [data.draw(st.integers(0, 4)) for _ in keys]
    q = normal(sum(rows), groups * fold, width, seed=seed, dtype=dtype)
    k = normal(sum(keys), groups, width, seed=seed + 1, dtype=dtype)
    ends = cu_seqlens(rows), cu_seqlens(keys)
    scores = text_guided_scores(q, k, *ends, impl=impl)
    assert scores.dtype == torch.float32
    exact = naive_scores(q, k, rows, keys)
    plain = naive_scores(q, k, rows, keys, wide=torch.float32)
    logit = q.norm(dim=2).amax() * k.norm(dim=2).amax() / width**0.5 if q.numel() * k.numel() else 0
    assert_within_budget(scores, exact, plain, "scores", terms=float(logit))
    sums = [part.double().sum().item() for part in scores.split(keys)] if keys else []
    expected = [float(r > 0 and s > 0) for r, s in zip(rows, keys, strict=True)]
    assert sums == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("impl", implementations("text_guided_scores"))
def test_a_sequence_without_text_scores_zero(impl):
    ends = cu_seqlens([0, 2]), cu_seqlens([7, 5])
    scores = text_guided_scores(normal(2, 4, 8), normal(12, 2, 8), *ends, impl=impl)
    assert scores[:7].tolist() == [0.0] * 7
    assert (scores[7:] > 0).all()


@pytest.mark.parametrize("impl", implementations("text_guided_scores"))
def test_scores_do_not_depend_on_neighbours(impl):
    rows, keys = [2, 1, 3], [300, 40, 70]
    q, k = normal(6, 8, 32), normal(410, 2, 32)
    alone = text_guided_scores(q[2:3], k[300:340], cu_seqlens([1]), cu_seqlens([40]), impl=impl)
    q[:2], k[:300], q[3:], k[340:] = torch.nan, torch.inf, torch.nan, -torch.inf
    together = text_guided_scores(q, k, cu_seqlens(rows), cu_seqlens(keys), impl=impl)
    assert_same_bits(together[300:340], alone, "scores")


@pytest.mark.parametrize("impl", implementations("text_guided_scores"))
def test_scale_is_one_over_the_root_of_the_width_unless_given(impl):
    q, k, ends = normal(2, 4, 16), normal(9, 2, 16), (cu_seqlens([2]), cu_seqlens([9]))
    default = text_guided_scores(q, k, *ends, impl=impl)
    assert torch.equal(default, text_guided_scores(q, k, *ends, scale=0.25, impl=impl))
    sharp = text_guided_scores(q, k, *ends, scale=1.0, impl=impl)
    assert sharp.max() > default.max()


@pytest.mark.parametrize("impl", implementations("text_guided_scores"))
def test_large_logits_do_not_overflow(impl):
    q, k = 100 * normal(1, 4, 16), 100 * normal(50, 2, 16)
    scores = text_guided_scores(q, k, cu_seqlens([1]), cu_seqlens([50]), impl=impl)
    assert scores.isfinite().all()
    assert scores.sum().item() == pytest.approx(1, abs=1e-6)


# --- gathering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("gather_tokens"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(st.integers(1, 30), st.integers(0, 20), st.lists(st.integers(0, 10**6), max_size=40), SEEDS)
@EXAMPLES
def test_gathered_rows_are_the_rows(impl, dtype, rows, channels, index, seed):
    x = normal(rows, channels, seed=seed, dtype=dtype)
    index = torch.tensor([i % rows for i in index], dtype=torch.int64)
    assert_same_bits(gather_tokens(x, index, impl=impl), x[index], "rows")


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64]
)
def test_rows_of_other_dtypes_are_gathered_too(dtype):
    x = (normal(5, 3) * 9).to(dtype)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(gather_tokens(x, index), x[index])


def test_gradient_of_gathering_adds_up_where_a_row_was_taken_twice():
    index = torch.tensor([3, 0, 3, 3, 1])
    x = normal(5, 4, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: gather_tokens(x, index, impl="reference"), x)
    gather_tokens(x, index).sum().backward()
    assert x.grad[:, 0].tolist() == [1, 1, 0, 3, 0]


@pytest.mark.parametrize("impl", implementations("gather_tokens"))
def test_the_gradient_of_half_precision_is_added_in_float32(impl):
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    taken = gather_tokens(x, torch.zeros(1000, dtype=torch.int64), impl=impl)
    taken.backward(torch.full_like(taken, 1.0))
    assert x.grad.tolist() == [[1000.0] * 3, [0.0] * 3], "a running bfloat16 sum stops at 256"
