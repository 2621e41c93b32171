"""Models of other people, patched: time to first token, decoding and memory, beside the stock model
and beside a drop whose scores are read off an attention map, as PyramidDrop's code does.

The language model alone, with random weights; the vision tower has a row of its own. On a CPU the
shapes are small, and what shows is the code; on CUDA they are those of the released models.
"""

import time
from contextlib import nullcontext
from itertools import accumulate
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import transformers

import hico_kernels
from bench.compare import interval
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch import call
from hico_kernels.patch.scores import attention_inputs

CUDA = torch.cuda.is_available()
DTYPE, TAG = (torch.bfloat16, "bf16") if CUDA else (torch.float32, "f32")
PER_FRAME, TEXT, NEW = 16, 64, 16
LARGEST_MAP = 20_000 if CUDA else 5_000  # tokens
PAIRS = {"prefill": 200, "decoding": 400}
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
MIDDLE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
MIDDLE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4000}
SIZES = {  # Qwen2.5-VL-3B and LLaVA-OneVision-7B
    "qwen2_5_vl": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "llava_onevision": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}
FRAMES = (64, 256, 1000, 10_000) if CUDA else (64, 256, 1000)
# Sequences of a batch, in parts of the frames: 1, and 8 of different lengths.
BATCHES = {"one": (1.0,), "ragged8": (1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1)}
UNEVEN = FRAMES[:2] if CUDA else (16, 64)
SHAPES = [(f, "one") for f in FRAMES] + [(f, "ragged8") for f in UNEVEN]
shapes = pytest.mark.parametrize(("frames", "batch"), SHAPES, ids=[f"{f}-{b}" for f, b in SHAPES])
models = pytest.mark.parametrize("name", SIZES)


def build(name, device, sizes=None):
    sizes = sizes or (SIZES[name] if CUDA else SMALL)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if name == "qwen2_5_vl":
        rope["mrope_section"] = [
            s * sizes["hidden_size"] // sizes["num_attention_heads"] // 128 for s in (16, 24, 24)
        ]
        vision = {"depth": 4, "hidden_size": 160, "intermediate_size": 320, "num_heads": 4}
        vision |= {"out_hidden_size": sizes["hidden_size"], "fullatt_block_indexes": [3]}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**sizes, "rope_parameters": rope, "max_position_embeddings": 1 << 18},
            vision_config=vision,
        )
    else:
        text = {"model_type": "qwen2", **sizes, "rope_parameters": rope}
        vision = {"model_type": "siglip_vision_model", "hidden_size": 160, "num_hidden_layers": 4}
        vision |= {"intermediate_size": 320, "num_attention_heads": 4, "image_size": 112}
        config = transformers.LlavaOnevisionConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    return model.eval()


MODELS = {}


@pytest.fixture
def model(name, device):
    """Built once."""
    if name not in MODELS:
        MODELS.clear()  # one at a time: they are large
        MODELS[name] = build(name, device)
    return MODELS[name]


def plan_for(model):
    layers = len(model.model.language_model.layers)
    return DropPlan({layers // 7: Uniform(0.75), 2 * layers // 3: TextTopK(0.25)})


def prompt(model, frames, batch, device):
    """Embeddings of visual tokens with text around them, padded on the left."""
    visual = [max(1, int(frames * part)) * PER_FRAME for part in BATCHES[batch]]
    length = visual[0] + TEXT
    width = model.model.language_model.config.hidden_size
    mask = torch.ones(len(visual), length, dtype=torch.long, device=device)
    is_visual = torch.zeros(len(visual), length, dtype=torch.bool, device=device)
    for row, count in enumerate(visual):
        mask[row, : visual[0] - count] = 0
        is_visual[row, length - TEXT // 2 - count : length - TEXT // 2] = True
    embeds = torch.randn(len(visual), length, width, device=device, dtype=DTYPE)
    return SimpleNamespace(embeds=embeds, mask=mask, visual=is_visual)


def read(model, given, handle=None):
    """Read the prompt; logits of the last token, and the cache."""
    if handle is not None:
        handle.announce(given.visual)
    decoder = model.model.language_model
    with torch.no_grad():
        out = decoder(inputs_embeds=given.embeds, attention_mask=given.mask, use_cache=True)
        return model.lm_head(out.last_hidden_state[:, -1:]), out.past_key_values


def decode(model, given, cache, new=NEW):
    """So many tokens, one after the other, each the same embedding; the cache ends as it began."""
    decoder, mask = model.model.language_model, given.mask
    with torch.no_grad():
        for _ in range(new):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            embeds = given.embeds[:, -1:]
            out = decoder(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            model.lm_head(out.last_hidden_state)
    cache.crop(-new)


def scores_of_a_map(layer, hidden, embeddings, asking, slots, lengths, config):
    """As `scores.text_scores`, by the whole attention map of one layer with all its queries."""
    q, k, scale = attention_inputs(layer, hidden, embeddings, config)
    batch, length = hidden.shape[:2]
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], 1)
    seen = torch.zeros(batch * length, dtype=torch.bool, device=hidden.device)
    seen[slots] = True
    mask = (
        seen.view(batch, 1, 1, length) & torch.ones(length, length, device=q.device).tril().bool()
    )
    logits = (q @ k.mT * scale).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = logits.softmax(-1, dtype=torch.float32).mean(1).flatten(0, 1)
    return weights[asking].flatten()[slots]


IMPLS = ("stock", "patched", "packed", "map")
impls = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture
def as_impl(monkeypatch):
    """(model, impl) -> a context with a handle, or None for the stock model."""

    def enter(model, impl, plan=None):
        if impl == "stock":
            return nullcontext()
        if impl == "map":
            monkeypatch.setattr(call, "text_scores", scores_of_a_map)
        rows = "packed" if impl == "packed" else "padded"
        return hico_kernels.compress(model, plan or plan_for(model), rows)

    return enter


def peak_bytes(run):
    """What a run has allocated at most, beyond what is there before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def note_memory(benchmark, model, given, handle, timed):
    """Bytes of reading a prompt, of its cache, and where the time of reading went."""
    if timed:
        benchmark.extra_info["peak_bytes"] = peak_bytes(lambda: read(model, given, handle))
    _, cache = read(model, given, handle)
    kept = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    benchmark.extra_info["kv_bytes"] = sum(x.numel() * x.element_size() for x in kept)
    if handle is not None:
        found = handle.report()
        benchmark.extra_info.update(kv_bytes=found.kv_bytes, milliseconds=found.milliseconds)


@models
@shapes
@impls
def test_time_to_first_token(
    measure, device, threads, benchmark, timed, model, as_impl, frames, batch, impl
):
    benchmark.group = f"first_token-{model.config.model_type}_{frames}_{batch}-{TAG}"
    if not timed:
        frames = min(frames, 16)
    if impl == "map" and frames * PER_FRAME > LARGEST_MAP:
        pytest.skip("a map of this many tokens does not fit, or takes minutes")
    given = prompt(model, frames, batch, device)
    with as_impl(model, "patched") as checked:
        read(model, given, checked)
        want, report = checked.kept, checked.report()
    with as_impl(model, impl) as handle:
        note_memory(benchmark, model, given, handle, timed)
        if impl == "map":  # the same tokens but for ties of rounding
            for layer, rows in handle.kept.items():
                pairs = zip(rows, want[layer], strict=True)
                shared = [torch.isin(a, b).float().mean() for a, b in pairs]
                assert min(shared) > 0.98
        flops = report.flops + report.flops_saved * (impl == "stock")
        if impl == "packed":
            flops = handle.report().flops
        rounds = 2 if frames >= 1000 and not CUDA else 5
        measure(lambda: read(model, given, handle), dtype=DTYPE, flops=flops, rounds=rounds)


@models
@pytest.mark.parametrize("impl", IMPLS[:3])
def test_decoding(measure, device, threads, benchmark, model, as_impl, impl):
    """NEW tokens for each sequence, after the prompt: divide for tokens a second."""
    benchmark.group = f"decoding-{model.config.model_type}_{UNEVEN[0]}_ragged8-{TAG}"
    given = prompt(model, UNEVEN[0], "ragged8", device)
    with as_impl(model, impl) as handle:
        _, cache = read(model, given, handle)
        measure(lambda: decode(model, given, cache), dtype=DTYPE, rounds=3)


@models
@pytest.mark.parametrize("impl", ["stock", "patched"])
def test_where_patching_does_not_pay(measure, device, threads, benchmark, model, as_impl, impl):
    """A prompt of two frames: the drops cost as much as they save."""
    benchmark.group = f"first_token-{model.config.model_type}_2_one-{TAG}"
    given = prompt(model, 2, "one", device)
    with as_impl(model, impl) as handle:
        measure(lambda: read(model, given, handle), dtype=DTYPE, rounds=20)


@models
@pytest.mark.parametrize("phase", ["prefill", "decoding"])
@pytest.mark.parametrize("impl", ["patched"])
def test_overhead_of_keeping_everything(
    measure, device, threads, benchmark, timed, as_impl, name, phase, impl
):
    """What the hooks cost on a mid-size model that keeps all of a short prompt's visual tokens.

    `overhead_percent` is the median over pairs of a stock and a patched run, one after the other,
    of what the second takes longer, and its confidence interval: the machine's moods come and go
    within seconds, a pair takes less. Patching itself is not in it, nor the caches that it leaves
    cold: each run has an untimed one in front.
    """
    benchmark.group = f"keep_all_{phase}-{name}_middle_32-{TAG}"
    model = build(name, device, MIDDLE)
    given, plan = prompt(model, 2, "one", device), DropPlan({2: Uniform(1.0), 8: TextTopK(1.0)})
    caches, logits = {}, []
    for kind in ("stock", impl):
        with as_impl(model, kind, plan) as handle:
            first, caches[kind] = read(model, given, handle)
            logits.append(first)
    assert torch.equal(*logits)

    wait = torch.cuda.synchronize if CUDA else lambda: None

    def run(kind, handle):
        if phase == "prefill":
            read(model, given, handle)
        else:
            decode(model, given, caches[kind], 1)

    def seconds(kind):
        with as_impl(model, kind, plan) as handle:
            run(kind, handle)
            wait()
            start = time.perf_counter()  # of the host too: hooks are its work
            run(kind, handle)
            wait()
            return time.perf_counter() - start

    ratios = []
    for turn in range(PAIRS[phase] if timed else 1):
        order = ("stock", impl) if turn % 2 == 0 else (impl, "stock")
        took = {kind: seconds(kind) for kind in order}
        ratios.append(took[impl] / took["stock"])
    found = median(ratios), *interval(ratios)
    benchmark.extra_info["overhead_percent"] = [round(100 * (x - 1), 2) for x in found]
    with as_impl(model, impl, plan) as handle:
        measure(lambda: run(impl, handle), dtype=DTYPE, rounds=5)


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
@pytest.mark.parametrize("impl", ["stock", "ragged"])
def test_vision_tower_of_many_frames(measure, device, threads, benchmark, model, impl):
    """512 time steps of 16 patches each, which stock attends to one by one in every block."""
    benchmark.group = f"vision_tower-{model.config.model_type}_512-{TAG}"
    tower, grid = model.model.visual, torch.tensor([[512, 4, 4]], device=device)
    patches = torch.randn(512 * 16, tower.patch_embed.proj.weight[0].numel(), device=device)

    def encode():
        with torch.no_grad():
            return tower(patches.to(DTYPE), grid_thw=grid).pooler_output

    want = encode()
    handle = hico_kernels.patch.vision_attention(tower) if impl == "ragged" else None
    try:
        torch.testing.assert_close(encode(), want, rtol=1e-2, atol=3e-2 if CUDA else 1e-4)
        measure(encode, dtype=DTYPE, rounds=3)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("name", ["llava_onevision"])
@pytest.mark.parametrize("impl", ["stock"])
def test_vision_tower(measure, device, threads, benchmark, model, impl):
    """Encoding 64 frames by the (small) tower of these models, which patching leaves as it is."""
    benchmark.group = f"vision_tower-{model.config.model_type}_64-{TAG}"
    pixels = torch.randn(1, 64, 3, 112, 112, device=device, dtype=DTYPE)

    def encode():
        with torch.no_grad():
            model.model.get_video_features(pixels)

    measure(encode, dtype=DTYPE, rounds=3)
