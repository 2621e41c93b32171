"""The VideoChat-Flash of this library, which drops by a plan of its own, patched like any other."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("hico_model")

import hico_kernels
import hico_model
from hico_kernels import DropPlan, PerFrame, PreLLM, TextTopK, Uniform, UnsupportedModel
from hico_model.generate import generate
from hico_model.llm import Prompt

OWN = DropPlan({1: Uniform(0.75)}, "renumber")
PLAN = DropPlan({1: Uniform(0.5), 3: TextTopK(0.25)})
TINY = replace(hico_model.presets["nano"], vision_layers=1, num_layers=4, plan=OWN)


@pytest.fixture
def model():
    return hico_model.VideoChatFlash(TINY, dtype=torch.float64)


def prompts(model):
    generator = torch.Generator().manual_seed(0)
    visual = [torch.randn(n, 128, generator=generator, dtype=model.dtype) for n in (12, 20)]
    return [Prompt([5, 6, 7], visual[0], [8, 9]), Prompt([4], visual[1], [3, 2, 1])]


def say(model, plan):
    return generate(model.llm, prompts(model), plan, max_new_tokens=4)


def test_a_patch_sets_the_plan_and_removing_it_gives_the_models_own_back(model):
    config = model.config
    handle = hico_kernels.patch(model, PLAN)
    assert handle.plan == model.config.plan == PLAN
    assert replace(model.config, plan=OWN) == config
    later = DropPlan({2: TextTopK(3)}, "renumber")
    handle.set_plan(later)
    assert handle.plan == model.config.plan == later
    handle.remove()
    assert model.config is config
    assert "prefill" not in model.llm.__dict__
    with hico_kernels.compress(model, PLAN):
        handle.remove()  # an old one does not take off the new one
        assert model.config.plan == PLAN
        assert "prefill" in model.llm.__dict__
    assert model.config is config


def test_a_removed_patch_takes_no_plan(model):
    handle = hico_kernels.patch(model, PLAN)
    handle.remove()
    with pytest.raises(RuntimeError, match="set_plan: this patch is removed"):
        handle.set_plan(DropPlan({2: TextTopK(3)}))
    assert model.config == TINY


def test_removing_a_patch_leaves_other_changes_of_the_config(model):
    with hico_kernels.compress(model, PLAN):
        model.config = replace(model.config, max_frames=7)
    assert model.config == replace(TINY, max_frames=7)


def test_a_patch_is_removed_from_under_a_wrapper(model):
    config, calls = model.config, []
    handle = hico_kernels.patch(model, PLAN)
    patched = model.llm.prefill

    def wrapper(*args, **more):
        calls.append(args)
        return patched(*args, **more)

    model.llm.prefill = wrapper
    handle.remove()
    assert model.config is config
    say(model, PLAN)
    assert len(calls) == 1
    assert handle.kept == {}  # counted no more
    with hico_kernels.compress(model, PLAN) as again:
        say(model, PLAN)
        assert len(calls) == 2
        assert list(again.kept) == [1, 3]
    assert model.config is config
    assert model.llm.prefill is wrapper


def test_answers_drop_by_the_plan_of_the_patch(model):
    pytest.importorskip("av")
    from hico_model import answer
    from hico_model.cli import DEMO_VIDEO

    def kept(**options):
        trace = answer(DEMO_VIDEO, "Who?", model, max_frames=8, max_new_tokens=1, **options).trace
        return {layer: len(own) for layer, own in trace.kept.items()}

    assert kept() == {1: 96}  # of 2 clips of 64
    with hico_kernels.compress(model, PLAN) as handle:
        assert kept() == {1: 64, 3: 32}
        assert [v for (v,) in handle.report().visual] == [128, 64, 64, 32]
        assert kept(plan=DropPlan({})) == {}
    assert kept() == {1: 96}


def test_a_patched_model_says_what_it_says_with_that_plan(model):
    want = say(model, PLAN)
    with hico_kernels.compress(model, PLAN) as handle:
        got = say(model, handle.plan)
    assert got.tokens == want.tokens
    assert torch.equal(got.prefill.logits, want.prefill.logits)


def test_the_report_counts_what_the_layers_saw(model):
    with hico_kernels.compress(model, PLAN) as handle:
        assert str(handle.report()) == "no prompt with visual tokens yet"
        assert handle.kept == {}
        text = [Prompt([1, 2], None, [3])]
        model.llm.prefill(text, PLAN)
        assert handle.kept == {}
        result = say(model, PLAN)
        report, kept = handle.report(), handle.kept
        model.llm.prefill(text, PLAN)
        assert handle.report() == report
    assert report.visual == [[12, 20], [6, 10], [6, 10], [3, 5]]
    assert report.rows == [24, 14, 14, 9]
    assert report.length == 24
    token = 2 * 2 * 32 * 8  # key and value, heads, head size, float64
    assert report.kv_bytes == sum((17 + 24, 11 + 14, 11 + 14, 8 + 9)) * token
    assert report.kv_bytes + report.kv_bytes_saved == 4 * (17 + 24) * token
    sizes = TINY.decoder

    def cost(rows):
        parts = sizes.prefill_flops(rows)
        return parts["matrices"] + parts["attention"]

    scored = sizes.scoring_flops(11) + sizes.scoring_flops(14)
    assert report.flops == cost([17, 11, 11, 8]) + cost([24, 14, 14, 9]) + scored
    assert report.flops + report.flops_saved == cost([17] * 4) + cost([24] * 4)
    for layer, rows in kept.items():
        for i, (before, visual, after) in enumerate(((3, 12, 2), (1, 20, 3))):
            numbers = result.prefill.kept[layer][i] + before
            ends = torch.arange(before + visual, before + visual + after)
            assert torch.equal(rows[i], torch.cat([torch.arange(before), numbers, ends]))


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="layer 4 is out of range"):
        hico_kernels.patch(model, DropPlan({4: Uniform(0.5)}))
    with pytest.raises(ValueError, match="rows must be 'padded' or 'packed', got 'nonsense'"):
        hico_kernels.patch(model, PLAN, rows="nonsense")
    with pytest.raises(TypeError, match="plan must be a DropPlan, got dict"):
        hico_kernels.patch(model, {})
    with pytest.raises(ValueError, match=r"keep must be a ratio or a count .*, got PerFrame"):
        hico_kernels.patch(model, DropPlan({1: Uniform(PerFrame(4))}))
    with pytest.raises(ValueError, match="pre_llm must be None, clips are merged, got PreLLM"):
        hico_kernels.patch(model, DropPlan({}, pre_llm=PreLLM(4)))
    with pytest.raises(UnsupportedModel, match="it merges and drops by itself"):
        hico_kernels.patch(model, PreLLM(64))
    with pytest.raises(UnsupportedModel, match="it merges and drops by itself"):
        hico_kernels.selfcheck(model)
    assert "prefill" not in model.llm.__dict__
    with hico_kernels.compress(model, PLAN):
        with pytest.raises(UnsupportedModel, match="patched already"):
            hico_kernels.patch(model, PLAN)
        with pytest.raises(TypeError, match=r"cannot be copied: remove\(\) first"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match=r"cannot be pickled: remove\(\) first"):
            pickle.dumps(model)
    again = copy.deepcopy(model)
    assert say(again, PLAN).tokens == say(model, PLAN).tokens


def test_supports_says_what_a_plan_may_ask_for(model):
    assert hico_kernels.supports(model) == {
        "supported": True,
        "reason": None,
        "family": "VideoChatFlash",
        "layers": 4,
        "positions": ["keep", "renumber"],
        "rows": ["packed"],
        "pre_llm": False,
    }
