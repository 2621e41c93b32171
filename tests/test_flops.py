"""The cost model against published figures; tests/test_counting.py has torch's own counter."""

from dataclasses import replace

import pytest

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.flops import (
    CARD_BYTES,
    QWEN2_7B,
    SIGLIP_TABLE5,
    UMT_L,
    UMT_L_TABLE5,
    Decoder,
    cost,
    rows_per_layer,
    visible_pairs,
)
from hico_model.paper_tables import TABLE1

PAPER_PLAN = DropPlan({4: Uniform(0.75), 18: TextTopK(0.25)})

OUTLIER = (1000, "LongVILA")  # 79.7 GB printed; the line of all other cells gives 60.2


def gigabytes(value: int) -> str:
    return "oom" if value > CARD_BYTES else f"{value / 1e9:.1f}"


@pytest.mark.parametrize("line", TABLE1, ids=lambda line: f"{line.model}-{line.frames}")
def test_paper_convention_prints_table_1(line):
    ours = cost(
        QWEN2_7B,
        frames=line.frames,
        tokens_per_frame=line.tokens_per_frame,
        convention="paper",
    )
    assert f"{float(f'{ours.flops / 1e12:.6g}'):.1f}" == line.teraflops
    assert gigabytes(ours.train_bytes) == line.train_gigabytes
    if line[:2] == OUTLIER:
        assert (gigabytes(ours.infer_bytes), line.infer_gigabytes) == ("60.2", "79.7")
    else:
        assert gigabytes(ours.infer_bytes) == line.infer_gigabytes


def test_table_1_has_14_memory_cells_besides_the_outlier():
    memory = [cell for line in TABLE1 for cell in line[4:]]
    assert len(memory) - memory.count("oom") == 14 + 1


def test_paper_convention_is_the_documented_formula():
    n, p = 144 * 64 + 128, 7_615_616_512
    ours = cost(QWEN2_7B, frames=64, tokens_per_frame=144, convention="paper")
    assert ours.flops == 4 * 7_070_285_824 * n + 6 * 28 * 3584 * n**2
    assert ours.infer_bytes == 2 * p + 229_376 * n
    assert ours.train_bytes == 4 * p + 12 * p // 32 + 1_846_272 * n
    assert ours.weight_bytes == 2 * p
    assert ours.kv_bytes == 57_344 * n
    assert ours.activation_bytes == 3 * 57_344 * n


@pytest.mark.parametrize(("frames", "ratio"), [(1000, "47.3"), (10000, "118.8")])
def test_later_version_of_the_paper_has_16_tokens(frames, ratio):
    """Its note: "saves 47.3x computation (up to 119x for 10,000 frames)", with no text tokens."""
    vila = cost(QWEN2_7B, frames=frames, tokens_per_frame=196, convention="paper")
    ours = cost(QWEN2_7B, frames=frames, tokens_per_frame=16, text=0, convention="paper")
    assert f"{vila.flops / ours.flops:.1f}" == ratio


@pytest.mark.parametrize(
    ("drops", "teraflops"),
    [
        ({}, 341.4),
        ({4: Uniform(0.5)}, 242.8),
        ({4: TextTopK(0.5)}, 242.8),
        ({18: TextTopK(0.5)}, 295.2),
        ({4: Uniform(0.75), 18: TextTopK(0.25)}, 245.8),
    ],
    ids=["none", "uniform4", "text4", "text18", "both"],
)
def test_profiler_convention_is_within_a_thousandth_of_table_7(drops, teraflops):
    ours = cost(
        QWEN2_7B,
        frames=1000,
        tokens_per_frame=16,
        text=60,
        drops=DropPlan(drops),
        vision=UMT_L,
        convention="profiler",
    )
    assert ours.flops / 1e12 == pytest.approx(teraflops, rel=1e-3)
    assert ours.parts["attention"] == ours.parts["merge"] == 0
    assert ours.infer_bytes is ours.train_bytes is ours.activation_bytes is None


def test_encoders_are_within_a_thousandth_of_table_5():
    assert sum(UMT_L_TABLE5.macs().values()) / 1e9 == pytest.approx(596, rel=1e-3)
    assert 8 * sum(SIGLIP_TABLE5.macs().values()) / 1e9 == pytest.approx(2679, rel=1e-3)


def test_variants_of_the_encoders():
    """In GMAC: a class token, UMT-L's published 16 frames (1434), SigLIP without its head."""

    def macs(encoder, **fields):
        return round(sum(replace(encoder, **fields).macs().values()) / 1e9, 2)

    assert macs(UMT_L_TABLE5, class_token=True) == 596.06
    assert macs(UMT_L_TABLE5, class_token=True, frames=16) == pytest.approx(1434, rel=1e-3)
    assert macs(SIGLIP_TABLE5) == 335.17
    assert macs(SIGLIP_TABLE5, pooling_head=False) == 333.22


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
    ids=str,
)
def test_long_videos_cost_what_a_causal_prefill_costs(tokens, teraflops):
    """LongVILA has 196 tokens per frame, LongVA 144, VideoChat-Flash 16; the head at every row."""
    parts = QWEN2_7B.prefill_flops([tokens] * 28, head_rows=tokens)
    assert sum(parts.values()) / 1e12 == pytest.approx(teraflops, rel=2.5e-3)


def test_head_at_one_row_is_what_generation_needs():
    many, one = (QWEN2_7B.prefill_flops([9] * 2, head_rows=n) for n in (9, 1))
    assert many.pop("head") - one.pop("head") == 8 * 2 * 3584 * 152064
    assert many == one


def test_causal_attention_counts_the_pairs_that_the_mask_leaves():
    assert visible_pairs(5, 5) == 15
    assert visible_pairs(2, 5) == 4 + 5
    assert visible_pairs(5, 2) == 1 + 2
    assert visible_pairs(0, 5) == 0
    assert visible_pairs(2, 5, causal=False) == 10
    half, full = (
        cost(QWEN2_7B, frames=4, tokens_per_frame=16, text=0, convention=c).parts["attention"]
        for c in ("prefill_causal", "prefill_full")
    )
    assert (half, full) == (28 * 4 * 3584 * 64 * 65 // 2, 28 * 4 * 3584 * 64**2)


def test_rows_follow_the_plan():
    rows = rows_per_layer(1024, 50, 28, PAPER_PLAN.counts(1024))
    assert rows == [1074] * 4 + [818] * 14 + [306] * 10
    assert rows_per_layer(1024, 50, 3) == [1074] * 3
    sizes = {"frames": 64, "tokens_per_frame": 16, "text": 50}
    assert cost(QWEN2_7B, **sizes, drops=PAPER_PLAN).rows == rows
    assert cost(QWEN2_7B, **sizes, drops=PAPER_PLAN).kv_bytes == sum(rows) * 2048
    from_all = cost(QWEN2_7B, **sizes, drops=PAPER_PLAN, convention="profiler").rows
    assert from_all == [1074] * 4 + [805] * 14 + [268] * 10


def test_counts_drop_like_a_plan_but_nothing_is_scored():
    sizes = {"frames": 64, "tokens_per_frame": 16, "text": 50}
    plan = cost(QWEN2_7B, **sizes, drops=PAPER_PLAN)
    counts = cost(QWEN2_7B, **sizes, drops={4: 768, 18: 256})
    assert plan.rows == counts.rows
    # the keys and products of 818 rows, the query of one
    assert plan.flops - counts.flops == 2 * 3584 * (512 * 818 + 3584 + 818)


def test_sizes_of_qwen2_7b():
    assert QWEN2_7B.layer_macs == 233_046_016
    assert QWEN2_7B.parameters == 7_615_616_512
    assert QWEN2_7B.kv_bytes([1] * 28) == 57_344
    assert QWEN2_7B.kv_bytes([1] * 28, value_bytes=4) == 114_688
    assert QWEN2_7B.kv_bytes([]) == 0


def test_a_llama_has_no_qkv_bias():
    llama3_8b = Decoder(32, 4096, 14336, 32, 8, 128256, qkv_bias=False)
    assert llama3_8b.parameters == 8_030_261_248  # that of its checkpoint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"convention": "exact"}, "convention must be one of paper, .*, got 'exact'"),
        ({"convention": "paper", "vision": UMT_L}, "vision must be None"),
        ({"frames": 6, "vision": UMT_L}, "whole passes of 4, got 6"),
        ({"drops": {28: 10}}, "layers 0 to 27, got 28"),
        ({"drops": DropPlan({28: Uniform(0.5)})}, "layers 0 to 27"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_cost_refuses_what_it_cannot_count(change, says):
    with pytest.raises(ValueError, match=says):
        cost(QWEN2_7B, **({"frames": 8, "tokens_per_frame": 16} | change))
