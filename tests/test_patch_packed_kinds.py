"""rows="packed" where attention is not just causal: windows, images that see ahead, shared keys;
and where there is a state instead.
"""

import copy

import patch_models as tiny
import pytest
import torch
from patch_runs import (
    FROM_0,
    FROM_1,
    KINDS,
    assert_picked_rows_go_on,
    every_plan,
    forward,
    grown,
    second_turn,
)
from transformers import DynamicCache

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch import packed_cache
from hico_kernels.patch.masked import masked
from hico_kernels.patch.packed_cache import PackedDynamicLayer, PackedSlidingLayer

NAMES = [name for name in ("gemma3", "gemma4", "gemma4-experts") if name in tiny.MODELS]
UNEVEN = (0, 6, 2)
STATES = [name for name in ("qwen3_5", "qwen3_5_moe") if name in tiny.MODELS]
QUESTIONS = [(name, "from-config") for name in NAMES + STATES] + [(n, "lazily") for n in NAMES]
every_kind = pytest.mark.parametrize("name", NAMES + STATES)
every_model = pytest.mark.parametrize("name", NAMES)
# Later releases run layers that read keys for the tokens that get logits.
LAST_ONLY = "gemma4" in tiny.MODELS and hasattr(
    tiny.decoder(tiny.model("gemma4")), "_maybe_slice_kv_shared_inputs"
)
gemma4 = pytest.mark.skipif("gemma4" not in tiny.MODELS, reason="no Gemma 4 in this transformers")
CACHES = {
    "of-the-model": lambda config: None,
    "from-config": lambda config: DynamicCache(config=config),
    "lazily": lambda config: DynamicCache(),
}


def patched(model, plan, inputs, **more):
    with hico_kernels.compress(model, plan, rows="packed") as handle:
        return tiny.generate(model, inputs, **more), handle


@every_model
@every_plan
@pytest.mark.parametrize("cache", CACHES)
def test_decoding_past_the_window_in_any_cache(name, plan, cache, monkeypatch):
    """Tokens that leave the window are let go when the room behind it is full: here, of 3."""
    monkeypatch.setattr(packed_cache, "_ROOM", 3)
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    given = {"past_key_values": CACHES[cache](model.config), "max_new_tokens": 12}
    got, handle = patched(model, plan, inputs, **given)
    layer = got.past_key_values.layers[2]
    if isinstance(layer, PackedSlidingLayer):
        assert layer.lost
        assert layer.keys.shape[2] <= 19 + 3
    else:  # before 5.18 a config of Gemma 4 that shares no keys makes none
        assert isinstance(layer, PackedDynamicLayer)
        assert cache == "lazily" or (tiny.VERSION < (5, 18) and name == "gemma4-experts")
    want = tiny.reference(model, handle, inputs, max_new_tokens=12)
    assert tiny.difference(got, want) < 1e-12


@every_kind
@every_plan
def test_beam_search(name, plan):
    if name in STATES and tiny.VERSION == (5, 18):
        pytest.skip("beams of 5.18 differ with a cache and without, unpatched too")
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    got, handle = patched(model, plan, inputs, num_beams=3)
    assert tiny.difference(got, tiny.reference(model, handle, inputs, num_beams=3)) < 1e-12


@pytest.mark.parametrize(("name", "cache"), QUESTIONS)
@every_plan
def test_a_second_question_on_the_same_cache(name, plan, cache):
    if (5, 0) <= tiny.VERSION < (5, 18) and name == "gemma3" and cache == "from-config":
        pytest.skip("stock makes masks of windows as long as those of other layers")
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    question = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan, rows="packed") as handle:
        first = tiny.generate(model, inputs, past_key_values=CACHES[cache](model.config))
        more = second_turn(model, inputs, first, question)
        if "token_type_ids" in inputs:
            more["token_type_ids"] = torch.zeros_like(more["input_ids"])
        got = tiny.generate(model, more, past_key_values=first.past_key_values)
    whole = {**inputs, **{k: v for k, v in more.items() if k in inputs}}
    if "token_type_ids" in inputs:
        behind = more["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, behind))
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = tiny.generate(model, whole, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("window", [6, 19, 40])
def test_sliding_windows_count_original_positions(first, window):
    model = tiny.fresh(
        "qwen2_vl", use_sliding_window=True, sliding_window=window, layer_types=KINDS
    )
    inputs = tiny.prompt("qwen2_vl", UNEVEN)
    plan = DropPlan({first: Uniform(0.5), 2: TextTopK(3)})
    for more in ({}, {"num_beams": 2}):
        got, handle = patched(model, plan, inputs, **more)
        assert tiny.difference(got, tiny.reference(model, handle, inputs, **more)) < 1e-12


@every_kind
@pytest.mark.parametrize("wanted", [0, 1, 4])
def test_without_a_cache(name, wanted):
    """4: layers of Gemma 4 that read keys run for the last tokens of every sequence."""
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    more = {"use_cache": False, "logits_to_keep": wanted}
    with hico_kernels.compress(model, FROM_1, rows="packed") as handle:
        got = forward(model, **inputs, **more).logits
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = forward(model, **inputs, **more).logits
    few = wanted or 5  # behind the last visual token
    assert got.shape[1] == (wanted or handle.report().rows[-1])
    assert (got[:, -few:] - want[:, -few:]).abs().max() < 1e-12


@gemma4
def test_layers_that_read_keys_run_for_as_many_tokens_as_without_a_patch():
    """For one of each sequence, in the prompt too; all of them where their states are asked for."""
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4", (0, 4))
    counts = []
    hook = (
        tiny.decoder(model)
        .layers[-1]
        .mlp.register_forward_pre_hook(lambda m, args: counts.append(tuple(args[0].shape[:2])))
    )
    with hico_kernels.compress(model, FROM_0, rows="packed") as handle:
        tiny.generate(model, inputs, max_new_tokens=2)
        report = handle.report()
        forward(model, **inputs, logits_to_keep=1, output_hidden_states=True)
        every = (1, 18 + 14)
        assert counts == [(1, 2) if LAST_ONLY else every, (2, 1), every]
        assert report.rows == [25, 22, 22, 18, 18, 18, 18]  # what they see
    hook.remove()
    alone = 0
    with hico_kernels.compress(model, FROM_0) as handle:
        for after in (9, 5):
            forward(model, **tiny.prompt("gemma4", after=after), logits_to_keep=1)
            alone += handle.report().flops
    assert report.flops == alone


@every_model
def test_a_full_window_is_not_rolled_back(name):
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    cache = DynamicCache(config=model.config)
    with hico_kernels.compress(model, FROM_1, rows="packed"):
        forward(model, **inputs, past_key_values=cache)
    if not isinstance(cache.layers[2], PackedSlidingLayer):
        pytest.skip("before 5.18 a config of Gemma 4 that shares no keys makes no sliding layers")
    with pytest.raises(RuntimeError, match=r"cannot be rolled back .* got crop\(-1\)"):
        cache.layers[2].crop(-1)


@every_model
def test_a_cache_is_copied_picked_from_and_emptied(name):
    model, inputs = tiny.model(name), tiny.prompt(name, UNEVEN)
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = grown(inputs, new)["attention_mask"]
    with hico_kernels.compress(model, FROM_0, rows="packed"):
        first = forward(model, **inputs, use_cache=True)
        cache, other = first.past_key_values, copy.deepcopy(first.past_key_values)
        want = forward(model, input_ids=new, attention_mask=mask, past_key_values=cache).logits
        assert_picked_rows_go_on(model, other, new, mask, want)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = forward(model, **inputs, past_key_values=cache)
        assert torch.equal(again.logits, first.logits)


@every_kind
def test_selfcheck(name):
    found = hico_kernels.selfcheck(tiny.model(name), rows="packed")
    assert found["error"] < 1e-12 < found["effect"]


@every_kind
@pytest.mark.parametrize("checkpointed", [False, True])
def test_labels(name, checkpointed):
    if name == "gemma3" and tiny.VERSION < (5, 18):
        pytest.skip("the loss of Gemma 3 cannot follow a drop")
    inputs = tiny.prompt(name, UNEVEN)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for rows in ("padded", "packed"):
        model = tiny.fresh(name).train()
        if checkpointed and rows == "packed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with hico_kernels.compress(model, FROM_1, rows=rows):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        grads = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        found.append((loss.item(), grads))
    (want, grads), (loss, got) = found
    assert abs(loss - want) < 1e-6 * want  # the loss is in float32
    for weight in grads:
        error = (got[weight] - grads[weight]).norm()
        assert error <= 1e-6 * grads[weight].norm() + 1e-12, weight


@pytest.mark.skipif(not STATES, reason="no Qwen3.5 in this transformers")
def test_states_apart_leave_with_the_patch():
    """What stood in for the mixer's code before, as accelerate does, stands in again."""
    model = tiny.fresh("qwen3_5")
    mixers = [x.linear_attn for x in tiny.decoder(model).layers if hasattr(x, "linear_attn")]
    own = mixers[0].forward = mixers[0].forward
    with hico_kernels.compress(model, FROM_0, rows="packed"):
        assert all("forward" in mixer.__dict__ for mixer in mixers)
    assert mixers[0].__dict__["forward"] is own
    assert "forward" not in mixers[1].__dict__


@pytest.mark.skipif(not STATES, reason="no Qwen3.5 in this transformers")
def test_a_state_goes_on_with_a_shorter_question():
    """Padding in front of the second one is left out in the layers before the drop as well."""
    decoder, question = tiny.decoder(tiny.model("qwen3_5")), (6, 4)
    generator = torch.Generator().manual_seed(3)
    first, second = (
        torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (30, 6)
    )
    visual = (torch.arange(30) < torch.tensor([[24], [16]])).expand(2, 30)

    def turns(rows):
        new = second[rows] if len(rows) > 1 else second[rows, 6 - question[rows[0]] :]
        lead = torch.tensor([new.shape[1] - question[row] for row in rows])[:, None]
        real = torch.arange(new.shape[1]) >= lead
        mask = torch.cat([torch.ones(len(rows), 30, dtype=torch.bool), real], 1).long()
        positions = (mask.cumsum(1) - 1)[:, 30:].expand(3, -1, -1)
        plan = DropPlan({2: Uniform(0.25)})
        with (
            torch.no_grad(),
            hico_kernels.compress(tiny.model("qwen3_5"), plan, "packed") as handle,
        ):
            handle.announce(visual[rows])
            cache = decoder(inputs_embeds=first[rows], use_cache=True).past_key_values
            more = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            return decoder(inputs_embeds=new, **more).last_hidden_state[:, -1]

    both = turns([0, 1])
    for row in (0, 1):
        assert (both[row] - turns([row])[0]).abs().max() < 1e-12
