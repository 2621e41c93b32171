"""What only a CUDA device can show of every operation and implementation, beside the contracts."""

import pytest
import torch

import hico_kernels as hk
from hico_kernels import dispatch, flash_backends
from hico_kernels.testing import SPECS, assert_same_bits, cu_seqlens, promises

CUDA = torch.cuda.is_available()
BIG = [pytest.mark.large, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
NONE = pytest.param(None, None, id="cuda", marks=pytest.mark.skip("needs a CUDA device"))
IMPLEMENTATIONS = ("triton", "cuda", "flash")


def usual(spec, impl, device="cuda"):
    return next(iter(spec.samples(device, precision(impl))))


def precision(impl):
    return torch.bfloat16 if impl == "flash" else torch.float32


ROWS = [
    pytest.param(spec, impl, id=f"{spec.name}-{impl}-cuda")
    for spec in SPECS.values()
    for impl in IMPLEMENTATIONS
    if CUDA and impl in spec.implementations(usual(spec, impl))
] or [NONE]
PUBLIC = [row for row in ROWS if not str(row.id).split("-")[0].endswith("_backward")] or [NONE]


def same(actual, expected, name):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"{name} output {i}")


@pytest.mark.parametrize(("spec", "impl"), ROWS)
def test_a_thousand_runs_give_the_same_bits(spec, impl):
    for dtype in (torch.float32, torch.bfloat16):
        samples = spec.samples("cuda", dtype) if dtype in spec.dtypes else ()
        for sample in samples:
            if sample.id == "large" and impl in spec.implementations(sample):
                promises.same_bits_again(spec, sample, lambda s: spec.run(s, impl), repeats=1000)


@pytest.mark.parametrize(("spec", "impl"), ROWS)
def test_every_element_is_written_whatever_was_in_memory(spec, impl):
    for sample in spec.samples("cuda", precision(impl)):
        if impl not in spec.implementations(sample):
            continue
        results = []
        for value in (0.0, torch.nan):
            blocks = [torch.full((1 << n,), value, device="cuda") for n in range(4, 24)]
            del blocks  # the next allocations get this memory
            results.append(spec.run(sample, impl))
        same(*results, f"{spec.name} {sample.id} on poisoned memory")


@pytest.mark.parametrize(("spec", "impl"), ROWS)
def test_nothing_waits_for_the_device(spec, impl):
    sample = usual(spec, impl)
    spec.run(sample, impl)  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        spec.run(sample, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("spec", "impl"), PUBLIC)
def test_one_graph_of_torch_compile_has_the_operation(spec, impl):
    sample = usual(spec, impl)
    torch._dynamo.reset()
    fast = torch.compile(
        lambda *args: spec.public(*args, **sample.kwargs, impl=impl), fullgraph=True
    )
    result = fast(*sample.args)
    actual = result.assignment if isinstance(result, hk.Matching) else result
    actual = (actual,) if isinstance(actual, torch.Tensor) else tuple(actual)
    same(actual, spec.run(sample, impl), f"{spec.name} compiled")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("spec", "impl"), ROWS)
def test_the_device_of_the_tensors_is_used_and_not_the_current_one(spec, impl):
    other = usual(spec, impl, "cuda:1")
    expected = spec.run(usual(spec, impl), impl)
    same([x.cpu() for x in spec.run(other, impl)], [x.cpu() for x in expected], spec.name)


def each(operation, marks):
    """Every implementation of an operation that a GPU has, for a test of that name."""
    impls = [impl for impl in IMPLEMENTATIONS if dispatch.has_implementation(operation, impl)]
    return pytest.mark.parametrize(
        "impl", [pytest.param(x, id=f"{operation}-{x}-cuda", marks=marks) for x in impls]
    )


def big(operation):
    return each(operation, BIG)


def normal(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def runs(operation, impl):
    if reason := hk.why_not(operation, impl):
        pytest.skip(reason)


@each("ragged_attention", BIG[1:])
def test_nan_of_one_sequence_reaches_no_other(impl):
    """Not through a tile that holds the end of one and the start of the next either."""
    runs("ragged_attention", impl)
    lengths = [100, 37, 200]
    q, k, v = (normal(sum(lengths), heads, 64) for heads in (4, 2, 2))
    if impl == "flash" and flash_backends.serving("ragged_attention", q)[0] in ("fa3", "fa4"):
        pytest.skip("FlashAttention-3 and 4 multiply the next sequence's rows by 0")
    cu = cu_seqlens(lengths, "cuda")
    expected = hk.ragged_attention(q, k, v, cu, cu, 200, 200, impl=impl)
    for x in (q, k, v):
        x[100:137] = torch.nan
    out = hk.ragged_attention(q, k, v, cu, cu, 200, 200, impl=impl)
    assert_same_bits(out[:100], expected[:100], "the sequence before")
    assert_same_bits(out[137:], expected[137:], "the sequence behind")


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", flash_backends.BACKENDS, ids="ragged_attention-{}-cuda".format)
def test_every_flash_package_here_keeps_the_error_budget(name, monkeypatch):
    """Also the ones that are not the first choice."""
    kept = {name: flash_backends.BACKENDS[name]}
    monkeypatch.setattr(flash_backends, "BACKENDS", kept)
    flash_backends._known.cache_clear()
    try:
        if reason := hk.why_not("ragged_attention", "flash"):
            pytest.skip(reason)
        checked = 0
        for operation in flash_backends.OPERATIONS:
            spec = SPECS[operation]
            for sample in spec.samples("cuda", torch.bfloat16):
                if "flash" in spec.implementations(sample):
                    promises.right_numbers(spec, sample, lambda s, spec=spec: spec.run(s, "flash"))
                    checked += 1
        assert checked
    finally:
        flash_backends._known.cache_clear()


# --- more than 2^31 elements ----------------------------------------------------------------------


@big("merge_tokens")
def test_the_last_clips_of_many_are_merged_and_get_their_gradient(impl):
    runs("merge_tokens", impl)
    x = normal(2700, 784, 1024).requires_grad_()
    merged = hk.merge_tokens(x, 64, num_heads=16, impl=impl)
    alone = hk.merge_tokens(x[-2:].detach(), 64, num_heads=16, impl=impl)
    same([y[-2:] for y in merged], alone, "the last clips")
    (grad,) = torch.autograd.grad(merged.tokens.sum(), x)
    shares = (1 / alone.sizes).gather(1, alone.assignment.long())
    assert_same_bits(grad[-2:, :, -1], shares.bfloat16(), "their gradient")


@big("gather_tokens")
def test_the_last_rows_of_many_are_gathered(impl):
    runs("gather_tokens", impl)
    x = normal(700_000, 3584)
    index = torch.arange(len(x) - 1, 0, -1000, device="cuda")
    assert_same_bits(hk.gather_tokens(x, index, impl=impl), x[index], "rows")


@big("gather_tokens")
def test_more_rows_are_gathered_than_32_bits_count_elements(impl):
    runs("gather_tokens", impl)
    x = normal(1000, 3584)
    index = torch.arange(650_000, device="cuda") % 1000
    assert_same_bits(hk.gather_tokens(x, index, impl=impl)[-1000:], x, "the last rows")


@big("text_guided_scores")
def test_the_last_sequence_of_many_keys_is_scored(impl):
    runs("text_guided_scores", impl)
    lengths = [4_400_000, 1000]
    k, q = normal(sum(lengths), 4, 128), normal(2, 28, 128)
    cu = cu_seqlens(lengths, "cuda"), cu_seqlens([1, 1], "cuda")
    scores = hk.text_guided_scores(q, k, cu[1], cu[0], impl=impl)
    ends = cu_seqlens([1], "cuda"), cu_seqlens(lengths[1:], "cuda")
    alone = hk.text_guided_scores(q[1:], k[-1000:].clone(), *ends, impl="reference")
    torch.testing.assert_close(scores[-1000:], alone, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(scores[:-1000].sum().item(), 1.0, rtol=1e-3, atol=0)


@big("ragged_attention")
def test_the_last_sequence_of_many_tokens_is_attended(impl):
    runs("ragged_attention", impl)
    lengths = [500] * 1300
    q, k, v = (normal(sum(lengths), heads, 128) for heads in (28, 4, 4))
    cu = cu_seqlens(lengths, "cuda")
    out = hk.ragged_attention(q, k, v, cu, cu, 500, 500, impl=impl)
    end = cu_seqlens([500], "cuda")
    last = [x[-500:].clone() for x in (q, k, v)]
    alone = hk.ragged_attention(*last, end, end, 500, 500, impl=impl)
    assert_same_bits(out[-500:], alone, "the last sequence")


@big("ragged_decode_attention")
def test_the_last_row_of_a_large_cache_is_attended(impl):
    runs("ragged_decode_attention", impl)
    cache = normal(5, 900_000, 4, 128)
    q, lengths = normal(5, 28, 128), torch.tensor([9, 0, 5, 3, 900_000], device="cuda")
    out = hk.ragged_decode_attention(q, cache, cache, lengths, impl=impl)
    last = cache[4:].clone()
    alone = hk.ragged_decode_attention(q[4:], last, last, lengths[4:], impl=impl)
    torch.testing.assert_close(out[4:], alone, rtol=1e-2, atol=1e-4)
