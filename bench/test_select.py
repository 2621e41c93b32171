"""Scoring, choosing and gathering visual tokens in front of a deep layer."""

import pytest
import torch

from bench import alternatives, peers
from bench.results import by_name
from hico_kernels import (
    gather_rms_norm,
    gather_tokens,
    select_topk,
    text_guided_scores,
    uniform_indices,
)
from hico_kernels.testing import SPECS, Sample
from hico_kernels.testing.shapes import LLMS, cu_seqlens

VIDEOS = list(LLMS) if torch.cuda.is_available() else ["qwen2_256frames", "qwen2_10000frames"]
LARGE = "qwen2_1000frames"  # rows of more than fits into a cache
BFLOAT16 = {"atol": 2e-2, "rtol": 2e-2}


def tables(rows: int, width: int, device: str) -> list[torch.Tensor]:
    """cos and sin [rows, width] of random angles, bfloat16."""
    angles = torch.rand(rows, width // 2, device=device).repeat(1, 2) * 6.28
    return [angles.cos().bfloat16(), angles.sin().bfloat16()]


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


@pytest.mark.parametrize("impl", ["hico", "rotated_before", "grouped_torch"])
@pytest.mark.parametrize("video", list(LLMS) if torch.cuda.is_available() else [LARGE])
def test_text_guided_scores_rotary(measure, device, threads, benchmark, video, impl):
    s = LLMS[video]
    benchmark.group = f"text_guided_scores_rotary-{video}_R1-bf16"
    q = torch.randn(1, s.heads, s.head_width, device=device, dtype=torch.bfloat16)
    k = torch.randn(s.tokens, s.kv_heads, s.head_width, device=device, dtype=torch.bfloat16)
    cos, sin = tables(s.tokens, s.head_width, device)
    ends = cu_seqlens([1], device), cu_seqlens([s.tokens], device)
    run = {
        "hico": lambda: text_guided_scores(q, k, *ends, cos=cos, sin=sin),
        "rotated_before": lambda: text_guided_scores(q, alternatives.rotated(k, cos, sin), *ends),
        "grouped_torch": lambda: alternatives.grouped_scores(q, alternatives.rotated(k, cos, sin)),
    }
    # As without tables, and the alternative rounds its keys three times.
    torch.testing.assert_close(run["hico"](), run["grouped_torch"](), atol=0, rtol=3e-2)
    cost = SPECS["text_guided_scores_rotary"].cost(Sample("", (q, k, *ends, cos, sin)))
    measure(run[impl], dtype=q.dtype, bytes_=cost.bytes, flops=cost.flops)


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
@pytest.mark.parametrize("video", [LARGE])
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


@pytest.mark.parametrize("impl", ["hico", "gather_each"])
@pytest.mark.parametrize("video", [LARGE])
def test_gather_many(measure, device, threads, benchmark, video, impl):
    """What belongs to the rows goes with them: positions, rotary tables, bounds of sequences."""
    s = LLMS[video]
    benchmark.group = f"gather_many-{video}_half-bf16"
    n = s.visual
    x = torch.randn(n, s.channels, device=device, dtype=torch.bfloat16)
    index = torch.randperm(n, device=device)[: n // 2].sort().values
    more = [torch.arange(n, device=device), *tables(n, s.head_width, device)]
    ends = cu_seqlens([n - n // 3, n // 3], device)
    run = {
        "hico": lambda: gather_tokens(x, index, *more, cu_seqlens=ends),
        "gather_each": lambda: alternatives.gather_each(x, index, more, ends),
    }
    for ours, other in zip(run["hico"](), run["gather_each"](), strict=True):
        assert torch.equal(ours, other)
    cost = SPECS["gather_many"].cost(Sample("", (x, index, more, ends)))
    measure(run[impl], dtype=x.dtype, bytes_=cost.bytes)


@pytest.mark.parametrize("impl", ["hico", "gather_and_rms_norm", *peers.on_gpu("compiled")])
@pytest.mark.parametrize("video", [LARGE])
def test_gather_rms_norm(measure, device, threads, benchmark, video, impl):
    s = LLMS[video]
    benchmark.group = f"gather_rms_norm-{video}_half-bf16"
    x = torch.randn(s.visual, s.channels, device=device, dtype=torch.bfloat16)
    index = torch.randperm(s.visual, device=device)[: s.visual // 2].sort().values
    weight = torch.randn(s.channels, device=device, dtype=torch.bfloat16)
    arguments = x, index, weight, 1e-6
    run = {
        "hico": gather_rms_norm,
        "gather_and_rms_norm": alternatives.gather_and_rms_norm,
        "compiled": lambda *given: peers.compiled(alternatives.gather_and_rms_norm)(*given),
    }
    rows, normed = gather_rms_norm(*arguments)
    other_rows, other_normed = alternatives.gather_and_rms_norm(*arguments)
    assert torch.equal(rows, other_rows)
    torch.testing.assert_close(normed, other_normed, **BFLOAT16)
    cost = SPECS["gather_rms_norm"].cost(Sample("", arguments))
    # The norm is in float32 whatever the dtype.
    measure(lambda: run[impl](*arguments), dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops)


@pytest.mark.parametrize("impl", ["hico", "rms_norm_gradient"])
@pytest.mark.parametrize("video", [LARGE if torch.cuda.is_available() else "qwen2_256frames"])
def test_rms_norm_backward(measure, device, threads, benchmark, video, impl):
    """The gradient of the norm alone, after half of the rows stayed."""
    s, spec = LLMS[video], SPECS["rms_norm_backward"]
    benchmark.group = f"rms_norm_backward-{video}_half-bf16"
    shape = 3, s.visual // 2, s.channels
    direct, grad, rows = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind()
    weight = torch.randn(s.channels, device=device, dtype=torch.bfloat16)
    sample = Sample("", (direct, grad, rows, weight, 1e-6))
    inputs = [x.clone().requires_grad_() for x in (rows, weight)]
    made = torch.nn.functional.rms_norm(inputs[0], weight.shape, inputs[1], 1e-6)

    def theirs():
        own, of_weight = alternatives.gradient(made, inputs, grad)
        return own + direct, of_weight

    ours = lambda: spec.run(sample, "auto")  # noqa: E731
    for x, y in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(x, y, atol=0.02 * y.abs().max().item(), rtol=2e-2)
    cost = spec.cost(sample)
    run = ours if impl == "hico" else theirs
    measure(run, dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops)
