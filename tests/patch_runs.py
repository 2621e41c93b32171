"""Runs of patched models that several test files share."""

import patch_models as tiny
import pytest
import torch
from transformers import DynamicCache

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform

FROM_0 = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
FROM_1 = DropPlan({1: TextTopK(0.5), 3: Uniform(0.25)})
PLANS = {"from-0": FROM_0, "from-1": FROM_1}
NAMES = ("qwen2_vl", "llava_onevision")

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both_models = pytest.mark.parametrize("name", NAMES)
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def patched(model, plan, inputs, **more):
    """What a patched model generates, and its handle."""
    with hico_kernels.compress(model, plan) as handle:
        return tiny.generate(model, inputs, **more), handle


def forward(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def grown(inputs, new, **more):
    """A prompt with tokens behind it."""
    ids = torch.cat([inputs["input_ids"], new], 1)
    ones = torch.ones_like(new)
    out = {**inputs, "input_ids": ids}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    if "mm_token_type_ids" in inputs:
        out["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones], 1)
    return {**out, **more}


def assert_picked_rows_go_on(model, cache, new, mask, want):
    """Two of three sequences in a cache, the last one first, go on as they do among the three."""
    cache.batch_select_indices(torch.tensor([2, 0]))
    picked = {"attention_mask": mask[[2, 0]], "past_key_values": cache}
    got = forward(model, input_ids=new[[2, 0]], **picked).logits
    assert (got[:, -1] - want[[2, 0], -1]).abs().max() < 1e-12


def second_turn(model, inputs, first, question):
    """What the second turn of a conversation is given: all tokens so far and new ones."""
    answer = first.sequences[:, inputs["input_ids"].shape[1] :]
    text = {k: v for k, v in inputs.items() if "pixel" not in k and "grid" not in k}
    return grown(text, torch.cat([answer, question], 1))


def two_videos(model, plan, padding, rows="padded"):
    """What a patched model says to a second video on the same cache; what it kept; all inputs."""
    one = tiny.prompt("llava_onevision", padding)
    two = tiny.prompt("llava_onevision", (0,) * len(padding), seed=5)
    length = one["input_ids"].shape[1]
    with hico_kernels.compress(model, plan, rows) as handle:
        first = tiny.generate(model, one, past_key_values=DynamicCache())
        before = handle.kept
        start = first.past_key_values.get_seq_length()
        fill = first.sequences[:, length:start]
        both = grown(one, torch.cat([fill, two["input_ids"]], 1))
        got = tiny.generate(
            model,
            {**both, "pixel_values_videos": two["pixel_values_videos"]},
            past_key_values=first.past_key_values,
        )
        after = handle.kept
    between = torch.arange(length, start)
    kept = {
        layer: [
            torch.cat([a, between, b + start])
            for a, b in zip(before[layer], after[layer], strict=True)
        ]
        for layer in before
    }
    pixels = [one["pixel_values_videos"], two["pixel_values_videos"]]
    both["pixel_values_videos"] = torch.stack(pixels, 1).flatten(0, 1)
    return got, kept, both
