"""Static caches with sliding windows: tensors of a fixed size, which hold the last kept tokens."""

import patch_models as tiny
import pytest
import torch
from patch_runs import FROM_0, FROM_1, KINDS, every_plan, forward, second_turn
from transformers import StaticCache

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch.columns import DroppedStaticSlidingLayer
from hico_kernels.patch.masked import masked
from hico_kernels.patch.packed_cache import PackedStaticSlidingLayer

# Unpatched models fail or differ with a static cache: Gemma 3 in 5.13, Gemma 4's images until 5.18.
UNSOUND = {"gemma3"} if (5, 13) <= tiny.VERSION < (5, 18) else set()
UNSOUND |= {"gemma4-experts"} if tiny.VERSION <= (5, 18) else set()
NAMES = {"gemma3", "gemma4", "gemma4-experts"} & set(tiny.MODELS) - UNSOUND
LAYOUTS = {
    "one": ("padded", (0,)),
    "padded": ("padded", (0, 6, 2)),
    "packed": ("packed", (0, 6, 2)),
}
every_model = pytest.mark.parametrize("name", sorted(NAMES))


@every_model
@every_plan
@pytest.mark.parametrize(("rows", "padding"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_past_the_window(name, plan, rows, padding, more):
    """Windows of 20: full from the prompt on where little is dropped, and later where much is."""
    model, inputs = tiny.model(name), tiny.prompt(name, padding)
    given = {"max_new_tokens": 12, **more}
    with hico_kernels.compress(model, plan, rows) as handle:
        got = tiny.generate(model, inputs, cache_implementation="static", **given)
    want = tiny.reference(model, handle, inputs, **given)
    assert tiny.difference(got, want) < 1e-12


@every_model
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_the_tensors_stay_the_users_own(name, rows):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 6, 2))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with hico_kernels.compress(model, FROM_0, rows) as handle:
        first = tiny.generate(model, inputs, past_key_values=cache)
        layer = cache.layers[0]
        assert isinstance(layer, DroppedStaticSlidingLayer)
        assert isinstance(layer, PackedStaticSlidingLayer) == (rows == "packed")
        keys = layer.keys
        assert keys.shape[2] == 20
        cache.reset()
        again = tiny.generate(model, inputs, past_key_values=cache)
    assert cache.layers[0].keys is keys
    assert tiny.difference(again, first) == 0
    assert tiny.difference(first, tiny.reference(model, handle, inputs)) < 1e-12


@every_model
@every_plan
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_a_second_question_on_the_same_cache(name, plan, rows):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 6, 2))
    question = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan, rows) as handle:
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = tiny.generate(model, inputs, past_key_values=cache)
        more = second_turn(model, inputs, first, question)
        behind = more["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        whole = {**inputs, **{k: v for k, v in more.items() if k in inputs}}
        if "token_type_ids" in inputs:
            whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, behind))
            more.pop("token_type_ids")
        got = tiny.generate(model, more, past_key_values=cache)
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = tiny.generate(model, whole, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("window", [6, 19, 40])
def test_any_window(window, rows):
    """Also one longer than the prompt, and one that every layer fills at once."""
    model = tiny.fresh(
        "qwen2_vl", use_sliding_window=True, sliding_window=window, layer_types=KINDS
    )
    inputs, plan = tiny.prompt("qwen2_vl", (0, 4, 2)), DropPlan({1: Uniform(0.5), 2: TextTopK(3)})
    with hico_kernels.compress(model, plan, rows) as handle:
        got = tiny.generate(model, inputs, cache_implementation="static")
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@pytest.mark.skipif("gemma4" not in tiny.MODELS, reason="no Gemma 4 in this transformers")
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_a_window_that_text_has_filled_takes_a_video(rows):
    """The layer is taken over with what the stock one holds; masks reach as far back as that.
    (Where images see ahead, stock models themselves differ from those without a cache here.)
    """
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4", (0, 3))
    before = torch.randint(3, 80, (2, 24), generator=torch.Generator().manual_seed(4))
    ones = torch.ones_like(before)
    whole = {**inputs, "input_ids": torch.cat([before, inputs["input_ids"]], 1)}
    whole["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], 1)
    whole["mm_token_type_ids"] = torch.cat([0 * ones, inputs["mm_token_type_ids"]], 1)
    cache = StaticCache(config=model.config, max_cache_len=96)
    with hico_kernels.compress(model, FROM_1, rows) as handle:
        forward(model, input_ids=before, attention_mask=ones, past_key_values=cache)
        rest = {**inputs, "attention_mask": whole["attention_mask"]}
        got = forward(model, **rest, past_key_values=cache, logits_to_keep=1).logits
    kept = {
        layer: [torch.cat([torch.arange(24), row + 24]) for row in rows]
        for layer, rows in handle.kept.items()
    }
    with masked(tiny.decoder(model), kept, whole["input_ids"].shape[1]):
        want = forward(model, **whole, use_cache=False, logits_to_keep=1).logits
    assert (got - want).abs().max() < 1e-12
