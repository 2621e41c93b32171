"""Merging a clip's tokens, forward and with gradient, and the step inside a ViT block."""

import pytest
import torch

from bench import alternatives, peers
from bench.results import short
from hico_kernels import bipartite_soft_matching, layer_norm_metric, merge_similar, merge_tokens
from hico_kernels.testing import SPECS, Sample
from hico_kernels.testing.shapes import CLIPS

N = 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
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


@pytest.mark.parametrize("impl", ["hico", "eager"])
@DTYPES
@pytest.mark.parametrize("images", [8, 64] if torch.cuda.is_available() else [8])
def test_merge_similar(measure, device, threads, benchmark, images, dtype, impl):
    benchmark.group = f"merge_similar-{images}x577x1024_r16-{short(dtype)}"
    torch.manual_seed(0)  # two similarities that rounding may swap are rare, not impossible
    x = torch.randn(images, 577, 1024, device=device, dtype=dtype)
    metric = torch.randn(images, 577, 64, device=device)
    sizes = torch.ones(images, 577, device=device, dtype=dtype)
    sample = Sample("", (x, metric, 16, sizes), {"class_token": True})

    def hico():
        return merge_similar(*sample.args, **sample.kwargs)

    def eager():
        return alternatives.eager_vit_step(metric, x, sizes[..., None], 16)

    # Ours leaves tokens where they are; the alternative puts the other half behind the first.
    tokens, _, _, places, _ = hico()
    halves = (places % 2 * 577 + places).argsort(dim=1)[..., None].expand_as(tokens)
    torch.testing.assert_close(tokens.gather(1, halves), eager()[0], **CLOSE[dtype])
    cost = SPECS["merge_similar"].cost(sample)
    run = hico if impl == "hico" else eager
    measure(run, dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops)  # as merge_tokens


@pytest.mark.parametrize("impl", ["hico", "layer_norm_and_mean", *peers.on_gpu("compiled")])
@DTYPES
@pytest.mark.parametrize("clips", [N, 250] if torch.cuda.is_available() else [N])
def test_layer_norm_metric(measure, device, threads, benchmark, clips, dtype, impl):
    s = CLIPS["umt224_clip"]
    benchmark.group = f"layer_norm_metric-umt224_clip_x{clips}-{short(dtype)}"
    x = torch.randn(clips, s.tokens, s.channels, device=device, dtype=dtype)
    weight, bias = torch.randn(2, s.channels, device=device, dtype=dtype).unbind()
    arguments = x, weight, bias, 1e-6, s.heads
    run = {
        "hico": layer_norm_metric,
        "layer_norm_and_mean": alternatives.layer_norm_and_mean,
        "compiled": lambda *given: peers.compiled(alternatives.layer_norm_and_mean)(*given),
    }[impl]
    theirs = alternatives.layer_norm_and_mean(*arguments)
    for ours, other in zip(layer_norm_metric(*arguments), theirs, strict=True):
        torch.testing.assert_close(ours, other, **CLOSE[dtype])
    cost = SPECS["layer_norm_metric"].cost(Sample("", arguments))
    # It computes in float32 whatever the dtype.
    measure(lambda: run(*arguments), dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops)


@pytest.mark.parametrize("impl", ["hico", "layer_norm_gradient"])
@DTYPES
@pytest.mark.parametrize("clips", [N, 250] if torch.cuda.is_available() else [N])
def test_layer_norm_backward(measure, device, threads, benchmark, clips, dtype, impl):
    """The gradient of the norm alone."""
    s, spec = CLIPS["umt224_clip"], SPECS["layer_norm_backward"]
    benchmark.group = f"layer_norm_backward-umt224_clip_x{clips}-{short(dtype)}"
    if benchmark.disabled:  # that it runs takes no many clips
        clips = 1
    shape = 2, clips, s.tokens, s.channels
    grad, x = torch.randn(shape, device=device, dtype=dtype).unbind()
    weight, bias = torch.randn(2, s.channels, device=device, dtype=dtype).unbind()
    sample = Sample("", (grad, x, weight, 1e-6))

    def prepared(kind):
        inputs = [t.to(kind).clone().requires_grad_() for t in (x, weight, bias)]
        made = torch.nn.functional.layer_norm(inputs[0], weight.shape, *inputs[1:], 1e-6)
        return lambda: alternatives.gradient(made, inputs, grad.to(kind))

    ours, theirs = lambda: spec.run(sample, "auto"), prepared(dtype)
    # In bfloat16 torch on the CPU sums those of weight and bias with errors of percents.
    for own, other in zip(ours(), prepared(torch.float32)(), strict=True):
        tolerance = CLOSE[dtype]["atol"] * max(other.abs().max().item(), 1)
        close = CLOSE[dtype] | {"atol": tolerance}
        torch.testing.assert_close(own, other, check_dtype=False, **close)
    cost = spec.cost(sample)
    run = ours if impl == "hico" else theirs
    measure(run, dtype=torch.float32, bytes_=cost.bytes, flops=cost.flops)
