"""Conversations and caches: what outlives one call of a patched model, against the reference.

"Row n" is the row of the table of silent failures that the test guards, docs/patching.md.
"""

import copy
import pickle

import patch_models as tiny
import pytest
import torch
from patch_runs import (
    FROM_0,
    FROM_1,
    KINDS,
    both_models,
    every_plan,
    forward,
    grown,
    second_turn,
    two_videos,
)
from transformers import DynamicCache, QuantizedCache, cache_utils

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch.masked import masked

later_pixels = pytest.mark.skipif(
    tiny.VERSION < (5, 0), reason="generate of 4.57 gives pixels to the first turn only"
)


@both_models
@every_plan
@pytest.mark.parametrize("padding", [(0,), (0, 3)], ids=["one", "padded"])
def test_a_second_question_on_the_same_cache(name, plan, padding):
    """Row 6: generate slices the prompt by the length of layer 0. Row 13: more keys than queries,
    more than one query, no padding.
    """
    model, inputs = tiny.model(name), tiny.prompt(name, padding)
    question = torch.randint(3, 80, (len(padding), 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan) as handle:
        first = tiny.generate(model, inputs, past_key_values=DynamicCache(config=model.config))
        more = second_turn(model, inputs, first, question)
        got = tiny.generate(model, more, past_key_values=first.past_key_values)
    length = inputs["input_ids"].shape[1]
    # The reference answers the whole conversation at once; pixels come with it again.
    whole = {**inputs, **{k: more[k] for k in ("input_ids", "attention_mask")}}
    if "mm_token_type_ids" in more:
        whole["mm_token_type_ids"] = more["mm_token_type_ids"]
    with masked(tiny.decoder(model), handle.kept, length):
        want = tiny.generate(model, whole, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@later_pixels
@every_plan
@pytest.mark.parametrize("padding", [(0,), (0, 3)], ids=["one", "padded"])
def test_a_second_video_on_the_same_cache(plan, padding):
    model = tiny.model("llava_onevision")
    got, kept, both = two_videos(model, plan, padding)
    with masked(tiny.decoder(model), kept, both["input_ids"].shape[1]):
        want = tiny.generate(model, both, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


MULTI_AXIS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize(
    ("name", "rows"),
    [(name, "padded") for name in MULTI_AXIS if name in tiny.MODELS] + [("qwen2_vl", "packed")],
)
def test_positions_of_another_length_are_refused(name, rows):
    """A model that places the whole mask's tokens gives a later video the first one's positions;
    unpatched, their number does not fit.
    """
    model, one, two = tiny.model(name), tiny.prompt(name, (0, 0)), tiny.prompt(name, (0, 0), seed=5)
    length = one["input_ids"].shape[1]
    whole = torch.ones(2, 2 * length, dtype=torch.long)
    positions = torch.arange(2 * length).expand(3, 2, -1)
    with hico_kernels.compress(model, DropPlan({0: Uniform(0.5)}), rows):
        cache = forward(model, **one).past_key_values
        again = {**two, "attention_mask": whole, "past_key_values": cache}
        reason = f"position_ids must be of this call's {length} tokens, got {2 * length}"
        with pytest.raises(ValueError, match=reason):
            forward(model, **again, position_ids=positions)
        cache = forward(model, **one).past_key_values
        again["past_key_values"] = cache
        forward(model, **again, position_ids=positions[..., length:])


def test_another_plan_on_the_same_cache():
    """Layers that shared their columns go on apart."""
    model = tiny.model("llava_onevision")
    one, two = tiny.prompt("llava_onevision"), tiny.prompt("llava_onevision", seed=5)
    length = one["input_ids"].shape[1]
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})) as handle:
        out = forward(model, **one)
        first = handle.kept
        handle.set_plan(DropPlan({2: TextTopK(3)}))
        both = grown(one, two["input_ids"])
        got = forward(
            model,
            input_ids=two["input_ids"],
            attention_mask=both["attention_mask"],
            pixel_values_videos=two["pixel_values_videos"],
            past_key_values=out.past_key_values,
        )
        second = handle.kept
    new = torch.arange(two["input_ids"].shape[1]) + length
    kept = {
        1: [torch.cat([first[1][0], new])],
        2: [torch.cat([first[1][0], second[2][0] + length])],
    }
    both["pixel_values_videos"] = torch.cat([p["pixel_values_videos"] for p in (one, two)])
    with masked(tiny.decoder(model), kept, both["input_ids"].shape[1]):
        want = forward(model, **both, use_cache=False)
    assert (got.logits[:, -1] - want.logits[:, -1]).abs().max() < 1e-12


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copied_cache_goes_its_own_way(duplicate):
    copied = {"deepcopy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c))}
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 2))
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    more = grown(inputs, new)["attention_mask"]
    with hico_kernels.compress(model, FROM_0):
        cache = forward(model, **inputs).past_key_values
        other = copied[duplicate](cache)
        one = forward(model, input_ids=new, attention_mask=more, past_key_values=cache)
        lengths = [layer.keys.shape[-2] for layer in other.layers]
        two = forward(model, input_ids=new, attention_mask=more, past_key_values=other)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 3 for n in lengths]
    assert torch.equal(one.logits, two.logits)


def repeat_and_select(cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))


SWAPS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": repeat_and_select,
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_rows_of_a_cache_can_be_reordered_repeated_selected_and_reset(swap):
    """Row 11: the index tensors follow. Beams of one sequence have the same, so swap two."""
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 2))
    mask = inputs["attention_mask"]
    new = torch.tensor([[5], [5]])
    with hico_kernels.compress(model, FROM_0):
        cache = forward(model, **inputs).past_key_values
        alone = copy.deepcopy(cache)
        swap(cache)
        swapped = torch.cat([mask[[1, 0]], torch.ones(2, 1, dtype=mask.dtype)], 1)
        got = forward(model, input_ids=new, attention_mask=swapped, past_key_values=cache)
        stays = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        want = forward(model, input_ids=new, attention_mask=stays, past_key_values=alone)
        assert torch.equal(got.logits, want.logits[[1, 0]])
        cache.reset()
        assert cache.get_seq_length() == 0
        again = forward(model, **inputs, past_key_values=cache).logits
        assert torch.equal(again, forward(model, **inputs).logits)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="not in this version")
def test_a_quantized_cache_is_refused():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision")
    cache = QuantizedCache("fp8", config=model.config)
    with (
        hico_kernels.compress(model, FROM_1),
        pytest.raises(TypeError, match=r"past_key_values must be made of .* got Fp8QuantizedLayer"),
    ):
        forward(model, **inputs, past_key_values=cache)


def test_a_cache_with_dropped_tokens_is_no_use_to_the_unpatched_model():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision")
    with hico_kernels.compress(model, FROM_1):
        cache = forward(model, **inputs).past_key_values
    with pytest.raises(RuntimeError, match="only the patched model that filled it"):
        forward(model, input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.skipif(tiny.VERSION < (5, 18), reason="windows record since 5.18")
def test_a_window_that_records_for_a_rollback_shows_no_more_than_without():
    kinds = {"use_sliding_window": True, "sliding_window": 6, "layer_types": KINDS}
    model, inputs = tiny.fresh("qwen2_vl", **kinds), tiny.prompt("qwen2_vl", (0, 2))
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})):
        caches = [DynamicCache(config=tiny.decoder(model).config) for _ in range(2)]
        caches[1].activate_past_recording()
        got = [
            tiny.generate(model, inputs, past_key_values=cache, return_dict_in_generate=True)
            for cache in caches
        ]
    assert caches[1].layers[1].keys.shape[-2] > caches[0].layers[1].keys.shape[-2]
    assert tiny.difference(*got) == 0


@later_pixels
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_video_after_a_turn_of_padded_text(positions):
    """The layers begin with tokens none of which were dropped, and padding among them."""
    model, two = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 0), seed=5)
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    with hico_kernels.compress(model, DropPlan(FROM_1.drops, positions)) as handle:
        first = tiny.generate(model, text, past_key_values=DynamicCache())
        start = first.past_key_values.get_seq_length()
        both = grown(text, torch.cat([first.sequences[:, 9:start], two["input_ids"]], 1))
        both["pixel_values_videos"] = two["pixel_values_videos"]
        got = tiny.generate(model, both, past_key_values=first.past_key_values)
    whole = torch.arange(start)
    kept = {n: [torch.cat([whole, row + start]) for row in rows] for n, rows in handle.kept.items()}
    length, renumber = both["input_ids"].shape[1], positions == "renumber"
    with masked(tiny.decoder(model), kept, length, renumber=renumber):
        want = tiny.generate(model, both, use_cache=False)
    assert tiny.difference(got, want) < 1e-12
