"""Handles: what can be patched, what is refused and why, that removing a patch leaves nothing."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from xml.etree import ElementTree

import patch_models as tiny
import pytest
import torch
from torch import nn
from transformers import cache_utils

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform, UnsupportedModel
from hico_kernels.flops import Decoder
from hico_kernels.patch import call, clock

PLAN = DropPlan({1: Uniform(0.5), 3: TextTopK(0.25)})


@pytest.fixture
def model():
    return tiny.model("llava_onevision")


@pytest.fixture
def inputs():
    return tiny.prompt("llava_onevision", (0, 3))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def hooks_of(model):
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._forward_hooks_always_called)
        for m in model.modules()
    )


def test_a_removed_patch_leaves_nothing_behind():
    for name in ("qwen3_vl", "llava_onevision"):
        model, inputs = tiny.fresh(name), tiny.prompt(name, (0, 3))
        want, hooks, config = logits(model, inputs), hooks_of(model), model.config.to_dict()
        attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
        classes = [dict(vars(c)) for c in type(tiny.decoder(model)).__mro__]
        handle = hico_kernels.patch(model, PLAN)
        assert logits(model, inputs).shape != want.shape
        handle.remove()
        handle.remove()  # harmless
        assert torch.equal(logits(model, inputs), want)
        assert hooks_of(model) == hooks
        assert model.config.to_dict() == config
        assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
        assert [dict(vars(c)) for c in type(tiny.decoder(model)).__mro__] == classes


def test_the_patch_is_taken_off_when_the_block_raises(model, inputs):
    want = logits(model, inputs)
    with pytest.raises(KeyError), hico_kernels.compress(model, PLAN):
        raise KeyError
    assert torch.equal(logits(model, inputs), want)


def test_a_call_that_fails_does_not_disturb_the_next(model, inputs):
    with hico_kernels.compress(model, PLAN) as handle:
        want = logits(model, inputs)
        assert handle._call is None  # nothing of a call is held for longer than it takes
        wrong = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:1]}
        with pytest.raises((RuntimeError, ValueError)):
            logits(model, wrong)
        text = inputs["input_ids"][:, -5:]
        assert logits(model, {"input_ids": text}).shape[1] == 5
        assert torch.equal(logits(model, inputs), want)


def test_a_second_patch_is_refused(model):
    with hico_kernels.compress(model, PLAN):
        for again in (model, model.model):
            with pytest.raises(UnsupportedModel, match="patched already"):
                hico_kernels.patch(again, PLAN)
    hico_kernels.patch(model, PLAN).remove()


def test_the_model_without_its_head_can_be_patched(model, inputs):
    with hico_kernels.compress(model, PLAN):
        want = logits(model, inputs)
    with hico_kernels.compress(model.model, PLAN), torch.no_grad():
        states = model.model(**inputs).last_hidden_state
    assert torch.equal(model.lm_head(states), want)


def test_two_models_are_patched_each_in_its_own_way(inputs):
    one, two = tiny.fresh("llava_onevision"), tiny.fresh("llava_onevision")
    other = DropPlan({2: Uniform(3)})
    with hico_kernels.compress(one, PLAN):
        want = logits(one, inputs)
    with hico_kernels.compress(two, other):
        want_other = logits(two, inputs)
    with hico_kernels.compress(one, PLAN), hico_kernels.compress(two, other):
        assert torch.equal(logits(one, inputs), want)
        assert torch.equal(logits(two, inputs), want_other)
        assert torch.equal(logits(one, inputs), want)


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="4.57 mixes the features of two threads itself")
def test_threads_do_not_mix(model):
    prompts = [tiny.prompt("llava_onevision", (0, n), seed=n) for n in (1, 4)]
    with hico_kernels.compress(model, PLAN):
        want = [logits(model, p) for p in prompts]
        wrong = []

        def run(index):
            for _ in range(5):
                if not torch.equal(logits(model, prompts[index]), want[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_copies_and_pickles_of_a_patched_model_are_refused(model, inputs):
    with hico_kernels.compress(model, PLAN):
        with pytest.raises(TypeError, match=r"cannot be copied: remove\(\) first"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match=r"cannot be pickled: remove\(\) first"):
            pickle.dumps(model)
        want = logits(model, inputs)
    again = copy.deepcopy(model)
    with hico_kernels.compress(again, PLAN):
        assert torch.equal(logits(again, inputs), want)


def test_the_plan_is_saved_with_the_model(model, tmp_path):
    with hico_kernels.compress(model, PLAN) as handle:
        handle.set_plan(DropPlan({0: Uniform(7)}))
        model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["hico"]
    assert DropPlan.from_json(saved) == DropPlan({0: Uniform(7)})
    loaded = type(model.config).from_pretrained(tmp_path)
    assert DropPlan.from_json(loaded.hico) == DropPlan({0: Uniform(7)})
    assert not hasattr(model.config, "hico")


def test_set_plan_takes_effect_with_the_next_call(model, inputs):
    with hico_kernels.compress(model, PLAN) as handle:
        want = logits(model, inputs)
        handle.set_plan(DropPlan({}))
        assert logits(model, inputs).shape[1] == inputs["input_ids"].shape[1]
        assert handle.kept == {}
        handle.set_plan(PLAN)
        assert torch.equal(logits(model, inputs), want)


def test_a_removed_patch_takes_no_plan():
    model = tiny.fresh("llava_onevision")
    handle = hico_kernels.patch(model, PLAN)
    handle.remove()
    with pytest.raises(RuntimeError, match="set_plan: this patch is removed"):
        handle.set_plan(DropPlan({}))
    assert not hasattr(model.config, "hico")


def test_the_report_counts_tokens_and_bytes(model, inputs):
    with hico_kernels.compress(model, PLAN) as handle:
        assert str(handle.report()) == "no prompt with visual tokens yet"
        logits(model, inputs)
        report = handle.report()
    # 13 visual tokens, then 6, then 3; 13 of text, of which the second row has 3 less and padding
    assert report.visual == [[13, 13], [6, 6], [6, 6], [3, 3]]
    assert report.rows == [26, 19, 19, 16]
    per_token = 2 * 2 * 8 * 8  # key and value, heads, head size, float64
    assert report.kv_bytes == sum(report.rows) * 2 * per_token
    assert report.kv_bytes_saved == (4 * 26 - sum(report.rows)) * 2 * per_token
    assert list(report.milliseconds) == ["scoring", "compacting", "attention"]
    assert min(report.milliseconds.values()) > 0
    assert json.loads(json.dumps(report.as_dict()))["rows"] == report.rows
    lines = str(report).splitlines()
    assert lines[1:4] == [
        "0             26  13, 13",
        "1-2           19  6, 6",
        "3             16  3, 3",
    ]
    assert "23% saved" in lines[4]
    assert re.fullmatch(r"scoring [\d.]+ ms, compacting [\d.]+ ms, attention [\d.]+ ms", lines[-1])


def test_the_time_of_attention_is_that_of_all_layers_of_the_prompt(model, inputs, monkeypatch):
    class Ticking:
        """Time passes where queries are made, a second in each layer."""

        now = 0.0

        def perf_counter(self):
            return self.now

        def tick(self, *args):
            self.now += 1.0

    watch = Ticking()
    logits(model, inputs)
    before = hooks_of(model)
    monkeypatch.setattr(clock, "time", watch)
    queries = [layer.self_attn.q_proj for layer in tiny.decoder(model).layers]
    hooks = [query.register_forward_pre_hook(watch.tick) for query in queries]
    with hico_kernels.compress(model, PLAN) as handle:
        tiny.generate(model, inputs)
        took = handle.report().milliseconds
    for hook in hooks:
        hook.remove()
    assert took["attention"] == 4000  # of the prompt, not of the tokens after it
    assert took["scoring"] == 1000  # by one layer
    assert took["compacting"] == 0
    assert hooks_of(model) == before


def test_a_plan_that_drops_nothing_leaves_the_layers_alone(model, inputs, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(call.Call, "before_layer", refuse)
    with hico_kernels.compress(model, DropPlan({1: Uniform(1.0), 3: TextTopK(1.0)})) as handle:
        tiny.generate(model, inputs)
        report = handle.report()
        handle.set_plan(PLAN)
        with pytest.raises(AssertionError):
            logits(model, inputs)
    assert report.rows == [26] * 4
    assert report.visual == [[13, 13]] * 4
    assert report.flops_saved == report.kv_bytes_saved == 0 < report.flops
    assert report.milliseconds == {}


def test_a_call_that_fails_is_not_watched_on(model, inputs):
    with hico_kernels.compress(model, PLAN) as handle:
        before = hooks_of(model)
        broken = tiny.decoder(model).layers[2].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, inputs)
        broken.remove()
        assert hooks_of(model) == before
        logits(model, inputs)
        assert handle.report().milliseconds["attention"] > 0


def test_the_report_counts_flops_as_the_cost_model_does(model, inputs, tmp_path):
    sizes = Decoder(layers=4, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=tiny.VOCAB)

    def cost(rows):
        parts = sizes.prefill_flops(rows)
        return parts["matrices"] + parts["attention"]

    with hico_kernels.compress(model, PLAN) as handle:
        with pytest.raises(ValueError, match="nothing to draw"):
            handle.report().save(tmp_path / "none.svg")
        logits(model, inputs)
        report = handle.report()
    assert report.flops == 2 * (cost([26, 19, 19, 16]) + sizes.scoring_flops(19))
    assert report.flops + report.flops_saved == 2 * cost([26] * 4)
    with hico_kernels.compress(model, PLAN, rows="packed") as handle:
        logits(model, inputs)
        packed = handle.report()
    # of the second sequence 3 tokens are padding; layer 0 runs before the first drop
    rows = [[26, 19, 19, 16], [26, 16, 16, 13]]
    scored = sizes.scoring_flops(19) + sizes.scoring_flops(16)
    assert packed.flops == sum(map(cost, rows)) + scored
    report.save(tmp_path / "report.svg")
    root = ElementTree.parse(tmp_path / "report.svg").getroot()
    bars = [e for e in root.iter() if e.get("class") == "visual" and e.get("x") != "56"]
    times = next(e.text for e in root.iter() if e.get("class") == "times")
    assert re.fullmatch(r"scoring [\d.]+ ms, compacting [\d.]+ ms, attention [\d.]+ ms", times)
    heights = [float(bar.get("height")) for bar in bars]
    whole = float(next(e for e in root.iter() if e.get("class") == "gone").get("height"))
    assert heights == pytest.approx([whole * n / 26 for n in (13, 6, 6, 3)], abs=0.1)


def bare(kind, **more):
    module = nn.Module()
    module.config = SimpleNamespace(model_type=kind, **more)
    return module


class VideoChatFlashQwenForCausalLM(nn.Module):
    """As far as the remote code of the published checkpoints is looked at."""

    def __init__(self, kind):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind, llm_compress_type="attention")
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Identity()])


REFUSED = {
    r"\(videochat_flash_qwen\): its own code drops .* hico_model.VideoChatFlash.from_pretrained": (
        lambda: VideoChatFlashQwenForCausalLM("videochat_flash_qwen")
    ),
    r"\(qwen2\): its own code drops": lambda: VideoChatFlashQwenForCausalLM("qwen2"),
    "the supported model types are qwen2_vl, ": lambda: bare("bert"),
    r"cannot patch Linear \(None\)": lambda: nn.Linear(2, 2),
    "it has no language model with layers": lambda: bare("qwen2_vl"),
    "attn_implementation must be one of eager, sdpa, .* got 'flex_attention'": (
        lambda: swapped(_attn_implementation="flex_attention")
    ),
    "its language model must be one of qwen2, .* got gpt2": lambda: swapped(model_type="gpt2"),
    "it has layers of kind chunked_attention": (
        lambda: swapped(layer_types=["full_attention", "chunked_attention"] * 2)
    ),
    r"its layer 0 \(Identity\) has no self_attn": lambda: swapped(layers=[nn.Identity()] * 4),
    r"its layer 1 \(Qwen2DecoderLayer\) has no linear_attn": (
        lambda: swapped(layer_types=["full_attention", "linear_attention"] * 2)
    ),
    "its attention is not causal": lambda: swapped(use_bidirectional_attention="all"),
}


def swapped(**changes):
    """A model whose language model is not what it seems."""
    model = tiny.fresh("llava_onevision")
    decoder = model.model.language_model
    if "layers" in changes:
        decoder.layers = nn.ModuleList(changes.pop("layers"))
    config = {"_attn_implementation": "sdpa", "model_type": "qwen2", "layer_types": None}
    decoder.config = SimpleNamespace(**{**config, **changes})
    return model


@pytest.mark.parametrize("reason", REFUSED)
def test_an_unknown_model_is_refused_with_the_reason(reason):
    model = REFUSED[reason]()
    with pytest.raises(UnsupportedModel, match=reason):
        hico_kernels.patch(model, PLAN)
    found = hico_kernels.supports(model)
    assert not found["supported"]
    with pytest.raises(UnsupportedModel, match=reason):
        raise UnsupportedModel(found["reason"])


def test_linear_attention_with_a_cache_of_its_own_is_refused(monkeypatch):
    reason = "this transformers has another cache for linear attention, whose states begin anew"
    name = "LinearAttentionLayer"
    if hasattr(cache_utils, name):  # as in 5.4
        monkeypatch.delattr(cache_utils, name)
    model = swapped(layer_types=["full_attention", "linear_attention"] * 2)
    for layer in model.model.language_model.layers:
        layer.linear_attn = nn.Identity()
    with pytest.raises(UnsupportedModel, match=reason):
        hico_kernels.patch(model, PLAN)


def test_supports_says_what_a_plan_may_ask_for(model):
    assert hico_kernels.supports(model) == {
        "supported": True,
        "reason": None,
        "family": "LLaVA-OneVision",
        "layers": 4,
        "positions": ["keep", "renumber"],
        "rows": ["padded", "packed"],
        "pre_llm": True,
    }
    for name in ("qwen2_vl", "gemma3"):
        assert hico_kernels.supports(tiny.model(name))["positions"] == ["keep"]
    eager = tiny.model("llava_onevision", torch.float32, "eager")
    assert hico_kernels.supports(eager)["rows"] == ["padded"]
    assert not hico_kernels.supports(tiny.model("gemma3"))["pre_llm"]


WRONG_PLANS = {
    "TypeError: plan must be a DropPlan or a PreLLM, got dict": {1: Uniform(0.5)},
    "ValueError: drops: layer 4 is out of range, the model has layers 0 to 3": DropPlan(
        {4: Uniform(0.5)}
    ),
    "ValueError: plan: positions must be 'keep', got 'renumber': Qwen2-VL has rotary": DropPlan(
        {1: Uniform(0.5)}, positions="renumber"
    ),
}


@pytest.mark.parametrize("message", WRONG_PLANS)
def test_a_plan_that_does_not_fit_is_refused(message):
    model, plan = tiny.model("qwen2_vl"), WRONG_PLANS[message]
    hooks = hooks_of(model)
    with pytest.raises((TypeError, ValueError)) as error:
        hico_kernels.patch(model, plan)
    assert f"{type(error.value).__name__}: {error.value}".startswith(message)
    assert hooks_of(model) == hooks


def test_what_cannot_be_right_with_fewer_tokens_is_refused(model, inputs):
    tensor = torch.tensor([3, 4])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    text = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with hico_kernels.compress(model, PLAN):
        with pytest.raises(ValueError, match=r"logits_to_keep must be an int .* got a tensor"):
            logits(model, {**inputs, "logits_to_keep": tensor})
        with pytest.raises(ValueError, match="inputs_embeds: a patched model finds"):
            logits(model, text)


def test_arguments_may_be_given_by_position(model, inputs):
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with hico_kernels.compress(model, PLAN), torch.no_grad():
        assert torch.equal(model(inputs["input_ids"], **rest).logits, logits(model, inputs))


@pytest.mark.skipif(tiny.VERSION < (5, 3), reason="token types came with 5.3")
def test_embeddings_with_token_types_are_as_good_as_ids():
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl", (0, 2))
    with hico_kernels.compress(model, PLAN) as handle, torch.no_grad():
        want, kept = model.model(**inputs).last_hidden_state, handle.kept
        videos = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == tiny.VIDEO] = torch.cat(tuple(videos))
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        got = model.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        ).last_hidden_state
    assert torch.equal(got, want)
    assert all(
        torch.equal(a, b) for n in kept for a, b in zip(kept[n], handle.kept[n], strict=True)
    )


def test_selfcheck_passes_here_and_fails_where_dropping_is_wrong(monkeypatch):
    for name in ("qwen3_vl", "gemma3"):
        found = hico_kernels.selfcheck(tiny.model(name))
        assert found["error"] == 0 < found["effect"]
    renumber = DropPlan(PLAN.drops, positions="renumber")
    assert hico_kernels.selfcheck(tiny.model("smolvlm"), renumber)["error"] < 1e-12
    half = tiny.model("llava_onevision", torch.bfloat16)
    found = hico_kernels.selfcheck(half)
    assert 0 < found["error"] < found["allowed"] < found["effect"]
    monkeypatch.setattr(call, "layer_mask", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=r"selfcheck: .* differs from the masked reference"):
        hico_kernels.selfcheck(tiny.model("llava_onevision"))
    with pytest.raises(RuntimeError, match="selfcheck"):
        hico_kernels.selfcheck(half)


def test_the_module_is_a_package_and_can_be_called(model):
    import hico_kernels.patch.plan as plan_module
    from hico_kernels.patch import DropPlan as Imported

    assert Imported is DropPlan is plan_module.DropPlan is hico_kernels.patch.DropPlan
    assert list(inspect.signature(hico_kernels.patch).parameters) == ["model", "plan", "rows"]
    hico_kernels.patch(model, PLAN).remove()


def test_transformers_is_imported_when_something_is_patched_and_not_before():
    code = (
        "import sys, hico_kernels; hico_kernels.supports(object()); "
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
