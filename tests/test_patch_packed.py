"""rows="packed": no padding behind a drop. Against the masked reference, as padded rows are."""

import copy

import patch_models as tiny
import pytest
import torch
from patch_runs import (
    FROM_0,
    FROM_1,
    assert_picked_rows_go_on,
    every_plan,
    forward,
    grown,
    second_turn,
    two_videos,
)
from transformers import DynamicCache, StaticCache

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform, UnsupportedModel
from hico_kernels.patch.families import reads_keys
from hico_kernels.patch.masked import masked
from hico_kernels.patch.packed_cache import PackedLayer, PackedStaticLayer

UNEVEN = (0, 6, 2)
CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=96),
}
caches = pytest.mark.parametrize("cache", CACHES)


def patched(model, plan, inputs, **more):
    with hico_kernels.compress(model, plan, rows="packed") as handle:
        return tiny.generate(model, inputs, **more), handle


@every_plan
@pytest.mark.parametrize("name", tiny.MODELS)
def test_packed_rows_are_the_masked_reference(name, plan):
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    got, handle = patched(model, plan, inputs)
    layers = zip(tiny.decoder(model).layers, got.past_key_values.layers, strict=False)
    held = [made for x, made in layers if hasattr(x, "self_attn") and not reads_keys(x)]
    assert all(isinstance(layer, PackedLayer) for layer in held[1:])
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@every_plan
@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
def test_renumbered_positions(name, plan):
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    got, handle = patched(model, DropPlan(plan.drops, "renumber"), inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


def test_no_row_waits_for_a_longer_one():
    """Text of three lengths, two numbers of visual tokens: every layer holds what each needs."""
    inputs = tiny.prompt("internvl", UNEVEN)
    inputs["input_ids"][1, 10:20] = torch.arange(20, 30)  # the second sequence has one image
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"][:3], inputs["pixel_values"][5:]])
    model = tiny.model("internvl")
    with hico_kernels.compress(model, FROM_1, rows="packed") as handle:
        cache = forward(model, **inputs).past_key_values
        report = handle.report()
    text = [inputs["attention_mask"][b].sum().item() - n for b, n in enumerate(report.visual[0])]
    for layer in (1, 2, 3):
        want = [t + v for t, v in zip(text, report.visual[layer], strict=True)]
        assert cache.layers[layer].counts == cache.layers[layer].lengths.tolist() == want
    assert len(set(cache.layers[3].counts)) > 1
    lengths = [3 * inputs["input_ids"].shape[1]] + [sum(c.counts) for c in cache.layers[1:]]
    assert report.kv_bytes == sum(lengths) * 2 * 2 * 8 * 8
    got, handle = patched(model, FROM_1, inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@every_plan
def test_beam_search(plan):
    model = tiny.model("qwen2_vl")
    for padding in ((0,), UNEVEN):
        inputs = tiny.prompt("qwen2_vl", padding)
        got, handle = patched(model, plan, inputs, num_beams=3)
        assert tiny.difference(got, tiny.reference(model, handle, inputs, num_beams=3)) < 1e-12


@every_plan
@caches
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_a_second_question_on_the_same_cache(name, cache, plan):
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    question = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan, rows="packed") as handle:
        first = tiny.generate(model, inputs, past_key_values=CACHES[cache](model.config))
        more = second_turn(model, inputs, first, question)
        got = tiny.generate(model, more, past_key_values=first.past_key_values)
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = tiny.generate(model, {**inputs, **more}, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@every_plan
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_a_static_cache_is_filled_where_it_is(name, plan):
    """Row 5. Each sequence fills its own part from the start, in the tensors that are there."""
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    got, handle = patched(model, plan, inputs, cache_implementation="static")
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12
    cache = StaticCache(config=model.config, max_cache_len=64)
    with hico_kernels.compress(model, plan, rows="packed"):
        forward(model, **inputs, past_key_values=cache)
        keys = [layer.keys for layer in cache.layers]
        counts = cache.layers[3].counts
        assert isinstance(cache.layers[3], PackedStaticLayer)
        assert len(set(counts)) > 1
        for row, count in zip(keys[3], counts, strict=True):
            assert row[:, :count].any(-1).all()
            assert not row[:, count:].any()
        cache.reset()
        forward(model, **inputs, past_key_values=cache)
        again = tiny.generate(model, inputs, past_key_values=StaticCache(model.config, 64))
    assert all(a is layer.keys for a, layer in zip(keys, cache.layers, strict=True))
    assert cache.layers[3].counts == counts
    assert tiny.difference(again, got) == 0


def test_a_static_cache_that_is_full_says_so():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", UNEVEN)
    cache = StaticCache(config=model.config, max_cache_len=20)
    match = "past_key_values: a sequence needs 25 columns, the static cache has 20"  # 29 - 13 + 9
    with (
        hico_kernels.compress(model, FROM_0, rows="packed"),
        pytest.raises(ValueError, match=match),
    ):
        forward(model, **inputs, past_key_values=cache)


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="generate gives pixels to first turns only")
@every_plan
def test_a_second_video_on_the_same_cache(plan):
    model = tiny.model("llava_onevision")
    got, kept, both = two_videos(model, plan, UNEVEN, rows="packed")
    with masked(tiny.decoder(model), kept, both["input_ids"].shape[1]):
        want = tiny.generate(model, both, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="generate gives pixels to first turns only")
@caches
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_layers_that_were_filled_with_padding_leave_it_out(positions, cache):
    """A first turn of padded text fills padded layers; the video's drop packs them."""
    model, two = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 0), seed=5)
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    with hico_kernels.compress(model, DropPlan(FROM_1.drops, positions), rows="packed") as handle:
        first = tiny.generate(model, text, past_key_values=CACHES[cache](model.config))
        start = int(first.past_key_values.get_seq_length())  # of a static cache a tensor that grows
        both = grown(text, torch.cat([first.sequences[:, 9:start], two["input_ids"]], 1))
        both["pixel_values_videos"] = two["pixel_values_videos"]
        got = tiny.generate(model, both, past_key_values=first.past_key_values)
    counts = got.past_key_values.layers[2].counts
    assert counts[0] == counts[1] + 4
    whole = torch.arange(start)
    kept = {n: [torch.cat([whole, row + start]) for row in rows] for n, rows in handle.kept.items()}
    length, renumber = both["input_ids"].shape[1], positions == "renumber"
    with masked(tiny.decoder(model), kept, length, renumber=renumber):
        want = tiny.generate(model, both, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


def test_padding_on_the_right_is_left_out_as_well():
    """The last logits are those of each sequence's last real token, at another position."""
    model = tiny.model("llava_onevision")
    with hico_kernels.compress(model, FROM_0, rows="packed"):
        left = forward(model, **tiny.prompt("llava_onevision", (0, 3))).logits
        right = forward(model, **tiny.prompt("llava_onevision", (0, 3), side="right")).logits
    assert (left[:, -1] - right[:, -1]).abs().max() < 1e-6  # rotary tables are in float32


def test_one_sequence_needs_no_packing_and_nothing_dropped_changes_no_bit():
    model = tiny.model("llava_onevision")
    inputs = tiny.prompt("llava_onevision")
    got, handle = patched(model, FROM_0, inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) == 0
    inputs = tiny.prompt("llava_onevision", UNEVEN)
    got, _ = patched(model, DropPlan({0: Uniform(1.0), 2: TextTopK(1.0)}), inputs)
    assert tiny.difference(got, tiny.generate(model, inputs)) == 0


def test_a_drop_that_leaves_everything_packs_all_the_same():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", UNEVEN)
    got, handle = patched(model, DropPlan({0: Uniform(1.0), 2: TextTopK(0.5)}), inputs)
    assert list(handle.kept) == [2]
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


def test_a_cache_is_cropped_copied_and_emptied():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", UNEVEN)
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = grown(inputs, new)["attention_mask"]
    with hico_kernels.compress(model, FROM_0, rows="packed"):
        cache = forward(model, **inputs).past_key_values
        other = copy.deepcopy(cache)
        want = forward(model, input_ids=new, attention_mask=mask, past_key_values=cache).logits
        cache.crop(-1)
        one = {"attention_mask": mask, "past_key_values": cache}
        again = forward(model, input_ids=new[:, 1:], **one).logits
        assert (again[:, -1] - want[:, -1]).abs().max() < 1e-12
        assert_picked_rows_go_on(model, other, new, mask, want)
        cache.reset()
        assert cache.get_seq_length() == 0
        first = forward(model, **inputs).logits
        assert torch.equal(forward(model, **inputs, past_key_values=cache).logits, first)


def test_labels_and_checkpointing():
    inputs = tiny.prompt("llava_onevision", UNEVEN)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for rows, checkpointed in (("padded", False), ("packed", False), ("packed", True)):
        model = tiny.fresh("llava_onevision").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with hico_kernels.compress(model, FROM_0, rows=rows):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        grads = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        found.append((loss.item(), grads))
    (want, grads), *others = found
    for loss, got in others:
        assert abs(loss - want) < 1e-6 * want
        for name in grads:
            assert (got[name] - grads[name]).norm() <= 1e-6 * grads[name].norm() + 1e-12, name


def test_what_cannot_be_packed_is_refused():
    eager = tiny.model("llava_onevision", torch.float32, "eager")
    with pytest.raises(UnsupportedModel, match="must be sdpa or flash attention, got 'eager'"):
        hico_kernels.patch(eager, FROM_0, rows="packed")
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", UNEVEN)
    with pytest.raises(ValueError, match="rows must be 'padded' or 'packed', got 'ragged'"):
        hico_kernels.patch(model, FROM_0, rows="ragged")
    with hico_kernels.compress(model, FROM_0, rows="packed"):
        tiny.decoder(model).config._attn_implementation = "eager"
        with pytest.raises(UnsupportedModel, match="rows must be 'padded', got 'packed'"):
            forward(model, **inputs)
        tiny.decoder(model).config._attn_implementation = "hico_packed"
        cache = forward(model, **inputs).past_key_values
    assert tiny.decoder(model).config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="only the patched model that filled it"):
        forward(model, input_ids=torch.tensor([[5]] * 3), past_key_values=cache)


def test_selfcheck_runs_packed_too():
    found = hico_kernels.selfcheck(tiny.model("qwen3_vl"), rows="packed")
    assert found["error"] < 1e-12 < found["effect"]
