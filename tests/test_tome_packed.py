"""Merging in towers of packed frames, which end in a patch merger, against the equations."""

from concurrent.futures import ThreadPoolExecutor
from copy import copy

import patch_models
import pytest
import tome_groups as reference
import tome_towers as towers
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import hico_kernels
from hico_kernels import tome
from hico_kernels.testing.budget import assert_within_budget
from hico_kernels.tome import UnsupportedModel
from hico_kernels.tome import attention as tome_attention

PACKED = towers.PACKED
WHOLE = [name for name in PACKED if name in patch_models.MODELS]
GROUPS = 60  # of the pictures of `towers.GRIDS`: 16, 16, 12 and 16 in a frame


def made(name):
    return towers.tower(PACKED[name]), towers.inputs(PACKED[name])


def merging(tower):
    """Which blocks merge: in Qwen2.5-VL those with windows."""
    full = getattr(tower, "fullatt_block_indexes", ())
    return [i not in full for i in range(len(tower.blocks))]


def watched(tower, inputs):
    """A call: what enters the first block, what leaves every block, and what the tower gives."""
    seen = {"tables": [], "ends": [], "states": []}

    def before(module, args, kwargs):
        seen["tables"].append(kwargs["position_embeddings"])
        seen["ends"].append(kwargs["cu_seqlens"].tolist())
        seen.setdefault("x", args[0])

    hooks = [b.register_forward_pre_hook(before, with_kwargs=True) for b in tower.blocks]
    hooks += [
        b.register_forward_hook(lambda module, args, out: seen["states"].append(out))
        for b in tower.blocks
    ]
    seen["tokens"], seen["deepstack"] = given(tower(**inputs))
    for hook in hooks:
        hook.remove()
    return seen


def given(out):
    """Tokens for the language model, and for its first layers; transformers 4.57 gave only them."""
    if torch.is_tensor(out):
        return out, []
    if isinstance(out, tuple):
        return out
    return out.pooler_output, getattr(out, "deepstack_features", None) or []


def spread(groups, merger):
    """Every group at first gets the token of the group it went into."""
    tokens = merger(torch.cat([g.x for g in groups]))
    into = {m: i for i, g in enumerate(groups) for m in g.members}
    return torch.stack([tokens[into[m]] for m in range(len(into))])


def in_order(tower, tokens, inputs):
    """Qwen2.5-VL brings tokens of windows back in the order of the picture."""
    if not hasattr(tower, "fullatt_block_indexes"):
        return tokens
    order = []

    def after(module, args, out):
        order.append(torch.randn_like(out))
        return order[0]

    hook = tower.merger.register_forward_hook(after)
    back, _ = given(tower(**inputs))
    hook.remove()
    places = [int((order[0] == row).all(1).nonzero()) for row in back]
    return tokens[places]


def check(name, r, order="spatial", prop=True, inputs=None, **settings):
    """r: pairs of every block that merges, or one for all of them."""
    tower, pictures = made(name)
    inputs = inputs or pictures
    handle = tome.patch(tower, **(settings or {"r": r}), order=order, prop_attn=prop)
    seen = watched(tower, inputs)
    rs = iter(r if isinstance(r, list) else [r] * len(tower.blocks))
    pairs = [next(rs) if merges else 0 for merges in merging(tower)]
    states = reference.run(
        tower.blocks, seen["x"], 4, seen["ends"], seen["tables"], pairs, order=order, prop=prop
    )
    for got, groups in zip(seen["states"], states, strict=True):
        torch.testing.assert_close(got, torch.cat([g.x for g in groups]), rtol=1e-9, atol=1e-9)
    last = states[-1]
    assert handle.sizes.tolist() == [len(g.members) for g in last for _ in range(4)]
    members = [[4 * m + i for m in g.members] for g in last for i in range(4)]
    assert [(handle.assignment == j).nonzero()[:, 0].tolist() for j in range(len(members))] == (
        members
    )
    dense = handle.unmerge(seen["states"][-1])
    assert torch.equal(dense, seen["states"][-1][handle.assignment.long()])
    handle.remove()
    tokens = in_order(tower, spread(last, tower.merger), inputs)
    torch.testing.assert_close(seen["tokens"], tokens, rtol=1e-9, atol=1e-9)
    taps = getattr(tower, "deepstack_visual_indexes", [])
    assert len(seen["deepstack"]) == len(taps)
    for i, tap in enumerate(taps):
        want = spread(states[tap], tower.deepstack_merger_list[i])
        torch.testing.assert_close(seen["deepstack"][i], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("r", [1, 3, 100])
def test_merging_r_pairs_of_groups_is_what_the_equations_say(name, r):
    check(name, r)


@pytest.mark.parametrize("name", PACKED)
def test_the_order_of_the_matching_is_what_the_equations_say(name):
    check(name, 2, order="matching")


@pytest.mark.parametrize("name", PACKED)
def test_without_proportional_attention_every_token_counts_once(name):
    check(name, 2, prop=False)


@pytest.mark.parametrize(
    ("name", "pairs", "left"),
    [
        *((name, [3, 3, 2], 8 + 8 + 6 + 8) for name in PACKED if name != "qwen2_5_vl"),
        # Windows of 9, 3, 3, 1 keep 4, 1, 1, 1; 6 and 6: 3 each.
        ("qwen2_5_vl", None, 7 + 7 + 6 + 7),
    ],
)
def test_keep_says_what_the_last_block_leaves_of_each_sequence(name, pairs, left):
    tower, inputs = made(name)
    handle = tome.patch(tower, keep=0.5)
    tokens, _ = given(tower(**inputs))
    assert handle.sizes.shape == (4 * left,)
    assert tokens.shape[0] == GROUPS
    handle.remove()
    if pairs:
        one = {
            "hidden_states": inputs["hidden_states"][:128],
            "grid_thw": torch.tensor([[2, 8, 8]]),
        }
        check(name, pairs, inputs=one, keep=0.5)


def test_keep_that_halving_cannot_reach_raises():
    tower, inputs = made("qwen2_vl")
    tome.patch(tower, keep=0.1)
    with pytest.raises(ValueError, match=r"keep must be at least 1 / 2\*\*3 here"):
        tower(**inputs)


def everything(out):
    if torch.is_tensor(out):
        return [out]
    values = out if isinstance(out, tuple) else out.values()
    return [t for v in values for t in ([v] if torch.is_tensor(v) else v)]


def equal(a, b):
    assert len(a) == len(b) > 0
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_r_0_and_remove_leave_every_bit_as_it_was(name):
    tower, inputs = made(name)
    state = {**tower.__dict__}, [{**m.__dict__} for m in tower.modules()]
    stock = everything(tower(**inputs))
    for nothing in ({"r": 0}, {"keep": 1.0}):
        handle = tome.patch(tower, **nothing)
        assert equal(everything(tower(**inputs)), stock)
        handle.remove()
    merging = tome.patch(tower, r=4)
    assert not equal(everything(tower(**inputs))[-1:], stock[-1:])
    merging.remove()
    merging.remove()
    assert equal(everything(tower(**inputs)), stock)
    assert state == ({**tower.__dict__}, [{**m.__dict__} for m in tower.modules()])


@pytest.mark.parametrize("name", PACKED)
def test_gradients_are_those_of_the_equations(name):
    tower, inputs = made(name)
    tome.patch(tower, r=2)
    seen = watched(tower, inputs)
    pairs = [2 if merges else 0 for merges in merging(tower)]
    last = reference.run(tower.blocks, seen["x"], 4, seen["ends"], seen["tables"], pairs)[-1]
    wanted = torch.cat([g.x for g in last])
    weights = torch.randn_like(wanted)
    outputs = [(each * weights).sum() for each in (seen["states"][-1], wanted)]
    parameters = list(tower.blocks.parameters())
    mine, theirs = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in outputs)
    assert sum(bool(g.any()) for g in mine) == len(parameters)
    # Through the rotation, and the norms of Qwen2.5-VL, gradients are rounded to float32.
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def two_kinds(tower, which):
    """Pixels with groups of two kinds, in a tower that does not see where they are."""
    with torch.no_grad():
        tower.rotary_pos_emb.inv_freq.zero_()
        if hasattr(tower, "pos_embed"):
            tower.pos_embed.weight.zero_()
    kinds = torch.randn(2, 4, 96, dtype=torch.float64)
    return kinds[torch.tensor(which)].flatten(0, 1)


# By columns of `towers.GRIDS`: of one kind in every window of Qwen2.5-VL.
KINDS = [0, 0, 0, 1] * 8 + [0, 0, 0, 1, 1, 1] * 2 + [0, 0, 0, 1] * 4


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_equal_groups_merge_without_a_trace(name):
    tower, inputs = made(name)
    inputs["hidden_states"] = two_kinds(tower, KINDS)
    dense = given(tower(**inputs))
    handle = tome.patch(tower, r=1)
    merged = given(tower(**inputs))
    assert handle.sizes.max() > 2
    torch.testing.assert_close(merged, dense, rtol=1e-9, atol=1e-9)
    handle.remove()
    tome.patch(tower, r=1, prop_attn=False)
    assert (given(tower(**inputs))[0] - dense[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_merging_errs_no_more_than_the_tower_in_its_own_precision(name, dtype):
    """On several towers: all tokens of a kind are alike in square frames, and in the wide one."""
    found = []
    for seed in range(8):
        tower = towers.tower(PACKED[name], seed)
        inputs = towers.inputs(PACKED[name], seed)
        pixels = two_kinds(tower, KINDS)
        exact, _ = given(tower(pixels, inputs["grid_thw"]))
        tower.to(dtype)
        plain, _ = given(tower(pixels.to(dtype), inputs["grid_thw"]))
        tome.patch(tower, r=1)
        merged, _ = given(tower(pixels.to(dtype), inputs["grid_thw"]))
        found.append(torch.stack([merged.double(), exact, plain.double()])[:, [0, 3, 32, 35]])
    merged, exact, plain = torch.cat(found, dim=1)
    assert_within_budget(merged.to(dtype), exact, plain.to(dtype), "tokens")


class Counting(TorchFunctionMode):
    """How often torch's attention is called."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            self.calls.append("one")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_block_attends_in_one_call(name, monkeypatch):
    tower, inputs = made(name)
    calls = []
    run = tome_attention.ragged_attention
    monkeypatch.setattr(
        tome_attention,
        "ragged_attention",
        lambda q, *a, **k: calls.append("packed") or run(q, *a, **k),
    )
    tome.patch(tower, r=2)
    with Counting(calls):
        tower(**inputs)
    first = merging(tower).index(True)  # blocks in front of it are as they were: a call a frame
    assert calls == ["one"] * 4 * first + ["packed"] * (len(tower.blocks) - first)


@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_model_generates(family):
    """The language model has a token for every placeholder; only the tower does less."""
    model, inputs = patch_models.fresh(family), patch_models.prompt(family, (0, 3))
    stock = patch_models.generate(model, inputs)
    handle = tome.patch(model.model.visual, keep=0.5)
    merged = patch_models.generate(model, inputs)
    assert merged.sequences.shape == stock.sequences.shape
    assert not torch.equal(merged.logits[0], stock.logits[0])
    assert handle.sizes.shape == (len(inputs["pixel_values_videos"]) // 2,)
    handle.remove()
    again = patch_models.generate(model, inputs)
    assert patch_models.difference(again, stock) == 0


@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_model_does_not_see_equal_groups_merge(family):
    model, inputs = patch_models.fresh(family), patch_models.prompt(family)
    name = "pixel_values_videos"
    inputs[name] = two_kinds(model.model.visual, [0, 0, 0, 0, 0, 1] + [1] * 6)
    stock = patch_models.generate(model, inputs)
    handle = tome.patch(model.model.visual, r=1)
    merged = patch_models.generate(model, inputs)
    assert handle.sizes.max() > 1
    assert patch_models.difference(merged, stock) < 1e-9


@pytest.mark.parametrize("family", WHOLE)
def test_tokens_can_be_dropped_behind_a_merging_tower(family):
    """What the language model drops is counted in placeholders: it is the same for both."""
    model, inputs = patch_models.fresh(family), patch_models.prompt(family, (0, 3))
    plan = hico_kernels.DropPlan({1: hico_kernels.Uniform(keep=0.5)})
    tower = tome.patch(model.model.visual, keep=0.5)
    with hico_kernels.compress(model, plan) as handle:
        got = patch_models.generate(model, inputs)
    want = patch_models.reference(model, handle, inputs)
    assert patch_models.difference(got, want) < 1e-9
    assert tower.sizes.max() > 1


@pytest.mark.parametrize("family", WHOLE)
def test_clips_can_merge_behind_a_merging_tower(family):
    """They see what the tower gives, and nothing else of it."""
    model, inputs = patch_models.fresh(family), patch_models.prompt(family, (0, 3))
    plan, gave = hico_kernels.PreLLM(merge_to=3, per_frames=2), []
    tower = tome.patch(model.model.visual, keep=0.5)
    model.model.visual.register_forward_hook(lambda *call: gave.append(copy(call[-1])))
    with hico_kernels.compress(model, plan):
        got = patch_models.generate(model, inputs)
    assert tower.sizes.max() > 1
    assert len(gave) == 1
    tower.remove()
    model.model.visual.register_forward_hook(lambda *call: copy(gave[0]))
    with hico_kernels.compress(model, plan):
        want = patch_models.generate(model, inputs)
    assert patch_models.difference(got, want) == 0


@pytest.mark.skipif(patch_models.VERSION < (5, 18), reason="as for other towers: see docs/tome.md")
@torch.no_grad()
def test_a_compiled_tower_gives_the_same():
    tower, inputs = made("qwen3_vl")
    handle = tome.patch(tower, r=2)
    want, sizes = everything(tower(**inputs)), handle.sizes
    torch._dynamo.reset()
    got = everything(torch.compile(tower, backend="eager")(**inputs))
    assert torch.equal(handle.sizes, sizes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_merger_that_is_called_by_itself_is_left_alone():
    tower, inputs = made("qwen3_vl")
    x = torch.randn(40, 32, dtype=torch.float64)
    alone = tower.merger(x)
    tome.patch(tower, r=3)
    assert torch.equal(tower.merger(x), alone)
    tower(**inputs)
    assert torch.equal(tower.merger(x), alone)


def test_a_failed_call_leaves_nothing_behind():
    tower, inputs = made("qwen3_vl")
    tome.patch(tower, r=3)
    expected = everything(tower(**inputs))
    broken = tower.blocks[1].norm2.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tower(**inputs)
    broken.remove()
    assert equal(everything(tower(**inputs)), expected)


def test_parts_of_groups_are_refused():
    tower, inputs = made("qwen2_vl")
    tome.patch(tower, r=2)

    def cut(module, args, kwargs):
        return args, {**kwargs, "cu_seqlens": torch.tensor([0, 66, 240], dtype=torch.int32)}

    tower.blocks[0].register_forward_pre_hook(cut, with_kwargs=True)
    with pytest.raises(ValueError, match=r"whole groups of 4 patches, 240 in all, got .*\[0, 66"):
        tower(**inputs)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (1, "blocks that merge attend in different sequences"),
        (3, "a block attends across sequences that merge"),
    ],
)
def test_other_sequences_are_refused(index, match):
    """Block 1 of this tower merges first, in windows; block 3 attends to whole frames."""
    tower, inputs = made("qwen2_5_vl")
    tome.patch(tower, r=2)
    ends = torch.tensor([0, 4, 240], dtype=torch.int32)

    def other(module, args, kwargs):
        return args, {**kwargs, "cu_seqlens": ends}

    tower.blocks[index + (index == 1)].register_forward_pre_hook(other, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match=match):
        tower(**inputs)


def test_blocks_called_out_of_turn_are_refused():
    tower, inputs = made("qwen2_vl")
    handle = tome.patch(tower, r=2)
    seen = watched(tower, inputs)
    with pytest.raises(UnsupportedModel, match="block 1 of Qwen2VisionTransformerPretrainedModel"):
        tower.blocks[1](seen["x"], cu_seqlens=torch.tensor([0, 240]))
    with pytest.raises(ValueError, match=r"x must be \[144, \.\.\.\], got \(240, 32\)"):
        handle.unmerge(seen["x"])


@pytest.mark.skipif(patch_models.VERSION < (5, 4), reason="vision_attention needs 5.4")
def test_the_other_way_to_attend_to_all_frames_at_once_is_refused():
    tower, inputs = made("qwen2_5_vl")
    stock = everything(tower(**inputs))
    other = hico_kernels.patch.vision_attention(tower)
    with pytest.raises(UnsupportedModel, match="must be 'sdpa', got 'hico_flash_varlen'"):
        tome.patch(tower, r=2)
    other.remove()
    handle = tome.patch(tower, r=2)
    other = hico_kernels.patch.vision_attention(tower)
    with pytest.raises(UnsupportedModel, match="must be 'sdpa', got 'hico_flash_varlen'"):
        tower(**inputs)
    other.remove()
    tower(**inputs)
    handle.remove()
    assert equal(everything(tower(**inputs)), stock)


def test_dropout_is_refused():
    tower, inputs = made("qwen2_vl")
    tower.blocks[0].attn.attention_dropout = 0.5
    tower.train()
    tome.patch(tower, r=2)
    with pytest.raises(ValueError, match=r"attention must have no dropout, got 0.5"):
        tower(**inputs)


def test_threads_do_not_mix():
    tower, _ = made("qwen3_vl")
    handle = tome.patch(tower, r=2)
    inputs = [towers.inputs(PACKED["qwen3_vl"], seed) for seed in range(4)]

    def work(own):
        return [x for _ in range(3) for x in everything(tower(**own))] + [handle.sizes]

    alone = [work(own) for own in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(work, inputs), alone, strict=True):
            assert equal(got, expected)
