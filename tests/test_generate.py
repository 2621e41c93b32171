"""Generation against that of transformers without drops, and what only a batch can show."""

import warnings
from dataclasses import replace

import pytest
import torch
from test_model import PLANS, SMALL, make, prompts, stock
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from hico_kernels import DropPlan
from hico_model import generate as generate_module
from hico_model.errors import UserError
from hico_model.generate import generate
from hico_model.llm import Prompt

NO_DROP = DropPlan({})
PLAN = DropPlan(PLANS["uniform-text"], "renumber")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Everything is small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make(dtype=torch.float32)


@pytest.fixture(scope="module")
def batch():
    return prompts(dtype=torch.float32)


def peer_tokens(model, prompt, **options):
    embed = model.model.embed_tokens
    parts = [embed(torch.tensor(ids, dtype=torch.long)) for ids in (prompt.before, prompt.after)]
    if prompt.visual is not None:
        parts.insert(1, prompt.visual)
    x = torch.cat(parts)[None]
    out = stock(model).generate(
        inputs_embeds=x,
        attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        **options,
    )
    return out[0].tolist()


@pytest.mark.filterwarnings("ignore:Passing .repetition_penalty. with .inputs_embeds.")
@pytest.mark.parametrize("penalty", [1.0, 1.4])
@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(model, batch, penalty):
    ours = generate(model, batch, NO_DROP, max_new_tokens=12, repetition_penalty=penalty).tokens
    assert ours == [peer_tokens(model, p, repetition_penalty=penalty) for p in batch]


def test_the_penalty_weakens_either_sign(model, batch):
    logits = torch.tensor([[2.0, -2.0, 0.0]])
    want = RepetitionPenaltyLogitsProcessor(1.4)(torch.arange(3)[None], logits.clone())
    assert torch.equal(generate_module._weaken(logits, 1.4), want)
    free, weak = (
        generate(model, batch, NO_DROP, max_new_tokens=12, repetition_penalty=penalty).tokens
        for penalty in (1.0, 1.4)
    )
    assert free != weak


def test_answers_of_a_batch_end_on_their_own(model, batch):
    whole = generate(model, batch, PLAN, max_new_tokens=20).tokens
    assert [len(ids) for ids in whole] == [20] * len(batch)
    eos = {whole[0][4], whole[1][9]}
    ends = [next((i for i, t in enumerate(ids) if t in eos), 20) for ids in whole]
    assert len(set(ends)) > 1
    cut = generate(model, batch, PLAN, max_new_tokens=20, eos_ids=list(eos)).tokens
    assert cut == [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    for prompt, ids in zip(batch, cut, strict=True):
        assert generate(model, [prompt], PLAN, max_new_tokens=20, eos_ids=eos).tokens == [ids]


def test_generation_stops_when_every_answer_has_ended(model, batch, monkeypatch):
    first = [ids[0] for ids in generate(model, batch, PLAN, max_new_tokens=1).tokens]
    monkeypatch.setattr(type(model), "decode", lambda *a: pytest.fail("decoded after the end"))
    assert generate(model, batch, PLAN, eos_ids=first).tokens == [[], [], [], []]
    assert generate(model, batch, PLAN, max_new_tokens=1).tokens == [[t] for t in first]


def test_a_seed_repeats_a_drawn_answer(model, batch):
    def drawn(seed):
        options = {"temperature": 1.5, "top_p": 0.95, "max_new_tokens": 8}
        return generate(model, batch, PLAN, seed=seed, **options).tokens

    torch.manual_seed(1)
    first = drawn(seed=3)
    state = torch.get_rng_state()
    assert drawn(seed=3) == first
    assert drawn(seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_smallest_top_p_is_greedy(model, batch):
    greedy = generate(model, batch, PLAN, max_new_tokens=6).tokens
    options = {"temperature": 2.0, "top_p": 1e-6, "max_new_tokens": 6}
    assert generate(model, batch, PLAN, **options).tokens == greedy


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9, 1.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    warped = TopPLogitsWarper(top_p)(None, logits[None] / 0.7) if top_p < 1 else logits[None] / 0.7
    want = warped.softmax(-1)[0]
    draw = torch.Generator().manual_seed(0)
    tokens = generate_module._choose(logits.expand(20_000, -1), 0.7, top_p, draw)
    got = tokens.bincount(minlength=5) / len(tokens)
    assert torch.equal(got == 0, want == 0)
    assert (got - want).abs().max() < 0.02


def test_a_prompt_beyond_the_model_is_run_whole_with_a_warning(batch):
    short = make(replace(SMALL, max_positions=52), torch.float32)
    long = make(replace(SMALL, max_positions=1000), torch.float32)
    with pytest.warns(UserWarning, match="take 53 positions, the model was made for 52"):
        tokens = generate(short, batch[:1], NO_DROP, max_new_tokens=5).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(short, batch[:1], NO_DROP, max_new_tokens=4)
        assert generate(long, batch[:1], NO_DROP, max_new_tokens=5).tokens == tokens


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_an_option_out_of_range_is_named(model, option, value):
    with pytest.raises(UserError, match=f"{option} must be .* got {value}"):
        generate(model, [Prompt([], None, [1])], NO_DROP, **{option: value})
