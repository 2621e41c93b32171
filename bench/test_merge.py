"""Merging a clip's tokens, forward and backward."""

import pytest
import torch

from hico_kernels import bipartite_soft_matching, merge_tokens
from hico_kernels.merge.reference import merge_tokens_round_by_round
from hico_kernels.testing.shapes import CLIPS

N = 4
IMPLEMENTATIONS = {
    "auto": merge_tokens,
    "round_by_round": lambda x, k, num_heads: merge_tokens_round_by_round(x, k, num_heads),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", ["umt224_clip", "internvideo2_clip"])
def test_merge_tokens(measure, device, benchmark, shape, dtype, impl):
    s = CLIPS[shape]
    benchmark.group = f"merge_tokens-{shape}-{dtype}"
    x = torch.randn(N, s.tokens, s.channels, device=device, dtype=dtype)
    run = IMPLEMENTATIONS[impl]
    measure(
        lambda: run(x, s.keep, num_heads=s.heads),
        dtype=dtype,
        bytes_=x.nbytes + N * s.keep * s.channels * x.element_size(),
    )


@pytest.mark.parametrize("shape", ["umt224_clip"])
def test_merge_tokens_with_gradient(measure, device, benchmark, shape):
    s = CLIPS[shape]
    benchmark.group = f"merge_tokens-gradient-{shape}"
    x = torch.randn(N, s.tokens, s.channels, device=device, requires_grad=True)
    grad = torch.randn(N, s.keep, s.channels, device=device)

    def step():
        merge_tokens(x, s.keep, num_heads=s.heads).tokens.backward(grad)
        x.grad = None

    measure(step, dtype=x.dtype, bytes_=2 * x.nbytes + 2 * grad.nbytes)


def test_vit_block_step(measure, device, benchmark):
    benchmark.group = "bipartite_soft_matching-vit_l-f32"
    metric, x = torch.randn(8, 577, 64, device=device), torch.randn(8, 577, 1024, device=device)
    sizes = torch.ones(8, 577, device=device)

    def step():
        return bipartite_soft_matching(metric, 16, class_token=True).merge(x, sizes)

    measure(step, dtype=x.dtype, bytes_=metric.nbytes + 2 * x.nbytes)
