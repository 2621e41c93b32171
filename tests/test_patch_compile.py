"""torch.compile of the language model with a plan on: one graph for a prompt, none broken."""

import patch_models as tiny
import pytest
import torch
from torch._dynamo.utils import counters

import hico_kernels
from hico_kernels import DropPlan, PreLLM, TextTopK, Uniform

DROPS = {0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)}
PLAN = DropPlan(DROPS)
MERGING = DropPlan(DROPS, pre_llm=PreLLM(4, per_frames=2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(name):
    """A model whose language model is compiled; `backend="eager"` runs the graphs as traced."""
    model = tiny.fresh(name)
    tiny.decoder(model).compile(fullgraph=True, backend="eager")
    return model


def graphs():
    return counters["stats"]["unique_graphs"]


COMPILED = ("qwen2_vl", "qwen3_vl", "llava_onevision", "gemma4", "qwen3_5")


@pytest.mark.parametrize("name", [name for name in COMPILED if name in tiny.MODELS])
def test_a_prompt_is_one_graph_for_all_prompts_of_its_kind(name):
    plain, model = tiny.model(name), compiled(name)
    with hico_kernels.compress(plain, PLAN), hico_kernels.compress(model, PLAN), torch.no_grad():
        for seed in (0, 3):
            inputs = tiny.prompt(name, (0, 3), seed=seed)
            got = model(**inputs, use_cache=False).logits
            assert torch.equal(got, plain(**inputs, use_cache=False).logits)
    assert graphs() == 1
    assert not counters["graph_break"]


def test_decoding_makes_no_more_graphs_than_without_a_patch():
    inputs = tiny.prompt("llava_onevision", (0, 3))
    stock = compiled("llava_onevision")
    tiny.generate(stock, inputs, max_new_tokens=12)
    without = graphs()
    torch._dynamo.reset()
    counters.clear()
    plain, model = tiny.model("llava_onevision"), compiled("llava_onevision")
    # Merging has two more graphs: in front of the prompt and, for positions, in front of a token.
    for plan, more in ((PLAN, 0), (MERGING, 2)):
        with hico_kernels.compress(plain, plan):
            want = tiny.generate(plain, inputs, max_new_tokens=12)
        with hico_kernels.compress(model, plan):
            got = tiny.generate(model, inputs, max_new_tokens=12)
        assert tiny.difference(got, want) == 0
        assert graphs() <= without + more
        assert not counters["graph_break"]
        torch._dynamo.reset()
        counters.clear()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
def test_merging_in_front_is_one_graph_more(name):
    """It runs in a hook of the language model, which is a function of its own to torch.compile."""
    plain, model = tiny.model(name), compiled(name)
    with hico_kernels.compress(plain, MERGING), hico_kernels.compress(model, MERGING):
        for seed in (0, 3):
            inputs = tiny.prompt(name, (0, 3), seed=seed)
            with torch.no_grad():
                got = model(**inputs, use_cache=False).logits
                want = plain(**inputs, use_cache=False).logits
            assert got.shape[1] < inputs["input_ids"].shape[1]
            assert torch.equal(got, want)
    assert graphs() == 2
    assert not counters["graph_break"]


def test_gradients_flow_through_a_compiled_language_model():
    inputs = tiny.prompt("llava_onevision", (0, 3))
    found = []
    for model in (tiny.fresh("llava_onevision"), compiled("llava_onevision")):
        with hico_kernels.compress(model, MERGING):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-6, atol=1e-12)
