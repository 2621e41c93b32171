"""Scoring, choosing and gathering visual tokens in front of a deep layer."""

import pytest
import torch

from bench import alternatives, peers
from bench.results import by_name
from hico_kernels import gather_tokens, select_topk, text_guided_scores, uniform_indices
from hico_kernels.testing.shapes import LLMS, cu_seqlens

VIDEOS = list(LLMS) if torch.cuda.is_available() else ["qwen2_256frames", "qwen2_10000frames"]


@pytest.mark.parametrize(
    "impl",
    ["hico", "grouped_torch", *peers.on_gpu("compiled", "flash_colreduce")],
)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("video", VIDEOS)
def test_text_guided_scores(measure, device, threads, benchmark, video, rows, impl):
    s = LLMS[video]
    benchmark.group = f"text_guided_scores-{video}_R{rows}-bf16"
    q = torch.randn(rows, s.heads, s.head_width, device=device, dtype=torch.bfloat16)
    k = torch.randn(s.tokens, s.kv_heads, s.head_width, device=device, dtype=torch.bfloat16)
    cu_q, cu_k = cu_seqlens([rows], device), cu_seqlens([s.tokens], device)
    run = {
        "hico": lambda: text_guided_scores(q, k, cu_q, cu_k),
        "grouped_torch": lambda: alternatives.grouped_scores(q, k),
        "compiled": lambda: compiled(q, k),
        "flash_colreduce": lambda: peers.flash_colreduce(q, k),
    }[impl]
    compiled = torch.compile(alternatives.grouped_scores, dynamic=False)
    torch.testing.assert_close(
        text_guided_scores(q, k, cu_q, cu_k),
        alternatives.grouped_scores(q, k),
        atol=0,  # a score may be as small as 1 / keys
        rtol=3e-2,  # the alternative's logits are rounded to bfloat16
    )
    flops = 2 * rows * s.heads * s.tokens * s.head_width
    measure(run, dtype=q.dtype, bytes_=k.nbytes + 4 * s.tokens, flops=flops)


@pytest.mark.parametrize(
    "impl", ["hico", "topk_and_sort", *peers.on_gpu("flashinfer_topk_and_sort")]
)
@pytest.mark.parametrize("video", VIDEOS)
def test_select_topk(measure, device, threads, benchmark, video, impl):
    n = LLMS[video].visual
    benchmark.group = f"select_topk-{video}_half-f32"
    scores = torch.randn(n, device=device).softmax(0)
    cu = cu_seqlens([n], device)
    run = {
        "hico": lambda: select_topk(scores, cu, [n // 2]),
        "topk_and_sort": lambda: alternatives.topk_and_sort(scores, n // 2),
        "flashinfer_topk_and_sort": lambda: peers.flashinfer_topk_and_sort(scores, n // 2),
    }[impl]
    assert torch.equal(scores[run()].sort().values, scores.sort().values[n - n // 2 :])
    measure(run, dtype=scores.dtype, bytes_=scores.nbytes + 8 * (n // 2))


@pytest.mark.parametrize("impl", ["hico", "linspace"])
@pytest.mark.parametrize("video", VIDEOS)
def test_uniform_indices(measure, device, threads, benchmark, video, impl):
    n = LLMS[video].visual
    benchmark.group = f"uniform_indices-{video}_3of4-i64"
    run = {
        "hico": lambda: uniform_indices(n, 3 * n // 4, device=device),
        "linspace": lambda: torch.linspace(0, n - 1, 3 * n // 4, dtype=torch.long).to(device),
    }[impl]
    assert torch.equal(run(), torch.linspace(0, n - 1, 3 * n // 4, dtype=torch.long).to(device))
    measure(run, dtype=torch.float32)  # the output stays in a cache: no floor by memory


@pytest.mark.parametrize(
    "impl", ["hico", "index_select", "index_select_out", *by_name("gather_tokens")]
)
@pytest.mark.parametrize("video", ["qwen2_1000frames"])  # more than fits into a cache
def test_gather_tokens(measure, device, threads, benchmark, video, impl):
    s = LLMS[video]
    benchmark.group = f"gather_tokens-{video}_half-bf16"
    x = torch.randn(s.visual, s.channels, device=device).bfloat16()
    index = torch.randperm(s.visual, device=device)[: s.visual // 2].sort().values
    out = x.new_empty(len(index), s.channels)
    run = {
        "hico": lambda: gather_tokens(x, index),
        "index_select": lambda: x.index_select(0, index),
        "index_select_out": lambda: torch.index_select(x, 0, index, out=out),
    }.get(impl, lambda: gather_tokens(x, index, impl=impl))
    assert torch.equal(run(), x[index])
    measure(run, dtype=x.dtype, bytes_=2 * out.nbytes + index.nbytes)
