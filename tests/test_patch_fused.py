"""What a drop asks of fused operations: tables go with the hidden states that stay, and keys are
turned while they are read.
"""

import patch_models as tiny
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.patch import PreLLM, scores
from hico_kernels.patch.families import take_apart
from hico_kernels.patch.rows import Rows
from hico_kernels.patch.scores import probe_config, text_scores, turns_halves

MULTI_AXIS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OTHERS = ("internvl", "internvl-qwen3", "llava_next_video", "llava_onevision", "gemma3", "smolvlm")
TURNED = [
    name for name in (*MULTI_AXIS, *OTHERS) if tiny.VERSION >= (5, 18) or "qwen2_" not in name
]
ASKING, LENGTHS = torch.tensor([8, 17]), [9, 7]
SLOTS = torch.cat([torch.arange(9), torch.arange(11, 18)])  # of [2, 9]; two are padding


def given(name, dtype=torch.float64):
    """Arguments of `text_scores` for the first layer, but for which token asks, and what it hears.

    The positions of the second sequence are others than those of the first.
    """
    model = tiny.model(name, dtype)
    decoder = tiny.decoder(model)
    torch.manual_seed(1)
    hidden = torch.randn(2, 9, decoder.config.hidden_size, dtype=dtype)
    places = torch.stack([torch.arange(9), torch.arange(20, 29)])
    if take_apart(model).family.multi_axis:
        places = places + torch.tensor([0, 3, 7])[:, None, None]
    if tiny.VERSION >= (5, 0) and name == "gemma3":
        tables = decoder.rotary_emb(hidden, places, "sliding_attention")
    else:
        tables = decoder.rotary_emb(hidden, places)
    return decoder.layers[0], hidden, tables, probe_config(decoder.config)


def score(layer, hidden, tables, config, asking=ASKING, slots=SLOTS, lengths=LENGTHS):
    return text_scores(layer, hidden, tables, asking, slots, lengths, config)


@pytest.fixture
def as_attended(monkeypatch):
    """Scores of the queries and keys that the layer's own code makes."""

    def run(*arguments, **more):
        with monkeypatch.context() as patch:
            patch.setattr(scores, "turns_halves", lambda attention, table: False)
            return score(*arguments, **more)

    return run


@pytest.mark.parametrize("name", TURNED)
def test_scores_are_those_of_the_layers_own_queries_and_keys(name, as_attended, monkeypatch):
    layer, hidden, tables, config = given(name)
    want = as_attended(layer, hidden, tables, config)
    monkeypatch.setattr(scores, "attention_inputs", None)  # not asked
    got = score(layer, hidden, tables, config)
    assert want.std() > 1e-3  # they differ among tokens
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl-qwen3"])
def test_a_whole_batch_with_one_table_for_all_rows(name, as_attended):
    layer, hidden, tables, config = given(name)
    tables = tuple(table[:1] for table in tables)
    every = {"slots": torch.arange(18), "lengths": [9, 9]}
    want = as_attended(layer, hidden, tables, config, **every)
    got = score(layer, hidden, tables, config, **every)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl-qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name, dtype, as_attended):
    """Within the rounding of queries and keys: the layer's own code rounds keys three times."""
    layer, hidden, tables, config = given(name, torch.float32)
    want = score(layer, hidden, tables, config)
    with torch.autocast("cpu", dtype):
        mixed = score(layer, hidden, tables, config), as_attended(layer, hidden, tables, config)
    layer, hidden, tables, config = given(name, dtype)
    half = score(layer, hidden, tables, config), as_attended(layer, hidden, tables, config)
    for got, own in (mixed, half):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 2 * (own - want).abs().max() + torch.finfo(dtype).eps


def test_rotary_positions_of_another_kind_are_left_to_the_layer():
    """GLM-4V turns neighbours in a head, before 5.18 Qwen2-VL's tables have an axis more."""
    layer, _, (cos, _), _ = given("glm4v")
    assert not turns_halves(layer.self_attn, cos)
    layer, _, (cos, _), _ = given("qwen3_vl")
    assert turns_halves(layer.self_attn, cos)
    assert not turns_halves(layer.self_attn, cos.expand(3, -1, -1, -1))
    assert not turns_halves(layer.self_attn, cos[..., :4])  # a part of each head
    own = type(layer.self_attn)
    look_alike = type(own.__name__, (own,), {"__module__": "mine"})
    layer.self_attn.__class__ = look_alike
    try:
        assert not turns_halves(layer.self_attn, cos)
    finally:
        layer.self_attn.__class__ = own


class Gathers(TorchDispatchMode):
    """How many floating tensors every operation took that picks rows of matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        picks = any(part in name for part in ("gather", "aten.index.", "index_select"))
        if picks and args[0].is_floating_point() and args[0].dim() > 1:
            more = args[2] if "gather_many" in name else ()
            self.seen.append((name.partition(".")[0], 1 + len(more)))
        return function(*args, **(kwargs or {}))


def picked(model, inputs, plan=None, rows="padded"):
    """What picks rows in the language model: all that a patch adds."""
    with torch.no_grad(), Gathers() as stock:
        model(**inputs, use_cache=False)
    with hico_kernels.compress(model, plan, rows), torch.no_grad(), Gathers() as ours:
        model(**inputs, use_cache=False)
    assert ours.seen[: len(stock.seen)] == stock.seen  # in the vision tower
    return ours.seen[len(stock.seen) :]


TABLES_TOO = ("hico", 3)  # hidden states, cosines and sines
BATCHES = {"one": ("padded", (0,)), "padded": ("padded", (0, 3)), "packed": ("packed", (0, 3))}


@pytest.mark.skipif(tiny.VERSION < (5, 18), reason="its tables have an axis more there")
@pytest.mark.parametrize(("rows", "padding"), BATCHES.values(), ids=BATCHES)
def test_a_drop_takes_rotary_tables_along(rows, padding):
    """One call for each drop. A scored one has another for what asks, and for the keys it hears."""
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl", padding)
    uniform = DropPlan({1: Uniform(0.75), 2: Uniform(0.5)})
    assert picked(model, inputs, uniform, rows) == [TABLES_TOO] * 2
    scored = DropPlan({1: Uniform(0.75), 2: TextTopK(0.5)})
    keys = [TABLES_TOO] * (rows == "padded" and len(padding) > 1)
    assert picked(model, inputs, scored, rows) == [TABLES_TOO] * 3 + keys


def test_tables_that_sequences_share_are_taken_behind_the_first_drop(monkeypatch):
    """Positions [1, q] of a batch of two: LLaVA's, without a cache."""
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 3))
    taken, stock = [], Rows.table
    monkeypatch.setattr(Rows, "table", lambda self, t: taken.append(t.shape[0]) or stock(self, t))
    plan = DropPlan({1: Uniform(0.75), 2: Uniform(0.5), 3: Uniform(0.25)})
    with hico_kernels.compress(model, plan), torch.no_grad():
        model(**inputs, use_cache=False)
    assert taken == [1, 1]


def test_positions_without_the_gaps_of_merging_are_turned_to_tables_once():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 3))
    plan, made = DropPlan({2: Uniform(0.5)}, pre_llm=PreLLM(4, per_frames=2)), []
    hook = tiny.decoder(model).rotary_emb.register_forward_hook(lambda *call: made.append(call))
    with hico_kernels.compress(model, plan), torch.no_grad():
        model(**inputs, use_cache=False)
    hook.remove()
    assert len(made) == 2  # the model's own, and these


def test_tables_that_were_taken_along_have_no_gradient():
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl")
    given = []
    layer = tiny.decoder(model).layers[3]
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.75), 3: Uniform(0.5)})):
        hook = layer.register_forward_pre_hook(
            lambda layer, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        model(**inputs, use_cache=False)
        hook.remove()
    ((args, kwargs),) = given
    assert (args[0] if args else kwargs["hidden_states"]).requires_grad
    assert not any(table.requires_grad for table in kwargs["position_embeddings"])
