"""The public functions in torch.compile: whole graphs, one for all lengths, the same bits."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hico_kernels as hk
from hico_kernels.testing import assert_same_bits, cu_seqlens


def normal(*shape, gradient=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, requires_grad=gradient)


def match_merge_unmerge(metric, x, sizes, r):
    matching = hk.bipartite_soft_matching(metric, r, class_token=True)
    tokens, merged = matching.merge(x, sizes)
    return tokens, merged, matching.unmerge(tokens)


def self_attention(x, cu, longest):
    return hk.ragged_attention(x, x, x, cu, cu, longest, longest)


def biased_attention(q, k, v, cu, longest, bias):
    return hk.ragged_attention(
        q, k, v, cu, cu, longest, longest, causal=False, key_bias=bias, return_lse=True
    )


def cross_attention(q, k, v, cu_q, cu_k, longest_q, longest_k):
    return hk.ragged_attention(q, k, v, cu_q, cu_k, longest_q, longest_k)


def clips(n, t, **kwargs):
    return normal(n, t, 24, **kwargs)


# Sizes that mean different things differ in every first call: dynamo would take them for one.
LENGTHS = ((11, 5, 7), (13, 4), (9, 9, 10, 6))


def merging_calls(gradient):
    for n, t, k in ((2, 12, 5), (3, 19, 6), (5, 40, 9)):
        yield clips(n, t, gradient=gradient), k


def merging_calls_with_metric(gradient):
    for (x, k), d in zip(merging_calls(gradient), (5, 6, 8), strict=True):
        yield x, k, normal(*x.shape[:2], d)


def merge_by_metric(x, k, metric):
    return hk.merge_tokens(x, k, metric=metric)


def matching_calls(gradient):
    for n, t, r in ((2, 12, 5), (3, 19, 6), (5, 40, 9)):
        yield normal(n, t, 8), clips(n, t, gradient=gradient), 1 + normal(n, t).abs(), r


def similar_calls(gradient):
    for (metric, x, sizes, r), c in zip(matching_calls(gradient), (7, 9, 10), strict=True):
        yield x, metric, r, sizes, normal(*x.shape[:2], c, gradient=gradient)


def merge_similar(x, metric, r, sizes, other):
    step = hk.merge_similar(x, metric, r, sizes, other=other, class_token=True)
    return step.tokens, step.other, step.sizes, step.matching.assignment, step.places


def gather_calls(gradient):
    for rows, index in ((10, [1, 2]), (20, [3, 3, 0]), (30, [4, 1, 2, 9])):
        yield normal(rows, 7, gradient=gradient), torch.tensor(index)


def many_calls(gradient):
    for rows, index in ((10, [1, 2]), (20, [3, 3, 7]), (30, [1, 1, 2, 9])):
        tables = normal(rows, 5, gradient=gradient)
        ends = torch.tensor([0, 4, rows])
        yield (
            normal(rows, 7, gradient=gradient),
            torch.tensor(index),
            torch.arange(rows),
            tables,
            ends,
        )


def gather_many(x, index, places, tables, ends):
    return hk.gather_tokens(x, index, places, tables, cu_seqlens=ends)


def norm_calls(gradient):
    for x, index in gather_calls(gradient):
        yield x, index, normal(7, gradient=gradient)


def gather_rms_norm(x, index, weight):
    return hk.gather_rms_norm(x, index, weight, 1e-6)


def metric_calls(gradient):
    for n, t in ((2, 12), (3, 19), (5, 40)):
        w = normal(24, gradient=gradient)
        yield clips(n, t, gradient=gradient), w, normal(24, gradient=gradient) + 1


def layer_norm_metric(x, weight, bias):
    return hk.layer_norm_metric(x, weight, bias, 1e-6, 4)


# One tensor in two places, which torch.compile refuses in a call of an autograd.Function.


def itself_calls(gradient):
    for _, x, _, r in matching_calls(gradient):
        yield x, r


def merge_with_itself(x, r):
    step = hk.merge_similar(x, x, r, other=x)
    return step.tokens, step.other, step.places


def merge_weighted_by_places(metric, x, r):
    matching = hk.bipartite_soft_matching(metric, r)
    return matching.merge(x, matching.assignment)


def weighted_by_places_calls(gradient):
    for metric, x, _, r in matching_calls(gradient):
        yield metric, x, r


def gather_repeated(x, index, places, table, ends):
    return hk.gather_tokens(x, index, table, x, places, table, places, cu_seqlens=ends)


def one_weight_calls(gradient):
    for x, weight, _ in metric_calls(gradient):
        yield x, weight


def norm_of_one_weight(x, weight):
    return hk.layer_norm_metric(x, weight, weight, 1e-6, 4)


def self_calls(gradient):
    for lengths in LENGTHS:
        x = normal(sum(lengths), 6, 16, gradient=gradient)
        yield x, cu_seqlens(lengths), max(lengths)


def qkv(rows, keys, gradient):
    return tuple(normal(n, h, 16, gradient=gradient) for n, h in ((rows, 6), (keys, 2), (keys, 2)))


def biased_calls(gradient):
    for lengths in LENGTHS:
        s = sum(lengths)
        yield (*qkv(s, s, gradient), cu_seqlens(lengths), max(lengths), normal(s))


def cross_calls(gradient):
    for keys in LENGTHS:
        rows = [n - 2 for n in keys]
        ends = cu_seqlens(rows), cu_seqlens(keys)
        yield (*qkv(sum(rows), sum(keys), gradient), *ends, max(rows), max(keys))


def score_calls(_):
    for rows, keys in zip(((8, 9, 3), (1, 2), (5, 1, 2, 0)), LENGTHS, strict=True):
        q, k, _v = qkv(sum(rows), sum(keys), False)
        yield q, k, cu_seqlens(rows), cu_seqlens(keys)


def score_rotary_calls(_):
    for q, k, *ends in score_calls(None):
        yield q, k, *ends, normal(k.shape[0], 16), normal(k.shape[0], 16) + 1


def score_rotary(q, k, cu_q, cu_k, cos, sin):
    return hk.text_guided_scores(q, k, cu_q, cu_k, cos=cos, sin=sin)


def topk_calls(_):
    for lengths in ((11, 5, 7), (13, 4, 9), (9, 30, 6)):  # a batch has one size: `keep` is a list
        yield normal(sum(lengths)), cu_seqlens(lengths), [n // 2 for n in lengths]


def decode_calls(_):
    for b, longest in ((3, 11), (4, 14), (5, 17)):
        cache = normal(b, longest, 2, 16)
        yield normal(b, 6, 16), cache, cache + 1, torch.arange(1, b + 1)


FUNCTIONS = {
    "merge_tokens": (hk.merge_tokens, merging_calls),
    "merge_by_metric": (merge_by_metric, merging_calls_with_metric),
    "match_merge_unmerge": (match_merge_unmerge, matching_calls),
    "gather_tokens": (hk.gather_tokens, gather_calls),
    "merge_similar": (merge_similar, similar_calls),
    "gather_many": (gather_many, many_calls),
    "gather_rms_norm": (gather_rms_norm, norm_calls),
    "layer_norm_metric": (layer_norm_metric, metric_calls),
    "merge_with_itself": (merge_with_itself, itself_calls),
    "merge_weighted_by_places": (merge_weighted_by_places, weighted_by_places_calls),
    "gather_repeated": (gather_repeated, many_calls),
    "norm_of_one_weight": (norm_of_one_weight, one_weight_calls),
    "self_attention": (self_attention, self_calls),
    "biased_attention": (biased_attention, biased_calls),
    "cross_attention": (cross_attention, cross_calls),
    "text_guided_scores": (hk.text_guided_scores, score_calls),
    "score_rotary": (score_rotary, score_rotary_calls),
    "select_topk": (hk.select_topk, topk_calls),
    "uniform_indices": (hk.uniform_indices, lambda _: ((10, 5), (20, 7), (30, 9))),
    "ragged_decode_attention": (hk.ragged_decode_attention, decode_calls),
}
DIFFERENTIABLE = tuple(FUNCTIONS)[:15]


def compiled(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


def outputs_of(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_serves_all_lengths(name):
    function, calls = FUNCTIONS[name]
    fast, counter = compiled(function)
    for args in calls(False):
        results = zip(outputs_of(fast(*args)), outputs_of(function(*args)), strict=True)
        for i, (actual, expected) in enumerate(results):
            assert_same_bits(actual, expected, f"{name} output {i}")
    assert counter.frame_count == 1, f"{name} was compiled {counter.frame_count} times"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_graph_serves_all_lengths_with_gradients(name):
    function, calls = FUNCTIONS[name]
    fast, counter = compiled(function)
    for args in calls(True):
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        assert leaves
        actual, expected = (gradients(f(*args), leaves) for f in (fast, function))
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, b, f"{name} gradient {i}")
    assert counter.frame_count == 1, f"{name} was compiled {counter.frame_count} times"


def gradients(result, leaves):
    differentiable = [y for y in outputs_of(result) if y.requires_grad]
    return torch.autograd.grad(sum(y.square().sum() for y in differentiable), leaves)
