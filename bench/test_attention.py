"""Attention after dropping: prefill over sequences of different lengths, and decoding."""

import pytest
import torch

from bench import alternatives
from bench.results import short
from hico_kernels import ragged_attention, ragged_decode_attention
from hico_kernels.testing.shapes import LLMS, cu_seqlens

S = LLMS["qwen2_64frames"]
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.mark.parametrize("impl", ["hico", "sdpa_each"])
@DTYPES
@pytest.mark.parametrize("lengths", [(512, 1024, 2048, 4096)], ids=["ragged4"])
def test_ragged_attention(measure, device, threads, benchmark, lengths, dtype, impl):
    benchmark.group = f"ragged_attention-ragged4-{short(dtype)}"
    rows, longest, cu = sum(lengths), max(lengths), cu_seqlens(lengths, device)
    q = torch.randn(rows, S.heads, S.head_width, device=device, dtype=dtype)
    k, v = torch.randn(2, rows, S.kv_heads, S.head_width, device=device, dtype=dtype).unbind()
    ours = lambda: ragged_attention(q, k, v, cu, cu, longest, longest)  # noqa: E731
    theirs = lambda: alternatives.sdpa_each(q, k, v, lengths)  # noqa: E731
    torch.testing.assert_close(ours(), theirs(), **CLOSE[dtype])
    flops = sum(2 * n * n * S.heads * S.head_width for n in lengths)  # half of the square
    run = ours if impl == "hico" else theirs
    measure(run, dtype=dtype, bytes_=2 * q.nbytes + k.nbytes + v.nbytes, flops=flops, rounds=5)


@pytest.mark.parametrize("impl", ["hico", "sdpa_folded"])
@DTYPES
def test_ragged_decode_attention(measure, device, threads, benchmark, dtype, impl):
    benchmark.group = f"ragged_decode_attention-64k-{short(dtype)}"
    n = 1 << 16
    q = torch.randn(1, S.heads, S.head_width, device=device, dtype=dtype)
    k, v = torch.randn(2, 1, n, S.kv_heads, S.head_width, device=device, dtype=dtype).unbind()
    lengths = torch.full((1,), n, dtype=torch.int32, device=device)
    ours = lambda: ragged_decode_attention(q, k, v, lengths)  # noqa: E731
    theirs = lambda: alternatives.sdpa_decode(q, k, v)  # noqa: E731
    torch.testing.assert_close(ours(), theirs(), **CLOSE[dtype])
    run = ours if impl == "hico" else theirs
    flops = 4 * q.numel() * n
    measure(run, dtype=dtype, bytes_=k.nbytes + v.nbytes, flops=flops)
