"""Torch's FLOP counter: that it sees our operators, and counts what the cost model says."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hico_kernels import (
    DropPlan,
    TextTopK,
    Uniform,
    bipartite_soft_matching,
    counting,
    merge_tokens,
    ops,
    ragged_attention,
    ragged_decode_attention,
    text_guided_scores,
)
from hico_kernels.attention.reference import (
    ragged_attention_backward_reference,
    ragged_attention_reference,
)
from hico_kernels.flops import SIGLIP_TABLE5, UMT_L_TABLE5, cost
from hico_kernels.merge.reference import merge_tokens_reference
from hico_kernels.select.reference import text_guided_scores_reference

H, HKV, D = 4, 2, 8
FRAMES, TEXT = 256, 60


def count(run, **options) -> int:
    with FlopCounterMode(display=False, **options) as counter:
        run()
    return counter.get_total_flops()


def packed(*rows: int, device: str = "cpu", heads: int = H) -> tuple:
    """Tensor [sum(rows), heads, D], its cumulative lengths and the longest."""
    ends = torch.tensor([0, *rows]).cumsum(0).to(device)
    return torch.randn(sum(rows), heads, D, device=device), ends, max(rows)


# --- operators


def attention(queries, keys, device="cpu", **options):
    q, ends_q, longest_q = packed(*queries, device=device)
    k, ends_k, longest_k = packed(*keys, device=device, heads=HKV)
    return ragged_attention(q, k, torch.randn_like(k), ends_q, ends_k, longest_q, longest_k)


def test_attention_costs_what_its_definition_multiplies():
    queries, keys = (3, 5, 1), (7, 5, 4)
    q, ends_q, longest_q = packed(*queries)
    k, ends_k, longest_k = packed(*keys, heads=HKV)
    args = (q, k, torch.randn_like(k), ends_q, ends_k, longest_q, longest_k, True, 0.3, None)
    want = count(lambda: ragged_attention_reference(*args))
    assert want == 4 * H * D * (3 * 7 + 5 * 5 + 1 * 4)
    assert count(lambda: attention(queries, keys)) == want
    out, lse = ragged_attention_reference(*args)
    rest = (q, *args[:3], out, lse, *args[3:])
    want = count(lambda: ragged_attention_backward_reference(*rest))
    assert count(lambda: torch.ops.hico_reference.ragged_attention_backward(*rest)) == want


def test_causal_mapping_counts_what_the_mask_leaves():
    mapping = {"custom_mapping": counting.causal()}
    seen = (5 + 6 + 7) + (1 + 2 + 3 + 4 + 5) + 4
    assert count(lambda: attention((3, 5, 1), (7, 5, 4)), **mapping) == 4 * H * D * seen
    q = packed(6)[0].requires_grad_()
    ends = torch.tensor([0, 6])

    def both():
        ragged_attention(q, q, q, ends, ends, 6, 6, causal=True).sum().backward()

    assert count(both, **mapping) == (4 + 10) * H * D * 21
    assert count(both) == (4 + 10) * H * D * 36


def test_attention_without_values_is_exact_for_one_sequence_and_else_torchs_bound():
    assert count(lambda: attention((5,), (9,), "meta")) == 4 * H * D * 45
    assert count(lambda: attention((3, 5), (7, 5), "meta")) == 2 * 4 * H * D * 5 * 7
    q, ends = torch.empty(5, H, D, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    wide = count(lambda: ragged_attention(q, q, q, ends, ends, 100, 100))
    assert wide == 4 * H * D * 25


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scores_cost_what_their_definition_multiplies(device):
    def run(rows, keys):
        q, ends_q, _ = packed(*rows, device=device)
        k, ends_k, _ = packed(*keys, device=device, heads=HKV)
        text_guided_scores(q, k, ends_q, ends_k)

    assert count(lambda: run((1, 1), (6, 9))) == 2 * H * D * 15
    q, ends_q, _ = packed(2, 3)
    k, ends_k, _ = packed(6, 9, heads=HKV)
    want = count(lambda: text_guided_scores_reference(q, k, ends_q, ends_k, 0.3))
    spread = 2 * H * D * (5 * 15 // 2)
    assert count(lambda: run((2, 3), (6, 9))) == (want if device == "cpu" else spread)


@pytest.mark.parametrize(("tokens", "kept"), [(784, 64), (49, 16), (16, 16), (17, 16)])
def test_merging_costs_what_its_definition_multiplies(tokens, kept):
    x = torch.randn(2, tokens, 32)
    want = count(lambda: merge_tokens_reference(x, kept, 4))
    assert count(lambda: merge_tokens(x, kept, num_heads=4)) == want
    assert (want == 0) == (tokens == kept)


@pytest.mark.parametrize("protected", [(False, False), (True, False), (True, True)])
def test_matching_counts_its_products(protected):
    a, b = 5 - protected[0], 4 - protected[1]
    x = torch.randn(3, 9, 8)
    options = dict(zip(("class_token", "distill_token"), protected, strict=True))
    assert count(lambda: bipartite_soft_matching(x, 2, **options)) == 2 * 3 * a * b * 8
    assert count(lambda: bipartite_soft_matching(x, 0, **options)) == 0


def test_decoding_counts_the_used_cache_and_without_values_all_of_it():
    def run(device):
        cache = torch.randn(2, 10, HKV, D, device=device)
        lengths = torch.tensor([3, 7]).to(device)
        ragged_decode_attention(torch.randn(2, H, D, device=device), cache, cache, lengths)

    assert count(lambda: run("cpu")) == 4 * H * D * 10
    assert count(lambda: run("meta")) == 4 * H * D * 20


@pytest.mark.parametrize("counter_first", [False, True])
def test_importing_the_library_is_enough_and_brings_no_triton(counter_first):
    lines = [
        "import torch, sys",
        "import hico_kernels",
        "light = not {'triton', C} & set(sys.modules)",
    ]
    lines.insert(1 if counter_first else 3, "from torch.utils.flop_counter import flop_registry")
    lines += ["print(light, sum('hico' in str(op) for op in flop_registry))"]
    code = "\n".join(lines).replace("C}", "'torch.utils.flop_counter'}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        str(not counter_first),
        str(len(ops.NAMESPACES) * len(counting.FORMULAS)),
    ]


# --- the model


@pytest.fixture(scope="module")
def counted():
    pytest.importorskip("transformers")
    from hico_model import counted

    return counted


PLANS = {
    "none": {},
    "paper": {4: Uniform(0.75), 18: TextTopK(0.25)},
    "24": {24: TextTopK(0.5)},
    "8-16-24": {8: TextTopK(0.5), 16: TextTopK(0.25), 24: TextTopK(0.125)},
}
PRESETS = ("nano", "2b-448", "7b-224", "7b-448", "7b-1m-224")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_is_what_torch_counts(counted, preset, plan):
    from hico_model import presets

    config, plan = presets[preset], DropPlan(PLANS[plan])
    sizes = {"frames": FRAMES, "tokens_per_frame": 16, "text": TEXT, "drops": plan}
    full, causal = counted.prefill(config, FRAMES * 16, TEXT, plan)
    assert cost(config.decoder, **sizes, convention="prefill_full").flops == full
    assert cost(config.decoder, **sizes, convention="prefill_causal").flops == causal


@pytest.mark.parametrize("preset", PRESETS)
def test_vision_and_weights_are_those_of_the_modules(counted, preset):
    from hico_model import VideoChatFlash, presets

    config = presets[preset]
    parts = cost(config.decoder, frames=FRAMES, tokens_per_frame=16, vision=config.vision).parts
    ours = sum(parts[name] for name in ("encoder", "merge", "projector"))
    assert counted.vision(config, FRAMES) == ours
    model = VideoChatFlash(config, device="meta")
    assert config.decoder.parameters == sum(p.numel() for p in model.llm.parameters())


def test_presets_cover_all(counted):
    from hico_model import presets

    assert tuple(presets) == PRESETS


def test_encoders_of_table_5_are_what_torch_counts(counted):
    from hico_model import presets

    umt, siglip = (2 * sum(e.macs().values()) for e in (UMT_L_TABLE5, SIGLIP_TABLE5))
    assert counted.umt(presets["7b-224"], layers=24, frames=8) == umt
    assert counted.siglip(8) == 8 * siglip
