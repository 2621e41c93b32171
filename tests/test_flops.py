"""The cost model against published figures and against torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.flops import kv_bytes, layer_macs_per_row, prefill_flops, rows_per_layer

QWEN2_7B = {"hidden": 3584, "intermediate": 18944, "kv_width": 512, "vocab": 152064}
LAYERS = 28


def test_a_layer_of_qwen2_7b_costs_its_weights():
    assert layer_macs_per_row(3584, 18944, 512) == 233_046_016


@pytest.mark.parametrize(
    ("tokens", "teraflops"),
    [
        (196 * 64, 209.0),
        (196 * 256, 1215),
        (196 * 1000, 10482),
        (144 * 64, 147.4),
        (144 * 256, 794),
        (144 * 1000, 6198),
        (16 * 64, 14.7),
        (16 * 256, 61.3),
        (16 * 1000, 278),
    ],
    ids=lambda v: str(v),
)
def test_long_videos_cost_what_a_causal_prefill_costs(tokens, teraflops):
    """LongVILA has 196 tokens per frame, LongVA 144, VideoChat-Flash 16; the head at every row."""
    flops = prefill_flops([tokens] * LAYERS, head_rows=tokens, **QWEN2_7B)
    assert flops / 1e12 == pytest.approx(teraflops, rel=2.5e-3)


def test_the_head_at_one_row_is_what_generation_needs():
    many, one = (prefill_flops([9] * 2, head_rows=n, **QWEN2_7B) for n in (9, 1))
    assert many - one == 8 * 2 * 3584 * 152064


def test_rows_follow_the_plan():
    plan = DropPlan({4: Uniform(0.75), 18: TextTopK(0.25)})
    rows = rows_per_layer(1024, 50, LAYERS, plan.counts(1024))
    assert rows == [1074] * 4 + [818] * 14 + [306] * 10
    assert rows_per_layer(1024, 50, 3) == [1074] * 3


def test_kv_of_qwen2_7b_is_57344_bytes_a_token():
    assert kv_bytes([1] * LAYERS, kv_width=512) == 57_344
    assert kv_bytes([1] * LAYERS, kv_width=512, bytes_per_value=4) == 114_688
    assert kv_bytes([], kv_width=512) == 0


def test_the_matrices_cost_what_torch_counts():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 320}
    config = transformers.Qwen2Config(
        **sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 37, dtype=torch.long), logits_to_keep=1, use_cache=False)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    square = 3 * 4 * 64 * 37**2  # torch counts all of QK^T and PV, we the half that the mask leaves
    assert counts["aten.bmm"] == pytest.approx(square, rel=1e-3)  # some versions add rotary angles
    ours = prefill_flops([37] * 3, hidden=64, intermediate=176, kv_width=32, vocab=320)
    assert counts["aten.mm"] + counts["aten.addmm"] == ours - square // 2
