"""Layers of other kinds: Gemma 4's read the keys of earlier ones, Qwen3.5's carry a state."""

import patch_models as tiny
import pytest
import torch
from patch_runs import forward, grown, patched, second_turn
from transformers import DynamicCache, StaticCache

import hico_kernels
from hico_kernels import DropPlan, PerFrame, PreLLM, TextTopK, Uniform
from hico_kernels.flops import visible_pairs
from hico_kernels.patch.families import reads_keys
from hico_kernels.patch.masked import masked

NAMES = ("gemma4", "gemma4-experts", "qwen3_5", "qwen3_5_moe")
NAMES = [name for name in NAMES if name in tiny.MODELS]
FROM_0 = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
FROM_1 = DropPlan({1: TextTopK(0.5), 3: Uniform(0.25)})
PLANS = {"from-0": FROM_0, "from-1": FROM_1}

# Later releases run layers that read keys for the tokens that get logits.
LAST_ONLY = "gemma4" in tiny.MODELS and hasattr(
    tiny.decoder(tiny.model("gemma4")), "_maybe_slice_kv_shared_inputs"
)

every_model = pytest.mark.parametrize("name", NAMES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
gemma4 = pytest.mark.skipif("gemma4" not in tiny.MODELS, reason="no Gemma 4 in this transformers")
qwen3_5 = pytest.mark.skipif("qwen3_5" not in tiny.MODELS, reason="no Qwen3.5 in this transformers")


@every_model
@every_plan
def test_beam_search(name, plan):
    if name.startswith("qwen3_5") and tiny.VERSION == (5, 18):
        pytest.skip("beams of 5.18 differ with a cache and without, unpatched too")
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    got, handle = patched(model, plan, inputs, num_beams=3)
    assert tiny.difference(got, tiny.reference(model, handle, inputs, num_beams=3)) < 1e-12


@every_model
@every_plan
@pytest.mark.parametrize("padding", [(0,), (0, 3)], ids=["one", "padded"])
def test_a_second_question_on_the_same_cache(name, plan, padding):
    model, inputs = tiny.model(name), tiny.prompt(name, padding)
    question = torch.randint(3, 80, (len(padding), 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan) as handle:
        cache = DynamicCache(config=model.config)
        first = tiny.generate(model, inputs, past_key_values=cache)
        more = second_turn(model, inputs, first, question)
        got = tiny.generate(model, more, past_key_values=first.past_key_values)
    whole = {**inputs, **{k: v for k, v in more.items() if k in inputs}}
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = tiny.generate(model, whole, use_cache=False)
    assert tiny.difference(got, want) < 1e-12


@every_model
@every_plan
def test_without_a_cache(name, plan):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 4, 2))
    with hico_kernels.compress(model, plan) as handle:
        got = forward(model, **inputs, use_cache=False, logits_to_keep=1).logits
    with masked(tiny.decoder(model), handle.kept, inputs["input_ids"].shape[1]):
        want = forward(model, **inputs, use_cache=False, logits_to_keep=1).logits
    assert got.shape == want.shape  # a head over the whole vocabulary runs for no other
    assert (got - want).abs().max() < 1e-12


@every_model
def test_prompt_lookup_decoding(name):
    """Rollbacks, and several logits of a call; what has a state transformers itself refuses."""
    if tiny.VERSION < (5, 18) and name.startswith("gemma4"):
        pytest.skip("a full window cannot be rolled back before 5.18")
    model, inputs = tiny.model(name), tiny.prompt(name)
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, :3]
    plain, _ = patched(model, FROM_0, inputs)
    if name.startswith("qwen3_5"):
        with pytest.raises(ValueError, match="stateful"):
            patched(model, FROM_0, inputs, prompt_lookup_num_tokens=2)
        return
    got, _ = patched(model, FROM_0, inputs, prompt_lookup_num_tokens=2)
    assert tiny.difference(got, plain) < 1e-6  # stock rounds these logits to float32


@every_model
def test_selfcheck(name):
    found = hico_kernels.selfcheck(tiny.model(name))
    assert found["error"] < 1e-12 < found["effect"]


def rows_run(model):
    """Tokens that each layer is given from now on, of every call; and what stops counting."""
    counts = [[] for _ in tiny.decoder(model).layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, args, own=own: own.append(args[0].shape[1]))
        for layer, own in zip(tiny.decoder(model).layers, counts, strict=True)
    ]
    return counts, hooks


@gemma4
def test_layers_that_read_keys_run_for_as_many_tokens_as_without_a_patch():
    """The last one, for the prompt too."""
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4", (0, 4))
    counts, hooks = rows_run(model)
    with hico_kernels.compress(model, FROM_0) as handle:
        tiny.generate(model, inputs, max_new_tokens=2)
        report = handle.report()
    for hook in hooks:
        hook.remove()
    last = 1 if LAST_ONLY else 18
    rows = [25, 22, 22, 18, 18, last, last]
    assert counts == [[n, 1] for n in rows]
    assert report.rows == [25, 22, 22, 18, 18, 18, 18]  # what they see


@gemma4
@pytest.mark.parametrize("wanted", [3, 12, 20])
@pytest.mark.parametrize("padding", [(0,), (0, 4)], ids=["one", "padded"])
def test_any_number_of_logits_may_be_asked_for(wanted, padding):
    """Also those of visual tokens, some of which are dropped."""
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4", padding)
    length = inputs["input_ids"].shape[1]
    with hico_kernels.compress(model, FROM_1) as handle:
        got = forward(model, **inputs, logits_to_keep=wanted).logits
    with masked(tiny.decoder(model), handle.kept, length):
        want = forward(model, **inputs, use_cache=False).logits
    assert got.shape[1] == min(wanted, handle.report().rows[-1])
    for row, kept in enumerate(handle.kept[3]):
        many = min(wanted, len(kept))
        assert (got[row, -many:] - want[row, kept[-many:]]).abs().max() < 1e-12


@gemma4
def test_a_drop_that_layers_would_not_follow_is_refused():
    model = tiny.model("gemma4")
    assert [reads_keys(layer) for layer in tiny.decoder(model).layers] == [False] * 5 + [True] * 2
    reason = (
        r"drops\[4\]: Uniform cannot be here: the last layers read the keys of layer 3, and would "
        "go on seeing what is dropped behind it: drop in layer 3 or before"
    )
    with pytest.raises(ValueError, match=reason):
        hico_kernels.patch(model, DropPlan({4: Uniform(0.5)}))
    with hico_kernels.compress(model, DropPlan({3: Uniform(0.5)})) as handle:
        with pytest.raises(ValueError, match=r"drops\[6\]: TextTopK cannot be here"):
            handle.set_plan(DropPlan({3: Uniform(0.5), 6: TextTopK(2)}))
        assert handle.plan == DropPlan({3: Uniform(0.5)})


@gemma4
def test_frames_of_gemma_4_are_counted():
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4", (0, 2))
    with hico_kernels.compress(model, DropPlan({1: Uniform(PerFrame(2))})) as handle:
        forward(model, **inputs)
    assert handle.report().visual[1] == [6, 6]


@gemma4
def test_what_gemma_4_cannot_do_is_said():
    for name in ("gemma4", "gemma4-experts"):
        found = hico_kernels.supports(tiny.model(name))
        assert (found["family"], found["positions"], found["rows"]) == (
            "Gemma 4",
            ["keep"],
            ["padded", "packed"],
        )


@gemma4
def test_flops_and_cache_of_gemma_4_by_hand():
    """Layers of various head sizes; two without keys, which run for one token; experts."""
    model, inputs = tiny.model("gemma4"), tiny.prompt("gemma4")
    with hico_kernels.compress(model, FROM_1) as handle:
        forward(model, **inputs, logits_to_keep=1)
        report = handle.report()
    rows = [24, 18, 18, 15, 15, 15, 15]
    assert report.rows == rows
    sizes = [8, 16, 8, 8, 16, 8, 16]  # of a head, of which there are 4, and 2 of keys
    shared = [False] * 5 + [True] * 2
    flops = 2 * (32 * 2 * 16 * 24 + 32 * 4 * 16 + 4 * 16 * 24)  # layer 1 scores what it is given
    held = 0
    for n, size, no_keys in zip(rows, sizes, shared, strict=True):
        run = 1 if no_keys and LAST_ONLY else n
        own = 32 * 4 * size * 2 + 3 * 32 * 48 + 2 * 32 * 6  # queries and output, MLP, embedding
        own += 0 if no_keys else 2 * 32 * 2 * size
        flops += 2 * own * run + 4 * 4 * size * visible_pairs(run, n)
        held += 0 if no_keys else 2 * 2 * size * n * 8
    assert report.flops == flops
    assert report.kv_bytes == held
    model, inputs = tiny.model("gemma4-experts"), tiny.prompt("gemma4-experts")
    with hico_kernels.compress(model, DropPlan({0: Uniform(0.5)})) as handle:
        forward(model, **inputs)
    flops = 0
    for size, keys in ((8, 2), (16, 1)) * 2:
        own = 32 * 4 * size * 2 + 32 * keys * size * (2 if size == 8 else 1)  # values are the keys
        own += 3 * 32 * 48 + 32 * 4 + 2 * 3 * 32 * 12  # MLP, router, 2 of 4 experts
        flops += 2 * own * 18 + 4 * 4 * size * visible_pairs(18, 18)
    assert handle.report().flops == flops


def mixed(kinds):
    """A Qwen3.5 with these layers."""
    return tiny.fresh("qwen3_5", kinds=kinds)


@qwen3_5
@pytest.mark.parametrize("side", ["left", "right"])
def test_drops_before_between_and_behind_layers_with_a_state(side):
    model = mixed("llflfl")
    inputs = tiny.prompt("qwen3_5", (0, 4, 2), side=side)
    plan = DropPlan({1: Uniform(0.75), 2: TextTopK(0.5), 5: Uniform(2)})
    got, handle = patched(model, plan, inputs)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12
    stock = tiny.generate(model, inputs)
    assert (got.logits[0] - stock.logits[0]).abs().max() > 1e-2


@qwen3_5
def test_dropped_tokens_are_not_in_the_state():
    """A layer's state, of recurrence and convolution, is that of a prompt without them."""
    model = mixed("lfll")
    inputs = tiny.prompt("qwen3_5", (0, 3))
    with hico_kernels.compress(model, DropPlan({2: Uniform(0.25)})) as handle:
        cache = forward(model, **inputs).past_key_values
    entering = []
    hook = (
        tiny.decoder(model)
        .layers[2]
        .register_forward_pre_hook(
            lambda m, args, kwargs: entering.append(args[0]), with_kwargs=True
        )
    )
    forward(model, **inputs)
    hook.remove()
    layer, kept = tiny.decoder(model).layers[2], handle.kept[2]
    for row, own in enumerate(kept):
        alone = DynamicCache(config=model.config)
        real = own[inputs["attention_mask"][row, own].bool()]
        with torch.no_grad():
            normed = layer.input_layernorm(entering[0][row : row + 1, real])
            layer.linear_attn(normed, cache_params=alone)
        for states in ("conv_states", "recurrent_states"):
            got, want = (getattr(c.layers[2], states) for c in (cache, alone))
            got, want = (x[0] if isinstance(x, dict) else x for x in (got, want))
            assert (got[row] - want[0]).abs().max() < 1e-12


@qwen3_5
def test_text_guided_drops_need_a_layer_that_attends():
    reason = (
        r"drops\[4\]: TextTopK cannot be here: nothing attends to tokens in a layer of linear "
        "attention: score in one of 1, 2, 3"
    )
    with pytest.raises(ValueError, match=reason):
        hico_kernels.patch(tiny.model("qwen3_5"), DropPlan({4: TextTopK(0.5)}))
    with hico_kernels.compress(tiny.model("qwen3_5"), DropPlan({4: Uniform(0.5)})):
        pass


@qwen3_5
def test_a_static_cache_of_qwen3_5():
    model, inputs = tiny.model("qwen3_5"), tiny.prompt("qwen3_5", (0, 4, 2))
    cache = StaticCache(config=model.config, max_cache_len=64)
    got, handle = patched(model, FROM_0, inputs, past_key_values=cache)
    assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@qwen3_5
def test_a_decode_loop_without_generate():
    model, inputs = tiny.model("qwen3_5"), tiny.prompt("qwen3_5")
    with hico_kernels.compress(model, FROM_0) as handle:
        out = forward(model, **inputs)
        got, new = [out.logits[:, -1]], torch.empty(1, 0, dtype=torch.long)
        for _ in range(4):
            new = torch.cat([new, got[-1][:, :90].argmax(-1, keepdim=True)], 1)
            out = forward(model, input_ids=new[:, -1:], past_key_values=out.past_key_values)
            got.append(out.logits[:, -1])
    length = inputs["input_ids"].shape[1]
    with masked(tiny.decoder(model), handle.kept, length):
        want = forward(model, **grown(inputs, new), use_cache=False).logits[:, length - 1 :]
    assert (torch.stack(got, 1) - want).abs().max() < 1e-12


def two_turns(plan, rows, visual, frames, lead=(0, 0), kinds="lfffl", layout="padded"):
    """The last states of two turns, 8 tokens of text and 40 with visual ones behind `lead` tokens
    of padding; of all the rows at once, or of one without its padding.
    """
    model = mixed(kinds)
    decoder = tiny.decoder(model)
    generator = torch.Generator().manual_seed(3)
    first, second = (
        torch.randn(2, n, 32, generator=generator, dtype=torch.float64)[rows] for n in (8, 40)
    )
    at = torch.arange(40)
    lead, visual = torch.tensor(lead)[rows, None], torch.tensor(visual)[rows, None]
    real, places = at >= lead, (at >= lead + 2) & (at < lead + 2 + visual)
    if len(rows) == 1:
        second, real, places = (x[:, lead[0] :] for x in (second, real, places))
    mask = torch.cat([torch.ones(len(rows), 8, dtype=torch.bool), real], 1).long()
    positions = (mask.cumsum(1) - 1)[:, 8:].expand(3, -1, -1)
    with torch.no_grad(), hico_kernels.compress(model, plan, layout) as handle:
        cache = decoder(inputs_embeds=first, use_cache=True).past_key_values
        handle.announce(places, [frames[row] for row in rows])
        return decoder(
            inputs_embeds=second,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        ).last_hidden_state[:, -1]


SHORTER = {
    "first": (DropPlan({0: Uniform(0.1)}), (36, 4)),
    "last": (DropPlan({4: Uniform(0.5)}), (20, 14)),
    "merged": (PreLLM(1, per_frames=2), (36, 4)),
    "merged-and-dropped": (DropPlan({3: Uniform(4)}, pre_llm=PreLLM(1, per_frames=2)), (20, 14)),
    "padded-until-then": (DropPlan({1: Uniform(4)}), (20, 14), (0, 6)),
    "padded-alike": (DropPlan({1: Uniform(4)}), (14, 14), (3, 3)),
    "padded": (DropPlan({0: Uniform(0.5)}), (8, 8), (0, 6)),
}


@qwen3_5
@pytest.mark.parametrize("case", SHORTER.values(), ids=SHORTER)
def test_a_state_does_not_go_on_with_places_in_front(case):
    """They would shift zeros into the convolution and let the state decay."""
    plan, visual, *lead = case
    with pytest.raises(ValueError, match="past_key_values: a state of linear attention cannot go"):
        two_turns(plan, [0, 1], visual, (2, 2), *lead)
    assert two_turns(plan, [1], visual, (2, 2), *lead).isfinite().all()


@qwen3_5
@pytest.mark.parametrize("case", SHORTER.values(), ids=SHORTER)
def test_packed_states_go_on_with_any_lengths(case):
    plan, visual, *lead = case
    both = two_turns(plan, [0, 1], visual, (2, 2), *lead, layout="packed")
    for row in (0, 1):
        alone = two_turns(plan, [row], visual, (2, 2), *lead)
        assert (both[row] - alone[0]).abs().max() < 1e-12


EVEN = {
    "first": (DropPlan({0: Uniform(4), 3: Uniform(1)}), (14, 14)),
    "padded": (DropPlan({0: Uniform(4), 3: Uniform(1)}), (20, 14), (0, 6)),
    "then": (DropPlan({1: Uniform(0.5), 3: Uniform(4)}), (20, 14), (0, 6), "fffll"),
    "merged": (PreLLM(2, per_frames=2), (20, 14)),
}


@qwen3_5
@pytest.mark.parametrize("case", EVEN.values(), ids=EVEN)
def test_a_state_goes_on_with_equal_lengths(case):
    plan, visual, *lead = case
    both = two_turns(plan, [0, 1], visual, (5, 2), *lead)
    for row in (0, 1):
        alone = two_turns(plan, [row], visual, (5, 2), *lead)
        assert (both[row] - alone[0]).abs().max() < 1e-12


@qwen3_5
def test_flops_and_cache_of_qwen3_5_by_hand():
    model, inputs = tiny.model("qwen3_5"), tiny.prompt("qwen3_5")
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})) as handle:
        forward(model, **inputs)
    report = handle.report()
    assert report.rows == [23, 17, 17, 17, 17]
    linear = 32 * (16 + 16 + 32) + 32 * 32 + 2 * 32 * 4 + 32 * 32 + 64 * 4  # ..., convolution
    full = 32 * (2 * 32 + 2 * 16) + 32 * 32  # queries have gates
    mlp = 3 * 32 * 48
    flops = 2 * (linear + mlp) * (23 + 17) + 6 * 4 * 8 * 8 * (23 + 17)
    flops += 3 * (2 * (full + mlp) * 17 + 4 * 32 * visible_pairs(17, 17))
    assert report.flops == flops
    assert report.kv_bytes == 3 * 17 * 2 * 16 * 8
    model = tiny.model("qwen3_5_moe")
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})) as handle:
        forward(model, **inputs)
    # 2 of 4 experts, the one for all and its gate, the router
    moe = 2 * 3 * 32 * 12 + 3 * 32 * 20 + 32 + 4 * 32
    assert handle.report().flops - flops == 2 * (moe - mlp) * sum(report.rows)
