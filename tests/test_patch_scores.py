"""Scores of a layer from keys that are turned while they are read, beside those from what the layer
itself attends with.
"""

import patch_models as tiny
import pytest
import torch

from hico_kernels.patch import scores
from hico_kernels.patch.families import take_apart
from hico_kernels.patch.scores import probe_config, text_scores, turns_halves

MULTI_AXIS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OTHERS = ("internvl", "internvl-qwen3", "llava_next_video", "llava_onevision", "gemma3", "smolvlm")
TURNED = [
    name for name in (*MULTI_AXIS, *OTHERS) if tiny.VERSION >= (5, 18) or "qwen2_" not in name
]
ASKING, LENGTHS = torch.tensor([8, 17]), [9, 7]
SLOTS = torch.cat([torch.arange(9), torch.arange(11, 18)])  # of [2, 9]; two are padding


def given(name, dtype=torch.float64):
    """Arguments of `text_scores` for the first layer, but for which token asks, and what it hears.

    The positions of the second sequence are others than those of the first.
    """
    model = tiny.model(name, dtype)
    decoder = tiny.decoder(model)
    torch.manual_seed(1)
    hidden = torch.randn(2, 9, decoder.config.hidden_size, dtype=dtype)
    places = torch.stack([torch.arange(9), torch.arange(20, 29)])
    if take_apart(model).family.multi_axis:
        places = places + torch.tensor([0, 3, 7])[:, None, None]
    if tiny.VERSION >= (5, 0) and name == "gemma3":
        tables = decoder.rotary_emb(hidden, places, "sliding_attention")
    else:
        tables = decoder.rotary_emb(hidden, places)
    return decoder.layers[0], hidden, tables, probe_config(decoder.config)


def score(layer, hidden, tables, config, asking=ASKING, slots=SLOTS, lengths=LENGTHS):
    return text_scores(layer, hidden, tables, asking, slots, lengths, config)


@pytest.fixture
def as_attended(monkeypatch):
    """Scores of the queries and keys that the layer's own code makes."""

    def run(*arguments, **more):
        with monkeypatch.context() as patch:
            patch.setattr(scores, "turns_halves", lambda attention, table: False)
            return score(*arguments, **more)

    return run


@pytest.mark.parametrize("name", TURNED)
def test_scores_are_those_of_the_layers_own_queries_and_keys(name, as_attended, monkeypatch):
    layer, hidden, tables, config = given(name)
    want = as_attended(layer, hidden, tables, config)
    monkeypatch.setattr(scores, "attention_inputs", None)  # not asked
    got = score(layer, hidden, tables, config)
    assert want.std() > 1e-3  # they differ among tokens
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl-qwen3"])
def test_a_whole_batch_with_one_table_for_all_rows(name, as_attended):
    layer, hidden, tables, config = given(name)
    tables = tuple(table[:1] for table in tables)
    every = {"slots": torch.arange(18), "lengths": [9, 9]}
    want = as_attended(layer, hidden, tables, config, **every)
    got = score(layer, hidden, tables, config, **every)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl-qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name, dtype, as_attended):
    """Within the rounding of queries and keys: the layer's own code rounds keys three times."""
    layer, hidden, tables, config = given(name, torch.float32)
    want = score(layer, hidden, tables, config)
    with torch.autocast("cpu", dtype):
        mixed = score(layer, hidden, tables, config), as_attended(layer, hidden, tables, config)
    layer, hidden, tables, config = given(name, dtype)
    half = score(layer, hidden, tables, config), as_attended(layer, hidden, tables, config)
    for got, own in (mixed, half):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 2 * (own - want).abs().max() + torch.finfo(dtype).eps


def test_rotary_positions_of_another_kind_are_left_to_the_layer():
    """GLM-4V turns neighbours in a head, before 5.18 Qwen2-VL's tables have an axis more."""
    layer, _, (cos, _), _ = given("glm4v")
    assert not turns_halves(layer.self_attn, cos)
    layer, _, (cos, _), _ = given("qwen3_vl")
    assert turns_halves(layer.self_attn, cos)
    assert not turns_halves(layer.self_attn, cos.expand(3, -1, -1, -1))
    assert not turns_halves(layer.self_attn, cos[..., :4])  # a part of each head
    own = type(layer.self_attn)
    look_alike = type(own.__name__, (own,), {"__module__": "mine"})
    layer.self_attn.__class__ = look_alike
    try:
        assert not turns_halves(layer.self_attn, cos)
    finally:
        layer.self_attn.__class__ = own
