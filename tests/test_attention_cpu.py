"""The CPU kernels of ragged attention, on every machine-code path that this CPU can run."""

import itertools

import pytest
import torch

from hico_kernels import dispatch, native
from hico_kernels.testing.budget import assert_same_bits, assert_within_budget
from hico_kernels.testing.shapes import RAGGED, cu_seqlens

pytestmark = pytest.mark.skipif("_C_cpu" in native.reasons, reason="_C_cpu is not built")

PATHS = ("baseline", "avx2", "avx512", "avx512_bf16")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
LENGTHS = {  # queries, keys
    "mixed": (RAGGED["mixed"],) * 2,
    "tile_edges": ((11, 12, 13, 24, 25, 127, 128, 129, 1),) * 2,
    "with_empty": ((0, 6, 0, 2, 3), (0, 6, 4, 2, 0)),
    "fewer_queries": ((2, 1, 7), (9, 170, 8)),
    "more_queries": ((9, 170, 8), (2, 1, 7)),
    "one_long": (RAGGED["one_long"],) * 2,
    "no_rows": ((0, 0),) * 2,
    "no_sequences": ((),) * 2,
}


def kernel(name):
    return dispatch._OVERLOADS["hico", name]


def reference(name):
    return dispatch._OVERLOADS["hico_reference", name]


@pytest.fixture(params=PATHS)
def path(request):
    try:
        torch.ops.hico.use_cpu_path(request.param)
    except RuntimeError as e:
        pytest.skip(str(e).splitlines()[0])
    yield request.param
    torch.ops.hico.use_cpu_path("best")


def packed(lengths, dtype, heads=(4, 2), width=16, causal=True, bias=False, scale=None, seed=0):
    """The arguments of the registered ragged_attention."""
    rows, keys = lengths
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(rows), heads[0], width, generator=g).to(dtype)
    k, v = (torch.randn(sum(keys), heads[1], width, generator=g).to(dtype) for _ in "kv")
    bias = torch.randint(1, 9, (sum(keys),), generator=g).float().log() if bias else None
    scale = width**-0.5 if scale is None else scale
    longest = max(rows, default=0), max(keys, default=0)
    return q, k, v, cu_seqlens(rows), cu_seqlens(keys), *longest, causal, scale, bias


def wide(args):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def check(name, args):
    check_outputs(name, args, wide(args), args)


def check_outputs(name, args, exact, plain):
    outputs = kernel(name)(*args), reference(name)(*exact), reference(name)(*plain)
    outputs = [(x,) if torch.is_tensor(x) else x for x in outputs]
    for i, found in enumerate(zip(*outputs, strict=True)):
        assert_within_budget(*found, f"{name} output {i}")


def backward_args(args, forward=kernel, seed=1):
    out, lse = forward("ragged_attention")(*args)
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=g).to(args[0].dtype).to(out.dtype)
    return grad, *args[:3], out, lse, *args[3:]


def check_backward(args):
    """Every precision with its own forward pass: a score's rounding cancels against its lse."""
    exact, plain = (backward_args(x, reference) for x in (wide(args), args))
    check_outputs("ragged_attention_backward", backward_args(args), exact, plain)


# --- forward


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS)
def test_forward_lengths(path, dtype, lengths):
    for causal, bias in itertools.product((True, False), repeat=2):
        check("ragged_attention", packed(LENGTHS[lengths], dtype, causal=causal, bias=bias))


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (28, 4), (13, 1), (200, 1)], ids=str)
def test_forward_heads(path, dtype, heads):
    check("ragged_attention", packed(((21, 40), (30, 35)), dtype, heads=heads, bias=True))


@DTYPES
@pytest.mark.parametrize(
    "width", [0, 1, 2, 7, 8, 15, 16, 17, 33, 64, 72, 80, 88, 96, 112, 128, 136, 256]
)
def test_forward_widths(path, dtype, width):
    check("ragged_attention", packed(((150, 21), (150, 30)), dtype, width=width, scale=0.2))


@DTYPES
def test_forward_long(dtype):
    """Rounding must not grow with the number of keys."""
    args = packed(((3, 500, 40), (8000, 2300, 40)), dtype, heads=(2, 1), width=64)
    check("ragged_attention", args)


@DTYPES
def test_forward_sharp(path, dtype):
    """Large logits, and equal ones: values of opposite sign cancel under weights about the same."""
    check("ragged_attention", packed(LENGTHS["tile_edges"], dtype, scale=8.0))
    q, k, v, *rest = packed(((64,), (64,)), dtype, heads=(1, 1), width=32, causal=False)
    k[:], v[:], q[:] = 0, 1, 1
    # two kinds of keys whose values nearly cancel; in bfloat16 the weight of the second kind would
    # lie between two numbers
    k[1::2], v[1::2] = (-0.0123 if dtype == torch.float32 else -0.0003456), -1
    check("ragged_attention", (q, k, v, *rest))


@DTYPES
def test_forward_hidden_keys(path, dtype):
    args = packed(LENGTHS["mixed"], dtype, bias=True)
    bias = args[-1]
    bias[::2] = -torch.inf
    check("ragged_attention", args)
    check("ragged_attention", (*args[:-3], False, *args[-2:]))
    bias[:] = -torch.inf
    check("ragged_attention", args)


@DTYPES
def test_forward_nan_and_infinity_stay_where_they_belong(path, dtype):
    q, k, *rest = packed(((140, 40), (140, 40)), dtype)
    q[20, 1, 3] = torch.nan  # one row of one head
    k[133, 0] = torch.nan  # the queries from here on, in the heads of one group
    q[142] = torch.inf
    check("ragged_attention", (q, k, *rest))
    out, lse = kernel("ragged_attention")(q, k, *rest)
    bad = out.isnan().any(-1)
    expected = torch.zeros_like(bad)
    expected[20, 1] = expected[133:140, :2] = expected[142] = True
    assert torch.equal(bad, expected)
    assert torch.equal(lse.isnan(), expected.T)


@DTYPES
def test_forward_layouts(dtype):
    q, k, v, *rest = packed(LENGTHS["mixed"], dtype, width=24, bias=True)
    expected = kernel("ragged_attention")(q, k, v, *rest)
    for make in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x, x], 0)[len(x) :],
    ):
        actual = kernel("ragged_attention")(make(q), make(k), make(v), *rest)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b, "strided")
    cu = [x.long().repeat_interleave(2)[::2] for x in rest[:2]]
    bias = rest[-1].repeat_interleave(3)[::3]
    actual = kernel("ragged_attention")(q, k, v, *cu, *rest[2:-1], bias)
    assert_same_bits(actual[0], expected[0], "int64, strided")
    args = (q, k, v, *rest[:-1], rest[-1].double())
    assert_same_bits(kernel("ragged_attention")(*args)[0], expected[0], "float64 bias")


# --- what threads and neighbours must not change


def results(name, args):
    out = kernel(name)(*args)
    return (out,) if torch.is_tensor(out) else out


def same_with_threads(name, args):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(name, args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_bits(a, b, name)


@DTYPES
def test_same_bits_with_any_threads(path, dtype):
    args = packed(((3, 300, 40), (3, 300, 70)), dtype, heads=(14, 2), width=40, bias=True)
    same_with_threads("ragged_attention", args)


@DTYPES
def test_neighbours_do_not_matter(dtype):
    rows, keys = (5, 130, 40), (9, 130, 20)
    args = packed((rows, keys), dtype, heads=(7, 1), width=40, bias=True)
    q, k, v, cu_q, cu_k, *_, bias = args
    together = kernel("ragged_attention")(*args)
    for i in range(3):
        a, b, c, d = cu_q[i], cu_q[i + 1], cu_k[i], cu_k[i + 1]
        ends = cu_seqlens(rows[i : i + 1]), cu_seqlens(keys[i : i + 1]), rows[i], keys[i]
        alone = q[a:b], k[c:d], v[c:d], *ends, True, args[-2], bias[c:d]
        out, lse = kernel("ragged_attention")(*alone)
        assert_same_bits(out, together[0][a:b], "out")
        assert_same_bits(lse, together[1][:, a:b], "lse")


# --- errors, each with the reference's text


def test_errors():
    q, k, v, cu_q, cu_k, max_q, max_k, *rest = packed(LENGTHS["mixed"], torch.float32)
    run = kernel("ragged_attention")
    wrong = torch.tensor([0, 5, 4, 15, 18], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"cu_seqlens_q must rise from 0 to 18, got \[0, 5, 4"):
        run(q, k, v, wrong, cu_k, max_q, max_k, *rest)
    with pytest.raises(RuntimeError, match="cu_seqlens_k must rise from 0 to 18"):
        run(q, k, v, cu_q, cu_k + 1, max_q, max_k, *rest)
    with pytest.raises(RuntimeError, match="cu_seqlens_k must describe the 4 sequences"):
        run(q, k, v, cu_q, cu_seqlens((9, 9)), max_q, max_k, *rest)
    with pytest.raises(RuntimeError, match=r"max_seqlen_q must be at least .* 9, got 8"):
        run(q, k, v, cu_q, cu_k, 8, max_k, *rest)
    with pytest.raises(RuntimeError, match=r"max_seqlen_k must be at least .* 9, got 8"):
        run(q, k, v, cu_q, cu_k, max_q, 8, *rest)
    with pytest.raises(RuntimeError, match="divide"):
        run(q[:, :3], k, v, cu_q, cu_k, max_q, max_k, *rest)


# --- decoding


def cache(lengths, longest, dtype, heads=(4, 2), width=16, scale=0.3, seed=0):
    """The arguments of the registered ragged_decode_attention, NaN beyond each length."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    q = torch.randn(b, heads[0], width, generator=g).to(dtype)
    k, v = (torch.randn(b, longest, heads[1], width, generator=g).to(dtype) for _ in "kv")
    for i, n in enumerate(lengths):
        k[i, n:], v[i, n:] = torch.nan, torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32), scale


@DTYPES
@pytest.mark.parametrize(
    "lengths",
    [(5, 1, 9), (63, 64, 65, 127, 128, 129, 0), (511, 512, 513, 1025, 2), (0, 0), ()],
    ids=str,
)
def test_decode_lengths(path, dtype, lengths):
    check("ragged_decode_attention", cache(lengths, max(lengths, default=3), dtype))


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (7, 1), (28, 4), (8, 1), (13, 1)], ids=str)
def test_decode_heads(path, dtype, heads):
    check("ragged_decode_attention", cache((70, 33), 80, dtype, heads=heads, width=64))


@DTYPES
@pytest.mark.parametrize("width", [0, 1, 7, 15, 16, 17, 33, 64, 72, 80, 88, 96, 128, 136, 256])
def test_decode_widths(path, dtype, width):
    check("ragged_decode_attention", cache((150, 3), 150, dtype, heads=(7, 1), width=width))


@DTYPES
def test_decode_sharp_and_nan(path, dtype):
    check("ragged_decode_attention", cache((200, 90), 300, dtype, scale=8.0))
    q, k, *rest = cache((200, 90), 200, dtype)
    q[0, 1, 3] = torch.nan
    k[1, 80, 1, 2] = torch.nan
    check("ragged_decode_attention", (q, k, *rest))


@DTYPES
def test_decode_layouts(path, dtype):
    q, k, v, lengths, scale = cache((30, 200), 200, dtype, heads=(14, 2), width=72)
    expected = kernel("ragged_decode_attention")(q, k, v, lengths, scale)
    for make in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, Hkv, L, D] in memory
        lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    ):
        actual = kernel("ragged_decode_attention")(make(q), make(k), make(v), lengths, scale)
        assert_same_bits(actual, expected, "strided")
    assert_same_bits(
        kernel("ragged_decode_attention")(q, k[:, :, :1].expand_as(k), v, lengths.long(), scale),
        kernel("ragged_decode_attention")(
            q, k[:, :, :1].expand_as(k).contiguous(), v, lengths, scale
        ),
        "expanded",
    )


@DTYPES
def test_decode_same_bits_with_any_threads_and_neighbours(path, dtype):
    args = cache((3, 1300, 700), 1300, dtype, heads=(7, 1), width=40)
    same_with_threads("ragged_decode_attention", args)
    q, k, v, lengths, scale = args
    together = kernel("ragged_decode_attention")(*args)
    for i in range(3):
        alone = (x[i : i + 1] for x in (q, k, v, lengths))
        actual = kernel("ragged_decode_attention")(*alone, scale)
        assert_same_bits(actual[0], together[i], "alone")


def test_decode_errors():
    q, k, v, lengths, scale = cache((3, 5), 5, torch.float32)
    for wrong in (6, -1):
        lengths[1] = wrong
        with pytest.raises(RuntimeError, match=rf"kv_lengths must lie in \[0, 5\], got {wrong}"):
            kernel("ragged_decode_attention")(q, k, v, lengths, scale)


# --- backward


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backward_lengths(path, dtype, lengths):
    for causal, bias in itertools.product((True, False), repeat=2):
        args = packed(LENGTHS[lengths], dtype, causal=causal, bias=bias)
        check_backward(args)


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (28, 4), (13, 1), (200, 1)], ids=str)
def test_backward_heads(path, dtype, heads):
    args = packed(((21, 40), (30, 35)), dtype, heads=heads, bias=True)
    check_backward(args)


@DTYPES
@pytest.mark.parametrize("width", [0, 1, 7, 15, 16, 17, 33, 64, 72, 80, 88, 96, 128, 136])
def test_backward_widths(path, dtype, width):
    args = packed(((150, 21), (150, 30)), dtype, width=width, scale=0.2)
    check_backward(args)


@DTYPES
def test_backward_of_rows_that_see_nothing(path, dtype):
    args = packed(LENGTHS["mixed"], dtype, bias=True)
    args[-1][:] = -torch.inf
    check_backward(args)
    args[-1][::2] = 0
    check_backward(args)


@DTYPES
def test_backward_same_bits_with_any_threads_and_neighbours(path, dtype):
    rows, keys = (3, 300, 40), (3, 300, 70)
    args = packed((rows, keys), dtype, heads=(14, 2), width=40, bias=True)
    full = backward_args(args)
    same_with_threads("ragged_attention_backward", full)
    grad, q, k, v, out, lse, cu_q, cu_k, *_, bias = full
    together = kernel("ragged_attention_backward")(*full)
    for i in range(3):
        a, b, c, d = cu_q[i], cu_q[i + 1], cu_k[i], cu_k[i + 1]
        ends = cu_seqlens(rows[i : i + 1]), cu_seqlens(keys[i : i + 1]), rows[i], keys[i]
        tensors = grad[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b]
        alone = kernel("ragged_attention_backward")(*tensors, *ends, *args[-3:-1], bias[c:d])
        for x, y in zip(alone, (together[0][a:b], together[1][c:d], together[2][c:d]), strict=True):
            assert_same_bits(x, y, "alone")


def test_gradients_of_the_public_function():
    """Against autograd through the dense definition, in float64."""
    q, k, v, *rest = packed(((9, 40), (12, 40)), torch.float32, heads=(6, 2), width=24, bias=True)
    *ends, causal, scale, bias = rest
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    from hico_kernels import ragged_attention

    found = {}
    for impl in ("cpu", "reference"):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ragged_attention(*x, *ends, causal=causal, scale=scale, key_bias=bias, impl=impl)
        found[impl] = torch.autograd.grad(out, x, grad)
    x = [t.double().requires_grad_() for t in (q, k, v)]
    parts = []
    for i in range(2):
        a, b, c, d = *ends[0][i : i + 2].tolist(), *ends[1][i : i + 2].tolist()
        qs, ks, vs = x[0][a:b], *(t[c:d].repeat_interleave(3, dim=1) for t in x[1:])
        logits = scale * torch.einsum("qhd,khd->hqk", qs, ks) + bias[c:d]
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, vs))
    exact = torch.autograd.grad(torch.cat(parts), x, grad.double())
    for name, *grads in zip("qkv", found["cpu"], exact, found["reference"], strict=True):
        assert_within_budget(*grads, f"d{name}")


def test_backward_layouts():
    grad, q, k, v, out, lse, *rest = backward_args(packed(LENGTHS["mixed"], torch.float32))
    expected = kernel("ragged_attention_backward")(grad, q, k, v, out, lse, *rest)
    tensors = [x.repeat_interleave(2, -1)[..., ::2] for x in (grad, q, k, v, out, lse)]
    for a, b in zip(kernel("ragged_attention_backward")(*tensors, *rest), expected, strict=True):
        assert_same_bits(a, b, "strided")
