"""Attention after dropping: prefill over sequences of different lengths, and decoding."""

import pytest
import torch

from bench import alternatives, peers
from bench.results import BY_NAME, by_name, short
from hico_kernels import ragged_attention, ragged_decode_attention, why_not
from hico_kernels.testing import SPECS, Sample
from hico_kernels.testing.shapes import LLMS, cu_seqlens

S = LLMS["qwen2_64frames"]
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def auto_or(impl, operation, *tensors):
    """What our side of a benchmark asks for: an implementation by its name, else "auto"."""
    if impl not in BY_NAME:
        return "auto"
    if reason := why_not(operation, impl, *tensors):
        pytest.skip(reason)
    return impl


def problems() -> list:
    """Lengths, dtype. On a GPU also one whole prompt of each length of video."""
    ragged = (512, 1024, 2048, 4096)
    some = [("ragged4", ragged, dtype) for dtype in DTYPES.args[1]]
    if torch.cuda.is_available():
        some += [(name, (s.tokens,), torch.bfloat16) for name, s in LLMS.items()]
    return [pytest.param(name, x, d, id=f"{name}-{short(d)}") for name, x, d in some]


OTHERS = ["sdpa_each", *peers.on_gpu("sdpa_cudnn", "sdpa_flash", "flex")]
MOST_FOR_FLEX = 20_000  # rows: its mask is made from one of all rows by all rows


@pytest.mark.parametrize("impl", ["hico", *OTHERS, *by_name("ragged_attention")])
@pytest.mark.parametrize(("shape", "lengths", "dtype"), problems())
def test_ragged_attention(measure, device, threads, benchmark, shape, lengths, dtype, impl):
    benchmark.group = f"ragged_attention-{shape}-{short(dtype)}"
    rows, longest, cu = sum(lengths), max(lengths), cu_seqlens(lengths, device)
    if impl == "flex" and rows > MOST_FOR_FLEX:
        pytest.skip(f"{rows} rows are too many for a mask")
    if impl in ("sdpa_cudnn", "sdpa_flash") and dtype == torch.float32:
        pytest.skip(f"{impl} has no float32")
    q = torch.randn(rows, S.heads, S.head_width, device=device, dtype=dtype)
    k, v = torch.randn(2, rows, S.kv_heads, S.head_width, device=device, dtype=dtype).unbind()
    own = auto_or(impl, "ragged_attention", q, k, v)
    ours = lambda: ragged_attention(q, k, v, cu, cu, longest, longest, impl=own)  # noqa: E731
    theirs = peers.attention(impl if impl in OTHERS else "sdpa_each", q, k, v, lengths)
    torch.testing.assert_close(ours(), theirs(), **CLOSE[dtype])
    flops = sum(2 * n * n * S.heads * S.head_width for n in lengths)  # half of the square
    run = theirs if impl in OTHERS else ours
    measure(run, dtype=dtype, bytes_=2 * q.nbytes + k.nbytes + v.nbytes, flops=flops, rounds=5)


def gradients() -> list:
    """Lengths, dtype. On a GPU also whole prompts, but for the longest: seconds each time."""
    some = [("ragged3", (256, 512, 1024), dtype) for dtype in DTYPES.args[1]]
    if torch.cuda.is_available():
        some += [(x, (LLMS[x].tokens,), torch.bfloat16) for x in list(LLMS)[:-1]]
    return [pytest.param(name, x, d, id=f"{name}-{short(d)}") for name, x, d in some]


BACKWARD = ["sdpa_each", *peers.on_gpu("sdpa_cudnn", "sdpa_flash")]


@pytest.mark.parametrize("impl", ["hico", *BACKWARD, *by_name("ragged_attention_backward")])
@pytest.mark.parametrize(("shape", "lengths", "dtype"), gradients())
def test_ragged_attention_backward(
    measure, device, threads, benchmark, shape, lengths, dtype, impl
):
    """The gradient alone, from what the forward pass saved."""
    benchmark.group = f"ragged_attention_backward-{shape}-{short(dtype)}"
    if impl in ("sdpa_cudnn", "sdpa_flash") and dtype == torch.float32:
        pytest.skip(f"{impl} has no float32")
    if benchmark.disabled:  # that it runs takes no long rows
        lengths = tuple(n // 8 for n in lengths)
    rows, longest, cu = sum(lengths), max(lengths), cu_seqlens(lengths, device)
    q, grad = torch.randn(2, rows, S.heads, S.head_width, device=device, dtype=dtype).unbind()
    k, v = torch.randn(2, rows, S.kv_heads, S.head_width, device=device, dtype=dtype).unbind()
    out, lse = ragged_attention(q, k, v, cu, cu, longest, longest, return_lse=True)
    rest = cu, cu, longest, longest, True, S.head_width**-0.5
    sample, spec = Sample("", (grad, q, k, v, out, lse, *rest)), SPECS["ragged_attention_backward"]
    own = auto_or(impl, "ragged_attention_backward", grad, q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    made = peers.attention(impl if impl in BACKWARD else "sdpa_each", *inputs, lengths)()
    ours = lambda: spec.run(sample, own)  # noqa: E731
    theirs = lambda: alternatives.gradient(made, inputs, grad)  # noqa: E731
    for x, y in zip(ours(), theirs(), strict=True):
        # The alternative rounds what each head of a group adds to dk and dv.
        tolerance = CLOSE[dtype]["atol"] * max(y.abs().max().item(), 1)
        torch.testing.assert_close(x, y, **CLOSE[dtype] | {"atol": tolerance})
    cost = spec.cost(sample)
    run = theirs if impl in BACKWARD else ours
    measure(run, dtype=dtype, bytes_=cost.bytes, flops=cost.flops, rounds=5)


@pytest.mark.parametrize("impl", ["hico", "sdpa_folded", *by_name("ragged_decode_attention")])
@DTYPES
def test_ragged_decode_attention(measure, device, threads, benchmark, dtype, impl):
    benchmark.group = f"ragged_decode_attention-64k-{short(dtype)}"
    n = 1 << 16
    q = torch.randn(1, S.heads, S.head_width, device=device, dtype=dtype)
    k, v = torch.randn(2, 1, n, S.kv_heads, S.head_width, device=device, dtype=dtype).unbind()
    lengths = torch.full((1,), n, dtype=torch.int32, device=device)
    own = auto_or(impl, "ragged_decode_attention", q, k, v)
    ours = lambda: ragged_decode_attention(q, k, v, lengths, impl=own)  # noqa: E731
    theirs = lambda: alternatives.sdpa_decode(q, k, v)  # noqa: E731
    torch.testing.assert_close(ours(), theirs(), **CLOSE[dtype])
    run = theirs if impl.startswith("sdpa") else ours
    flops = 4 * q.numel() * n
    measure(run, dtype=dtype, bytes_=k.nbytes + v.nbytes, flops=flops)
