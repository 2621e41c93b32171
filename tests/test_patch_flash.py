"""Patched models under flash attention, whose kernels are replaced here by the library's own
definition: what is tested is what they are handed.
"""

import patch_models as tiny
import pytest
import torch
from patch_runs import FROM_0, FROM_1, second_turn, two_videos
from transformers import DynamicCache, modeling_flash_attention_utils

import hico_kernels
from hico_kernels import DropPlan, Uniform, UnsupportedModel
from hico_kernels.patch.masked import masked


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
    return hico_kernels.ragged_attention(
        q,
        k,
        v,
        cu_seqlens_q.long(),
        cu_seqlens_k.long(),
        int(max_seqlen_q),
        int(max_seqlen_k),
        causal=causal,
        scale=softmax_scale,
        impl="reference",
    )


def dense(q, k, v, causal, softmax_scale):
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    out = varlen(
        *(t.flatten(0, 1) for t in (q, k, v)),
        torch.arange(batch + 1) * queries,
        torch.arange(batch + 1) * keys,
        queries,
        keys,
        causal,
        softmax_scale,
    )
    return out.view(q.shape)


@pytest.fixture
def flash(monkeypatch):
    """A model whose language model attends by "flash_attention_2"."""
    module = modeling_flash_attention_utils
    fakes = (dense, varlen, None, module._pad_input, module._unpad_input)
    if tiny.VERSION < (5, 0):
        fakes = (dense, varlen, module._pad_input, module._unpad_input)
        monkeypatch.setattr(module, "_flash_fn", None)
        monkeypatch.setattr(module, "_process_flash_kwargs_fn", None)
    else:
        monkeypatch.setattr(module, "_loaded_implementation", None)
    monkeypatch.setattr(module, "_lazy_imports", lambda *args, **kwargs: fakes)
    model = tiny.fresh("llava_onevision")
    tiny.decoder(model).config._attn_implementation = "flash_attention_2"
    return model


def by_sdpa(model, inputs, kept, length):
    decoder = tiny.decoder(model)
    decoder.config._attn_implementation = "sdpa"
    try:
        with masked(decoder, kept, length):
            return tiny.generate(model, inputs, use_cache=False)
    finally:
        decoder.config._attn_implementation = "flash_attention_2"


each = pytest.mark.parametrize("plan", [FROM_0, FROM_1], ids=["from-0", "from-1"])
padded = pytest.mark.parametrize("padding", [(0,), (0, 3)], ids=["one", "padded"])


@each
@padded
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_two_turns(flash, plan, padding, rows):
    inputs = tiny.prompt("llava_onevision", padding)
    length = inputs["input_ids"].shape[1]
    question = torch.randint(3, 80, (len(padding), 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(flash, plan, rows) as handle:
        first = tiny.generate(flash, inputs, past_key_values=DynamicCache())
        more = second_turn(flash, inputs, first, question)
        second = tiny.generate(flash, more, past_key_values=first.past_key_values)
    assert tiny.difference(first, by_sdpa(flash, inputs, handle.kept, length)) < 1e-12
    whole = {**inputs, **more}
    assert tiny.difference(second, by_sdpa(flash, whole, handle.kept, length)) < 1e-12


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="generate gives pixels to first turns only")
@each
@padded
def test_gaps_between_positions_are_no_packed_sequences(flash, plan, padding):
    """Row 7: given the positions of the kept tokens, flash attention would take the gaps for packed
    sequences, and attend in the second turn to as many keys as there are queries.
    """
    got, kept, both = two_videos(flash, plan, padding)
    assert tiny.difference(got, by_sdpa(flash, both, kept, both["input_ids"].shape[1])) < 1e-12


def test_selfcheck_compares_flash_attention_with_a_mask(flash):
    assert hico_kernels.selfcheck(flash)["error"] < 1e-12
    assert tiny.decoder(flash).config._attn_implementation == "flash_attention_2"


def test_flash_attention_with_sliding_windows_is_refused():
    """Its windows count stored tokens, not positions."""
    kinds = ["full_attention", "sliding_attention"] * 2
    more = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    model, inputs = tiny.fresh("qwen2_vl", **more), tiny.prompt("qwen2_vl")
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})):
        tiny.decoder(model).config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedModel, match="counts sliding windows in stored tokens"):
            tiny.generate(model, inputs)
    with pytest.raises(UnsupportedModel, match="use sdpa for this model"):
        hico_kernels.patch(model, DropPlan({1: Uniform(0.5)}))
