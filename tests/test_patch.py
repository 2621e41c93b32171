"""Patched models equal a masked reference, in every family; what they keep is what they should."""

import patch_models as tiny
import pytest
import torch

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch.families import LINEAR, layer_kinds

# Below the first layer too, three stages, ratios and a count. 12 or 13 visual tokens: 9, 6, 2.
DEEP = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
PADDING = {"one": ((0,), "left"), "left": ((0, 4, 2), "left"), "right": ((0, 3), "right")}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_in_float64_a_patched_model_is_the_masked_reference_bit_for_bit(name, padding):
    pads, side = PADDING[padding]
    model, inputs = tiny.model(name), tiny.prompt(name, pads, side=side)
    with hico_kernels.compress(model, DEEP) as handle:
        got = tiny.generate(model, inputs)
    assert handle.report().rows[-1] < inputs["input_ids"].shape[1]
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) == 0


@pytest.mark.parametrize("name", tiny.MODELS)
def test_in_float32_with_eager_attention_the_difference_is_rounding(name):
    model = tiny.model(name, torch.float32, "eager")
    inputs = tiny.prompt(name, (3, 0), dtype=torch.float32)
    with hico_kernels.compress(model, DEEP) as handle:
        got = tiny.generate(model, inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 5e-6


ONE_AXIS = ("llava_onevision", "internvl", "llava_next_video", "video_llama_3", "smolvlm")
RENUMBERED = [name for name in tiny.MODELS if name.split("-")[0] in ONE_AXIS]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", RENUMBERED)
def test_renumbered_positions_are_those_of_the_tokens_that_are_left(name, padding):
    pads, side = PADDING[padding]
    model, inputs = tiny.model(name), tiny.prompt(name, pads, side=side)
    with hico_kernels.compress(model, DropPlan(DEEP.drops, positions="renumber")) as handle:
        got = tiny.generate(model, inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@pytest.mark.parametrize("name", tiny.MODELS)
def test_text_guided_drops_keep_what_the_models_own_attention_looks_at(name):
    """Scores against the attention weights that the unpatched model reports."""
    model, inputs = tiny.model(name, torch.float32, "eager"), tiny.prompt(name, dtype=torch.float32)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    kinds = layer_kinds(tiny.decoder(model))
    weights = weights[2 - kinds[:2].count(LINEAR)]  # which has none
    visual = (inputs["input_ids"][0] == tiny.MODELS[name].token).nonzero()[:, 0]
    looks = weights[0, :, -1].mean(0)[visual]
    want = visual[looks.topk(5).indices].sort().values
    with hico_kernels.compress(model, DropPlan({2: TextTopK(5)})) as handle, torch.no_grad():
        model(**inputs)
    kept = handle.kept[2][0]
    assert torch.equal(kept[torch.isin(kept, visual)], want)


def test_the_last_prompt_token_is_found_behind_padding_on_the_right():
    """The kept tokens of a row do not depend on how it is padded."""
    model, plan = tiny.model("llava_onevision"), DropPlan({1: TextTopK(4)})
    real, rows = 23, []  # of 26 tokens
    for side in ("left", "right"):
        with hico_kernels.compress(model, plan) as handle, torch.no_grad():
            model(**tiny.prompt("llava_onevision", (0, 3), side=side))
        row = handle.kept[1][1]
        rows.append(row - 3 if side == "left" else row[row < real])
    assert torch.equal(*rows)


def test_sequences_with_different_numbers_of_visual_tokens_each_keep_their_share():
    model = tiny.model("internvl")
    inputs = tiny.prompt("internvl", (0, 0))
    ids = inputs["input_ids"]
    ids[1, 4:14] = torch.arange(20, 30)  # the second sequence has the last image only
    inputs["pixel_values"] = inputs["pixel_values"][:4]
    with hico_kernels.compress(model, DEEP) as handle:
        got = tiny.generate(model, inputs)
    assert handle.report().visual == [[9, 3], [6, 2], [6, 2], [2, 2]]
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) == 0


def test_a_drop_after_the_last_deepstack_layer_and_one_before_it_agree_with_the_reference():
    """Qwen3-VL adds features behind layers 0 to 2; row 9 of the survey."""
    model, inputs = tiny.model("qwen3_vl"), tiny.prompt("qwen3_vl", (0, 2))
    for layer in (0, 1, 2, 3):
        with hico_kernels.compress(model, DropPlan({layer: Uniform(0.5)})) as handle:
            got = tiny.generate(model, inputs)
        assert tiny.difference(got, tiny.reference(model, handle, inputs)) == 0


def test_keeping_everything_changes_no_bit():
    names = ("qwen2_vl", "qwen3_vl", "llava_onevision", "gemma3", "gemma4", "qwen3_5")
    for name in filter(tiny.MODELS.get, names):
        model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
        want = tiny.generate(model, inputs)
        with hico_kernels.compress(model, DropPlan({0: Uniform(1.0), 2: TextTopK(1.0)})) as handle:
            got = tiny.generate(model, inputs)
        assert handle.kept == {}
        assert tiny.difference(got, want) == 0


def test_text_without_video_changes_no_bit():
    model = tiny.model("qwen2_vl")
    ids = torch.arange(3, 40)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = tiny.generate(model, inputs)
    with hico_kernels.compress(model, DEEP):
        assert tiny.difference(tiny.generate(model, inputs), want) == 0


def test_placeholders_without_pixels_are_text():
    model = tiny.model("llava_onevision")
    inputs = tiny.prompt("llava_onevision")
    del inputs["pixel_values_videos"]
    want = tiny.generate(model, inputs)
    with hico_kernels.compress(model, DEEP):
        assert tiny.difference(tiny.generate(model, inputs), want) == 0
