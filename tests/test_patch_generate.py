"""Every way of generating with a patched model: against the masked reference, which has no cache.

"Row n" is the row of the table of silent failures that the test guards, docs/patching.md.
"""

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
    patched,
)
from transformers import DynamicCache, StaticCache

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch.masked import masked


@both_models
@every_plan
def test_beam_search(name, plan):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    got, handle = patched(model, plan, inputs, num_beams=3)
    assert tiny.difference(got, tiny.reference(model, handle, inputs, num_beams=3)) < 1e-12


@both_models
def test_sampling(name):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    torch.manual_seed(1)
    got, handle = patched(model, FROM_0, inputs, do_sample=True)
    torch.manual_seed(1)
    assert tiny.difference(got, tiny.reference(model, handle, inputs, do_sample=True)) == 0


def repeating(name):
    """A prompt whose end repeats its beginning, so that looking up guesses tokens at once."""
    inputs = tiny.prompt(name)
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, :3]
    return inputs


@both_models
@every_plan
def test_prompt_lookup_decoding(name, plan):
    """Row 11: `crop` takes the index tensors back; and the guesses behind the prompt do not choose
    what stays.
    """
    model, inputs = tiny.model(name), repeating(name)
    plain, handle = patched(model, plan, inputs)
    with hico_kernels.compress(model, plan) as again:
        got = tiny.generate(model, inputs, prompt_lookup_num_tokens=2)
    for layer, rows in handle.kept.items():
        row = again.kept[layer][0]
        assert torch.equal(row[row < inputs["input_ids"].shape[1]], rows[0])
    assert tiny.difference(got, plain) < 1e-6  # stock rounds these logits to float32


@every_plan
def test_assisted_decoding(plan):
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision")
    torch.manual_seed(3)
    helper = tiny.fresh("llava_onevision")
    with torch.no_grad():
        helper.lm_head.weight.mul_(1.01)
        helper.model.language_model.layers[3].mlp.up_proj.weight.mul_(1.5)
    plain, _ = patched(model, plan, inputs)
    got, _ = patched(model, plan, inputs, assistant_model=helper)
    assert tiny.difference(got, plain) < 1e-6
    with hico_kernels.compress(helper, FROM_1):  # both patched, each in its own way
        got, _ = patched(model, plan, inputs, assistant_model=helper)
    assert tiny.difference(got, plain) < 1e-6


@both_models
@every_plan
@pytest.mark.parametrize("made", ["lazily", "from-config", "without"])
def test_a_cache_given_by_the_caller(name, plan, made):
    """Row 6b: a cache without a config makes its layers on demand."""
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 4, 2))
    cache = {
        "lazily": DynamicCache,
        "from-config": lambda: DynamicCache(config=model.config),
        "without": lambda: None,
    }[made]()
    got, handle = patched(model, plan, inputs, past_key_values=cache)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) == 0


@both_models
@every_plan
@pytest.mark.parametrize("padding", [(0,), (0, 4, 2)], ids=["one", "padded"])
def test_a_static_cache(name, plan, padding):
    """Row 5: its masks are made before the forward call, sized by layer 0."""
    model, inputs = tiny.model(name), tiny.prompt(name, padding)
    got, handle = patched(model, plan, inputs, cache_implementation="static")
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


def test_a_static_cache_of_the_callers_with_eager_attention():
    model = tiny.model("qwen2_vl", torch.float32, "eager")
    inputs = tiny.prompt("qwen2_vl", (0, 3), dtype=torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=64)
    got, handle = patched(model, FROM_0, inputs, past_key_values=cache)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 5e-6


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("window", [6, 19, 40])
def test_sliding_windows_count_original_positions(first, window):
    model = tiny.fresh(
        "qwen2_vl", use_sliding_window=True, sliding_window=window, layer_types=KINDS
    )
    inputs = tiny.prompt("qwen2_vl", (0, 4, 2))
    plan = DropPlan({first: Uniform(0.5), 2: TextTopK(3)})
    for more in ({}, {"num_beams": 2}):
        got, handle = patched(model, plan, inputs, **more)
        assert tiny.difference(got, tiny.reference(model, handle, inputs, **more)) < 1e-12
    if tiny.VERSION < (5, 18) and window < 40:  # a full window cannot be rolled back there
        return
    inputs = repeating("qwen2_vl")
    plain, _ = patched(model, plan, inputs)
    got, _ = patched(model, plan, inputs, prompt_lookup_num_tokens=2)
    assert tiny.difference(got, plain) < 1e-6
    full = tiny.model("qwen2_vl")  # the helper runs ahead several tokens before it is rolled back
    with hico_kernels.compress(model, plan):
        got = tiny.generate(full, inputs, assistant_model=model)
    assert tiny.difference(got, tiny.generate(full, inputs)) < 1e-6


@both_models
def test_prompts_in_chunks_are_refused(name):
    """Row 14: each chunk would drop by itself, asked by its own last token. 5.23 encodes the pixels
    ahead and reads their tokens in chunks.
    """
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    text = {"input_ids": inputs["input_ids"][:, -5:]}
    with hico_kernels.compress(model, FROM_1) as handle:
        with pytest.raises(ValueError, match=r"prefill_chunk_size must be None .* got 8"):
            tiny.generate(model, inputs, prefill_chunk_size=8)
        if tiny.VERSION >= (5, 23):  # before, stock fails at chunks of text too
            tiny.generate(model, text, prefill_chunk_size=2)
            handle.set_plan(DropPlan({}))
            got = tiny.generate(model, inputs, prefill_chunk_size=8)
    if tiny.VERSION >= (5, 23):
        assert tiny.difference(got, tiny.generate(model, inputs, prefill_chunk_size=8)) == 0


LOOPS = {"qwen2_vl": (0,), "llava_onevision": (0,), "llava_onevision-padded": (0, 3)}


@every_plan
@pytest.mark.parametrize(("name", "padding"), LOOPS.items(), ids=LOOPS)
def test_a_decode_loop_without_generate(name, plan, padding):
    """Row 6c: the decoder makes its own cache. (In such a loop stock Qwen2-VL takes no mask.)"""
    name = name.split("-")[0]
    model, inputs = tiny.model(name), tiny.prompt(name, padding)
    with hico_kernels.compress(model, plan) as handle:
        out = forward(model, **inputs)
        got, new = [out.logits[:, -1]], torch.empty(len(padding), 0, dtype=torch.long)
        for step in range(4):
            new = torch.cat([new, got[-1][:, :90].argmax(-1, keepdim=True)], 1)
            mask = grown(inputs, new)["attention_mask"] if len(padding) > 1 else None
            more = {"attention_mask": mask, "past_key_values": out.past_key_values}
            if tiny.VERSION < (5, 0):  # where Qwen2-VL counts by it
                more["cache_position"] = torch.tensor([inputs["input_ids"].shape[1] + step])
            out = forward(model, input_ids=new[:, -1:], **more)
            got.append(out.logits[:, -1])
    length = inputs["input_ids"].shape[1]
    with masked(tiny.decoder(model), handle.kept, length):
        want = forward(model, **grown(inputs, new), use_cache=False).logits[:, length - 1 :]
    assert (torch.stack(got, 1) - want).abs().max() < 1e-12
