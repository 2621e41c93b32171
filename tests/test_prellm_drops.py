"""The whole of HiCo: clips merged in front of the language model and tokens dropped inside it.

The reference merges the inputs by hand and masks what the plan dropped, without a cache.
"""

import copy
import pickle

import patch_models as tiny
import pytest
import torch
from patch_runs import forward, grown, second_turn
from prellm_runs import MULTI_AXIS, STATES, VIDEOS, expected
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import hico_kernels
from hico_kernels import DropPlan, PerFrame, PreLLM, TextTopK, Uniform, UnsupportedModel, presets

MERGE = PreLLM(merge_to=3, per_frames=2)
# In layer 0 as well, twice by the text, by ratios and by a count.
DEEP = {0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)}
PLAN = DropPlan(DEEP, pre_llm=MERGE)
LATE = DropPlan({2: TextTopK(0.5)}, pre_llm=MERGE)
TEXT_FIRST = DropPlan({0: TextTopK(0.5), 2: Uniform(0.25)}, pre_llm=MERGE)
PLANS = {"deep": PLAN, "late": LATE, "text-first": TEXT_FIRST}
every_model = pytest.mark.parametrize("name", VIDEOS)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
attending = pytest.mark.parametrize("name", [name for name in VIDEOS if name not in STATES])
either_rows = pytest.mark.parametrize("rows", ["padded", "packed"])


def rows_of(handle, batch):
    """What each sequence kept: layer -> places."""
    return [{layer: left[row] for layer, left in handle.kept.items()} for row in range(batch)]


def assert_continues(model, name, inputs, plan, kept, got, **more):
    """The answers are those of inputs merged by hand, with what was dropped masked."""
    new = got.sequences[:, inputs["input_ids"].shape[1] :]
    for row, drops in enumerate(kept):
        given = (model, name, inputs, plan.pre_llm, row, new[row].tolist(), drops)
        want = expected(*given, **more)[0][-7:-1].float()
        have = torch.stack([step[row] for step in got.logits])
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@attending
@every_plan
@either_rows
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_are_those_of_inputs_merged_by_hand_and_masked(name, plan, rows, side):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3), side=side)
    with hico_kernels.compress(model, plan, rows) as handle:
        logits = model(**inputs).logits
        kept, visual = rows_of(handle, 2), handle.report().visual
    merged = visual[0] if 0 not in plan.drops else None
    for row, drops in enumerate(kept):
        want, places = expected(model, name, inputs, plan.pre_llm, row, drops=drops)
        video = (inputs["input_ids"][row] == tiny.MODELS[name].token)[places]
        counts = plan.counts(int(video.sum()))  # of the tokens after merging
        assert {n: visual[n][row] for n in counts} == counts
        assert merged is None or merged[row] == int(video.sum())
        last = drops[max(drops)]
        real = inputs["attention_mask"][row][last].bool()
        mine = logits[row][-len(last) :][real]
        theirs = want[torch.isin(places, last[real])]
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("plan", [PLAN, LATE], ids=["deep", "late"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_take_in_what_merging_and_drops_leave(name, plan, side):
    test_logits_are_those_of_inputs_merged_by_hand_and_masked(name, plan, "padded", side)


@attending
@either_rows
@torch.no_grad()
def test_generate_goes_on_with_what_is_left(name, rows):
    if name == "qwen2_5_vl" and tiny.VERSION == (5, 4):
        pytest.skip("5.4 gives generated tokens other positions, patched or not")
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3, 1))
    with hico_kernels.compress(model, PLAN, rows) as handle:
        got = tiny.generate(model, inputs)
        kept = rows_of(handle, 3)
    lengths = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    assert rows == "packed" or lengths == sorted(lengths, reverse=True)
    assert_continues(model, name, inputs, PLAN, kept, got)


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_generate_goes_on_with_the_states(name):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3, 1))
    with hico_kernels.compress(model, PLAN) as handle:
        got = tiny.generate(model, inputs)
        kept = rows_of(handle, 3)
    assert_continues(model, name, inputs, PLAN, kept, got)


@pytest.mark.parametrize("name", sorted(set(VIDEOS) - set(MULTI_AXIS)))
@either_rows
@torch.no_grad()
def test_positions_can_be_numbered_anew_after_each_drop_too(name, rows):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    plan = DropPlan(DEEP, "renumber", MERGE)
    with hico_kernels.compress(model, plan, rows) as handle:
        got = tiny.generate(model, inputs)
        kept = rows_of(handle, 2)
    assert_continues(model, name, inputs, plan, kept, got, renumber=True)


@torch.no_grad()
def test_the_text_asks_the_merged_tokens():
    """What stays is what the model's own attention looks at in the inputs merged by hand."""
    name = "llava_onevision"
    model = tiny.model(name, torch.float32, "eager")
    inputs = tiny.prompt(name, dtype=torch.float32)
    seen = []
    layer = tiny.decoder(model).layers[0].self_attn
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    _, places = expected(model, name, inputs, MERGE, 0)
    hook.remove()
    visual = (inputs["input_ids"][0] == tiny.VIDEO)[places]
    looks = seen[-1][0, :, -1].mean(0)[visual]
    want = places[visual][looks.topk(2).indices].sort().values
    with hico_kernels.compress(model, DropPlan({0: TextTopK(2)}, pre_llm=MERGE)) as handle:
        model(**inputs)
    kept = handle.kept[0][0]
    assert torch.equal(kept[inputs["input_ids"][0][kept] == tiny.VIDEO], want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@either_rows
@torch.no_grad()
def test_a_second_turn_on_the_same_cache(cache, positions, rows):
    name, plan = "llava_onevision", DropPlan(DEEP, positions, MERGE)
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    made = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=96),
    }[cache]()
    question = torch.randint(3, 80, (2, 5), generator=torch.Generator().manual_seed(9))
    with hico_kernels.compress(model, plan, rows) as handle:
        first = tiny.generate(model, inputs, past_key_values=made)
        kept = rows_of(handle, 2)
        turn = second_turn(model, inputs, first, question)
        second = tiny.generate(model, turn, past_key_values=made)
    renumber = positions == "renumber"
    assert_continues(model, name, inputs, plan, kept, first, renumber=renumber)
    for row, drops in enumerate(kept):
        new = second.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        want = expected(model, name, inputs, MERGE, row, new, drops, renumber)[0][-7:-1]
        have = torch.stack([step[row] for step in second.logits])
        torch.testing.assert_close(have, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="generate gives pixels to first turns only")
@either_rows
@torch.no_grad()
def test_a_video_after_a_turn_of_padded_text(rows):
    """The layers begin with tokens that were where the model put them."""
    name = "llava_onevision"
    model, two = tiny.model(name), tiny.prompt(name, (0, 0), seed=5)
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    with hico_kernels.compress(model, LATE, rows) as handle:
        first = tiny.generate(model, text, past_key_values=DynamicCache())
        start = first.past_key_values.get_seq_length()
        both = grown(text, torch.cat([first.sequences[:, 9:start], two["input_ids"]], 1))
        both["pixel_values_videos"] = two["pixel_values_videos"]
        got = tiny.generate(model, both, past_key_values=first.past_key_values)
    whole = torch.arange(start)
    kept = [
        {n: torch.cat([whole, left + start]) for n, left in row.items()}
        for row in rows_of(handle, 2)
    ]
    assert_continues(model, name, both, LATE, kept, got)


@torch.no_grad()
def test_a_rollback_takes_positions_back():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 3))
    new = torch.tensor([[5, 6], [7, 8]])
    mask = grown(inputs, new)["attention_mask"]
    for rows in ("padded", "packed"):
        with hico_kernels.compress(model, PLAN, rows):
            cache = model(**inputs).past_key_values
            given = {"attention_mask": mask, "past_key_values": cache}
            other = copy.deepcopy(cache)
            want = model(input_ids=new, **given).logits
            cache.crop(-2)
            assert torch.equal(model(input_ids=new, **given).logits, want)
            other.batch_select_indices(torch.tensor([1, 0]))
            swapped = {"attention_mask": mask[[1, 0]], "past_key_values": other}
            got = model(input_ids=new[[1, 0]], **swapped).logits
            torch.testing.assert_close(got[:, -1], want[[1, 0], -1], rtol=1e-9, atol=1e-9)
            cache.reset()
            again = model(**inputs, past_key_values=cache).logits
            assert torch.equal(again, model(**inputs).logits)


@torch.no_grad()
def test_another_plan_goes_on_with_the_positions_of_merging():
    name = "llava_onevision"
    model, inputs = tiny.model(name), tiny.prompt(name)
    new = torch.tensor([[5, 6, 7]])
    with hico_kernels.compress(model, LATE) as handle:
        cache = model(**inputs).past_key_values
        kept = rows_of(handle, 1)[0]
        handle.set_plan(DropPlan({}))
        mask = grown(inputs, new)["attention_mask"]
        got = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    want, _ = expected(model, name, inputs, MERGE, 0, new[0].tolist(), kept)
    torch.testing.assert_close(got[0], want[-3:], rtol=1e-9, atol=1e-9)


@every_model
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_inputs_merged_by_hand_and_masked(name, checkpointed):
    model, inputs = tiny.fresh(name).train(), tiny.prompt(name)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100  # the answer, behind the videos
    with hico_kernels.compress(model, PLAN) as handle:
        loss = model(**inputs, labels=labels).loss
        weights = list(model.parameters())
        mine = torch.autograd.grad(loss, weights, materialize_grads=True)
    model.gradient_checkpointing_disable()
    kept = rows_of(handle, 1)[0]
    logits, places = expected(model, name, inputs, MERGE, 0, drops=kept)
    want = F.cross_entropy(logits[:-1].float(), labels[0, places][1:])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    theirs = torch.autograd.grad(want, weights, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl"])
@torch.no_grad()
def test_without_mask_and_cache_nothing_is_cut(name):
    """Row 8: transformers would take gaps in the positions for packed sequences, and cut there."""
    model, inputs = tiny.model(name), tiny.prompt(name)
    with hico_kernels.compress(model, PLAN):
        want = model(**inputs).logits
        del inputs["attention_mask"]
        got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_model
def test_a_number_per_frame_counts_the_frames_before_merging(name):
    steps = VIDEOS[name][0]
    plan = DropPlan({1: Uniform(PerFrame(2)), 3: TextTopK(PerFrame(1))}, pre_llm=PreLLM(5, 2))
    with hico_kernels.compress(tiny.model(name), plan) as handle:
        forward(tiny.model(name), **tiny.prompt(name, (0, 3)))
    visual = handle.report().visual
    assert visual[1:4] == [[2 * steps] * 2, [2 * steps] * 2, [steps] * 2]
    assert visual[0][0] > visual[1][0]


def test_the_report_counts_from_the_merged_tokens():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 3))
    with hico_kernels.compress(model, PLAN) as handle:
        forward(model, **inputs)
        report = handle.report()
    # 13 visual tokens; 3 of two frames, 2 of one, and a newline: 6, of which 4, 3 and 2 stay
    assert report.visual == [[4, 4], [3, 3], [3, 3], [2, 2]]
    assert report.rows == [17, 16, 16, 15]
    assert report.length == 26
    assert "merging" in report.milliseconds
    with hico_kernels.compress(model, LATE) as handle:
        forward(model, **inputs)
        assert handle.report().visual == [[6, 6], [6, 6], [3, 3], [3, 3]]


def test_the_plan_is_kept_with_the_model_and_can_change():
    assert DropPlan.from_json(PLAN.to_json()) == PLAN != DropPlan(DEEP)
    assert pickle.loads(pickle.dumps(PLAN)) == copy.deepcopy(PLAN) == PLAN
    assert len({PLAN, DropPlan(DEEP), DropPlan(DEEP, pre_llm=MERGE)}) == 2
    with pytest.raises(TypeError, match="pre_llm must be a PreLLM or None, got 64"):
        DropPlan(DEEP, pre_llm=64)
    model, inputs = tiny.fresh("llava_onevision"), tiny.prompt("llava_onevision")
    want = forward(model, **inputs).logits
    with hico_kernels.compress(model, PLAN) as handle:
        assert DropPlan.from_json(model.config.hico) == PLAN
        both = forward(model, **inputs).logits
        handle.set_plan(MERGE)
        assert PreLLM.from_json(model.config.hico) == MERGE
        assert forward(model, **inputs).logits.shape[1] > both.shape[1]
        handle.set_plan(DropPlan({}))
        assert torch.equal(forward(model, **inputs).logits, want)
        handle.set_plan(PLAN)
        assert torch.equal(forward(model, **inputs).logits, both)
    assert torch.equal(forward(model, **inputs).logits, want)


def test_what_keeps_everything_changes_no_bit():
    name = "llava_onevision"
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3))
    plan = DropPlan({0: Uniform(1.0), 2: TextTopK(1.0)}, pre_llm=PreLLM(16, 4))
    for rows in ("padded", "packed"):
        with hico_kernels.compress(model, plan, rows) as handle:
            got = tiny.generate(model, inputs)
        assert handle.kept == {}
        assert tiny.difference(got, tiny.generate(model, inputs)) == 0


def test_presets_may_merge_first():
    assert presets.videochat_flash().pre_llm is None
    plan = presets.videochat_flash("keep", pre_llm=PreLLM(64))
    assert plan == DropPlan(presets.videochat_flash().drops, "keep", PreLLM(64))
    match = "PreLLM knows where the frames of qwen2_vl, .* not"
    with pytest.raises(UnsupportedModel, match=match):
        hico_kernels.patch(tiny.model("smolvlm"), PLAN)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
@either_rows
def test_selfcheck_merges_too(name, rows):
    model = tiny.model(name)
    found = hico_kernels.selfcheck(model, DropPlan(DEEP, pre_llm=PreLLM(6, 2)), rows)
    assert found["error"] < 1e-12 < found["effect"]
    assert hico_kernels.selfcheck(model, PreLLM(6, 2), rows)["error"] < 1e-12
