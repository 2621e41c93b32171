"""Merging a clip's tokens, forward and with gradient, and the step inside a ViT block."""

import pytest
import torch

from bench import alternatives, peers
from bench.results import short
from hico_kernels import bipartite_soft_matching, merge_tokens
from hico_kernels.testing import SPECS, Sample
from hico_kernels.testing.shapes import CLIPS

N = 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SHAPES = pytest.mark.parametrize("shape", ["umt224_clip", "wide_clip"])


def implementation(name: str, benchmark):
    """What merges: x, tokens to keep, heads -> tokens."""
    if name == "eager":
        return alternatives.eager_merge
    if name == "flash_kmeans":
        return peers.flash_kmeans
    if name == "compiled":  # compiling takes long: where nothing is timed, only that it can be
        backend = "eager" if benchmark.disabled else "inductor"
        return torch.compile(alternatives.eager_merge, backend=backend, dynamic=False)
    impl = {"hico": "auto", "linear_torch": "reference"}[name]
    return lambda x, keep, heads: merge_tokens(x, keep, num_heads=heads, impl=impl).tokens


def problems() -> list:
    """Shape, number of clips, dtype. On a GPU also the clips of 1000 and 10,000 frames."""
    some = [(shape, N, d) for shape in SHAPES.args[1] for d in DTYPES.args[1]]
    if torch.cuda.is_available():
        some += [("umt224_clip", clips, torch.bfloat16) for clips in (250, 2500)]
    return [pytest.param(s, n, d, id=f"{s}_x{n}-{short(d)}") for s, n, d in some]


@pytest.mark.parametrize(
    "impl", ["hico", "eager", "compiled", "linear_torch", *peers.on_gpu("flash_kmeans")]
)
@pytest.mark.parametrize(("shape", "clips", "dtype"), problems())
def test_merge_tokens(measure, device, threads, benchmark, shape, clips, dtype, impl):
    s = CLIPS[shape]
    benchmark.group = f"merge_tokens-{shape}_x{clips}-{short(dtype)}"
    x = torch.randn(clips, s.tokens, s.channels, device=device, dtype=dtype)
    run = implementation(impl, benchmark)
    assert run(x, s.keep, s.heads).shape == (clips, s.keep, s.channels)
    cost = SPECS["merge_tokens"].cost(Sample(shape, (x, s.keep), {"num_heads": s.heads}))
    # Matching is in float32 whatever the dtype.
    measure(
        lambda: run(x, s.keep, s.heads), dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops
    )


@pytest.mark.parametrize("impl", ["hico", "eager"])
@DTYPES
@SHAPES
def test_merge_tokens_with_gradient(measure, device, threads, benchmark, shape, dtype, impl):
    s = CLIPS[shape]
    benchmark.group = f"merge_tokens_gradient-{shape}_x{N}-{short(dtype)}"
    x = torch.randn(N, s.tokens, s.channels, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(N, s.keep, s.channels, device=device, dtype=dtype)
    run = implementation(impl, benchmark)

    def step():
        run(x, s.keep, s.heads).backward(grad)
        x.grad = None

    measure(step, dtype=torch.float32, bytes_=2 * x.nbytes + 2 * grad.nbytes)


@pytest.mark.parametrize("impl", ["hico", "eager"])
def test_vit_block_step(measure, device, threads, benchmark, impl):
    benchmark.group = "vit_step-8x577x1024_r16-f32"
    metric, x = torch.randn(8, 577, 64, device=device), torch.randn(8, 577, 1024, device=device)
    sizes = torch.ones(8, 577, device=device)

    def hico():
        return bipartite_soft_matching(metric, 16, class_token=True).merge(x, sizes)

    def eager():
        return alternatives.eager_vit_step(metric, x, sizes[..., None], 16)

    torch.testing.assert_close(hico()[0], eager()[0])
    run = hico if impl == "hico" else eager
    flops = 8 * 2 * 289 * 288 * 64
    measure(run, dtype=x.dtype, bytes_=metric.nbytes + 2 * x.nbytes, flops=flops)
