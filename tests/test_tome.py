"""Merging in transformers' towers against the paper's equations."""

import copy
import inspect
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import patch_models
import pytest
import tome_reference as reference
import tome_towers as towers
import torch
import transformers
from torch import nn

from hico_kernels import tome
from hico_kernels.testing.budget import assert_within_budget
from hico_kernels.tome import UnsupportedModel

HF = towers.HF


def blocks_of(tower):
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return next(m for m in lists if len(m) == towers.SIZE["num_hidden_layers"])


def watched(tower, inputs):
    """A call: what enters the first block, what leaves the last, and the tower's output."""
    seen = {"tables": []}

    def before(module, args, kwargs):
        seen["tables"].append(kwargs.get("position_embeddings", kwargs.get("rope")))
        seen.setdefault("x", args[0] if args else kwargs.get("hidden_states"))

    def after(module, args, out):
        seen["tokens"] = out[0] if isinstance(out, tuple) else out

    blocks = blocks_of(tower)
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    seen["output"] = tower(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def real_tokens(inputs, i):
    mask = inputs.get("pixel_attention_mask")
    return slice(None) if mask is None else mask[i].bool()


def at_most_half(r, num_patches, layers=3):
    """What r comes to where a layer has fewer than 2 r patches."""
    pairs = []
    for _ in range(layers):
        pairs.append(min(r, num_patches // 2))
        num_patches -= pairs[-1]
    return pairs


def check(tower, kind, inputs, pairs, handle, order="spatial", prop=True):
    """What a patched tower gives is what the equations give. pairs: of every layer, or a limit."""
    seen = watched(tower, inputs)
    if isinstance(pairs, int):
        pairs = at_most_half(pairs, seen["x"].shape[1] - kind.prefix)
    for i, x in enumerate(seen["x"]):
        real = real_tokens(inputs, i)
        state = reference.run(
            blocks_of(tower),
            x[real],
            pairs,
            prefix=kind.prefix,
            tables=[towers.angles(each) for each in seen["tables"]],
            order=order,
            prop=prop,
        )
        left = handle.sizes[i] > 0
        assert handle.sizes[i][left].tolist() == [len(m) for m in state.members]
        assert [
            sorted((handle.assignment[i][real] == j).nonzero()[:, 0].tolist())
            for j in range(len(state.members))
        ] == state.members
        torch.testing.assert_close(seen["tokens"][i][left], state.x, rtol=1e-10, atol=1e-10)
    return seen


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("r", [1, 4, 100])
def test_merging_r_pairs_is_what_the_equations_say(name, r):
    kind = HF[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, r=r)
    seen = check(tower, kind, inputs, r, handle)
    assert towers.last(seen["output"]).shape[1] == handle.sizes.shape[1]


@pytest.mark.parametrize("name", HF)
def test_the_order_of_the_matching_is_what_the_equations_say(name):
    kind = HF[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    inputs.pop("pixel_attention_mask", None) is None or inputs.update(
        pixel_attention_mask=torch.ones(2, 36, dtype=torch.int64)
    )
    handle = tome.patch(tower, r=5, order="matching")
    check(tower, kind, inputs, 5, handle, order="matching")


@pytest.mark.parametrize("name", HF)
def test_without_proportional_attention_every_token_counts_once(name):
    kind = HF[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, r=5, prop_attn=False)
    check(tower, kind, inputs, 5, handle, prop=False)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1.0, [36] * 3), (0.5, [30, 24, 18]), (0.25, [27, 18, 9]), (0.14, [20, 10, 5])],
)
def test_keep_says_what_the_last_block_leaves(keep, left):
    kind = HF["siglip"]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, keep=keep)
    pairs = [a - b for a, b in zip([36, *left], left, strict=False)]
    seen = check(tower, kind, inputs, pairs, handle) if keep < 1 else watched(tower, inputs)
    assert seen["tokens"].shape[1] == left[-1]


def test_keep_that_halving_cannot_reach_raises():
    tower = towers.tower(HF["vit"])
    tome.patch(tower, keep=0.1)
    with pytest.raises(ValueError, match=r"keep must be at least 1 / 2\*\*3 here.* 36 to 3"):
        tower(**towers.inputs(HF["vit"]))


def everything(output):
    return [v for v in output.values() if torch.is_tensor(v)]


def equal(a, b):
    assert len(a) == len(b) > 0
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", HF)
def test_r_0_and_remove_leave_every_bit_as_it_was(name):
    kind = HF[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    state = {**tower.__dict__}, [{**m.__dict__} for m in tower.modules()]
    stock = everything(tower(**inputs))
    with_nothing = tome.patch(tower, r=0)
    assert equal(everything(tower(**inputs)), stock)
    with_nothing.remove()
    merging = tome.patch(tower, r=4)
    assert not equal(everything(tower(**inputs))[:1], stock[:1])
    merging.remove()
    merging.remove()
    assert equal(everything(tower(**inputs)), stock)
    assert state == ({**tower.__dict__}, [{**m.__dict__} for m in tower.modules()])


# The norms of "internvl_norms" compute in float32 whatever they are given.
@pytest.mark.parametrize("name", [name for name in HF if name != "internvl_norms"])
def test_gradients_are_those_of_the_equations(name):
    kind = HF[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    parameters = list(blocks_of(tower).parameters())
    handle = tome.patch(tower, r=4)
    seen = watched(tower, inputs)
    real, left = real_tokens(inputs, 1), handle.sizes[1] > 0
    state = reference.run(
        blocks_of(tower),
        seen["x"][1][real],
        [4] * 3,
        prefix=kind.prefix,
        tables=[towers.angles(each) for each in seen["tables"]],
    )
    weights = torch.randn_like(state.x)
    outputs = [(seen["tokens"][1][left] * weights).sum(), (state.x * weights).sum()]
    mine, theirs = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in outputs)
    assert sum(bool(g.any()) for g in mine) > 30
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def two_colours():
    """A SigLIP tower that sees no positions, and a picture with patches of two kinds."""
    tower = towers.tower(HF["siglip"])
    embeddings = next(m for m in tower.modules() if hasattr(m, "position_embedding"))
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
    colours = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    return tower, torch.where(torch.arange(24)[:, None] < 20, *colours).expand(1, 3, 24, 24)


def test_equal_patches_merge_without_a_trace():
    """Sizes count in attention and in the pooling head: then nothing is lost."""
    tower, picture = two_colours()
    dense = tower(picture)
    handle = tome.patch(tower, r=5)
    merged = tower(picture)
    assert merged.last_hidden_state.shape[1] == 21
    assert handle.sizes.max() > 2
    torch.testing.assert_close(handle.unmerge(merged.last_hidden_state), dense.last_hidden_state)
    torch.testing.assert_close(merged.pooler_output, dense.pooler_output)
    handle.remove()
    tome.patch(tower, r=5, prop_attn=False)
    assert (tower(picture).pooler_output - dense.pooler_output).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_merging_errs_no_more_than_the_tower_in_its_own_precision(dtype):
    tower, picture = two_colours()
    exact = tower(picture)
    tower.to(dtype)
    plain = tower(picture.to(dtype))
    handle = tome.patch(tower, r=5)
    merged = tower(picture.to(dtype))
    tokens = handle.unmerge(merged.last_hidden_state)
    assert_within_budget(tokens, exact.last_hidden_state, plain.last_hidden_state, "tokens")
    assert_within_budget(merged.pooler_output, exact.pooler_output, plain.pooler_output, "pooled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
@torch.no_grad()
def test_under_autocast_a_tower_merges_as_many(name, dtype):
    """The residual stream is float32 there, and what attention adds to it is not."""
    tower, inputs = towers.tower(HF[name]).float(), towers.inputs(HF[name])
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    tome.patch(tower, r=2)
    expected = towers.last(tower(**inputs))
    with torch.autocast("cpu", dtype):
        actual = towers.last(tower(**inputs))
    assert actual.shape == expected.shape
    assert actual.isfinite().all()


def test_padding_changes_nothing():
    kind = HF["siglip2"]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    for prop in (True, False):
        handle = tome.patch(tower, r=3, prop_attn=prop)
        both = tower(**inputs)
        sizes = handle.sizes
        assert sizes.sum(1).tolist() == [36, 20]
        alone = tower(**{name: x[1:, :20] for name, x in inputs.items()})
        left = sizes[1] > 0
        assert torch.equal(sizes[1][left], handle.sizes[0])
        assert torch.equal(left, torch.arange(27) < 11)  # padding stays behind
        torch.testing.assert_close(both.last_hidden_state[1][left], alone.last_hidden_state[0])
        torch.testing.assert_close(both.pooler_output[1], alone.pooler_output[0])
        handle.remove()


def test_unmerge_gives_a_dense_map():
    kind = HF["dinov2_registers"]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, keep=0.5)
    out = tower(**inputs).last_hidden_state
    dense = handle.unmerge(out)
    assert dense.shape == (2, 41, 32)
    assert torch.equal(dense[:, :5], out[:, :5])
    for i in range(2):
        assert all(torch.equal(dense[i, t], out[i, handle.assignment[i, t]]) for t in range(41))
    with pytest.raises(ValueError, match=re.escape("x must be [2, 23, ...], got (2, 22, 32)")):
        handle.unmerge(out[:, 1:])


def test_hidden_states_follow():
    tower = towers.tower(HF["clip"])
    tome.patch(tower, r=4)
    out = tower(**towers.inputs(HF["clip"]), output_hidden_states=True)
    assert [x.shape[1] for x in out.hidden_states] == [37, 33, 29, 25]


def test_two_towers_of_one_config_are_patched_apart():
    config = transformers.ViTConfig(**towers.SIZE)
    one, two, three = (transformers.ViTModel(config).eval() for _ in range(3))
    picture = torch.randn(2, 3, 24, 24)
    stock = three(picture).last_hidden_state
    tome.patch(one, r=2)
    tome.patch(two, keep=0.25, order="matching")
    shapes = [tower(picture).last_hidden_state.shape[1] for tower in (one, two, three)]
    assert shapes == [31, 10, 37]
    assert torch.equal(three(picture).last_hidden_state, stock)


def test_threads_do_not_mix():
    kind = HF["siglip2"]
    tower = towers.tower(kind)
    handle = tome.patch(tower, r=4)
    pictures = [towers.inputs(kind, seed) for seed in range(8)]

    def work(inputs):
        out = [tower(**inputs).last_hidden_state for _ in range(5)]
        return *out, handle.unmerge(out[0])

    alone = [work(inputs) for inputs in pictures]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(work, pictures), alone, strict=True):
            assert equal(got, expected)


@pytest.mark.skipif(
    patch_models.VERSION < (5, 18), reason="some make masks of ones when compiled: refused"
)
@pytest.mark.parametrize("name", ["vit", "siglip2", "dinov3"])
@torch.no_grad()
def test_a_compiled_tower_gives_the_same(name):
    tower, inputs = towers.tower(HF[name]), towers.inputs(HF[name])
    handle = tome.patch(tower, r=4)
    want, sizes = everything(tower(**inputs)), handle.sizes
    torch._dynamo.reset()
    got = everything(torch.compile(tower, backend="eager")(**inputs))
    assert torch.equal(handle.sizes, sizes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_failed_call_leaves_nothing_behind():
    kind = HF["vit"]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, r=4)
    expected = tower(**inputs).last_hidden_state
    broken = blocks_of(tower)[1].layernorm_after.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tower(**inputs)
    broken.remove()
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    attention = blocks_of(tower)[1].attention
    alone = attention(x)[0]  # not a block's question
    assert torch.equal(tower(**inputs).last_hidden_state, expected)
    handle.remove()
    assert torch.equal(attention(x)[0], alone)


def test_copies_are_refused_while_patched():
    tower = towers.tower(HF["vit"])
    handle = tome.patch(tower, r=4)
    with pytest.raises(TypeError, match="cannot be copied: remove"):
        copy.deepcopy(tower)
    with pytest.raises(TypeError, match="cannot be pickled: remove"):
        pickle.dumps(tower)
    assert not any("hico" in name or "ahead" in name for name in tower.state_dict())
    handle.remove()
    inputs = towers.inputs(HF["vit"])
    assert equal(everything(copy.deepcopy(tower)(**inputs)), everything(tower(**inputs)))
    pickle.dumps(tower)


def refused(tower, match, **settings):
    with pytest.raises(UnsupportedModel, match=match):
        tome.patch(tower, **(settings or {"r": 4}))


def test_a_second_patch_is_refused():
    tower = towers.tower(HF["vit"])
    handle = tome.patch(tower, r=4)
    refused(tower, "this ViTModel is patched already; remove")
    handle.remove()
    tome.patch(tower, r=4)


def test_what_is_not_known_is_refused():
    refused(nn.Linear(3, 3), "cannot patch Linear: the supported towers are transformers .ViTModel")
    config = transformers.ViTConfig(**towers.SIZE)
    refused(transformers.ViTForImageClassification(config), r"pass the vision tower in it, \.vit$")
    refused(type("ViTModel", (nn.Module,), {})(), "cannot patch ViTModel: the supported towers")
    strange = transformers.ViTModel(config)
    blocks_of(strange)[1] = nn.Identity()
    refused(strange, "its blocks must be ViTLayer, got Identity")
    qwen = patch_models.fresh("qwen2_5_vl")
    refused(qwen, r"pass the vision tower in it, \.(model\.)?visual$")
    missing = transformers.ViTModel(config)
    blocks_of(missing)[0].attention = None
    refused(missing, "cannot patch ViTLayer: it has no attention")


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "internvl"])
@torch.no_grad()
def test_a_model_that_counts_on_a_whole_grid_raises(family):
    model = patch_models.fresh(family)
    handle = tome.patch(model.model.vision_tower, keep=0.5)
    with pytest.raises((RuntimeError, ValueError)):
        model(**patch_models.prompt(family))
    assert handle.sizes.shape[1] in (8, 9)


def test_attention_that_is_not_fused_is_refused():
    config = transformers.ViTConfig(**towers.SIZE)
    tower = transformers.ViTModel._from_config(config, attn_implementation="eager")
    refused(tower, "attn_implementation must be 'sdpa', got 'eager'")
    tower.set_attn_implementation("sdpa")
    tome.patch(tower, r=4)
    tower.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="must be 'sdpa', got 'eager'"):
        tower(torch.randn(1, 3, 24, 24))


def test_gradient_checkpointing_is_refused():
    tower = towers.tower(HF["vit"]).train()
    tower.gradient_checkpointing_enable()
    tome.patch(tower, r=4)
    with pytest.raises(ValueError, match="gradient checkpointing with merging is not supported"):
        tower(**towers.inputs(HF["vit"]))


def test_masks_between_tokens_are_refused():
    tower = towers.tower(HF["dinov2"])
    if "attention_mask" not in inspect.signature(tower.forward).parameters:
        pytest.skip("this transformers has no tower with such masks")
    tome.patch(tower, r=4)
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[:, 30:] = 0
    with pytest.raises(ValueError, match="attention_mask: merged tokens cannot follow"):
        tower(**towers.inputs(HF["dinov2"]), attention_mask=mask)


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda block, x, mask: x[:, :-1], "did not use its attention as expected"),
        (lambda block, x, mask: asked(block, x, mask)[:, 1:], "did not use its attention"),
        (lambda block, x, mask: block.self_attn(x, mask)[0], "is not on the norm of its input"),
        (
            lambda block, x, mask: block.self_attn(block.layer_norm1(2 * x), mask)[0],
            "is not on the norm of its input",
        ),
        (lambda block, x, mask: asked(block, x, torch.ones(1)), "a block changes attention_mask"),
        (
            lambda block, x, mask: asked(block, x, mask) + asked(block, x, mask),
            "asks for attention more than once",
        ),
    ],
)
def test_a_block_that_does_otherwise_is_refused(forward, match, monkeypatch):
    tower = towers.tower(HF["clip"])
    block = blocks_of(tower)[1]

    def other(self, hidden_states, attention_mask=None, causal_attention_mask=None, **more):
        return forward(self, hidden_states, attention_mask)

    monkeypatch.setattr(type(block), "forward", other)
    tome.patch(tower, r=4)
    with pytest.raises(UnsupportedModel, match=match):
        tower(**towers.inputs(HF["clip"]))


def asked(block, x, mask):
    return block.self_attn(block.layer_norm1(x), mask)[0]


def test_attention_without_the_fused_call_is_refused(monkeypatch):
    tower = towers.tower(HF["vit"])
    attention = blocks_of(tower)[1].attention
    monkeypatch.setattr(type(attention), "forward", lambda self, x, mask=None: (x, None))
    tome.patch(tower, r=4)
    with pytest.raises(UnsupportedModel, match=r"ViTAttention called torch's .* 0 times"):
        tower(**towers.inputs(HF["vit"]))


def test_blocks_called_out_of_turn_are_refused():
    tower = towers.tower(HF["vit"])
    tome.patch(tower, r=4)
    tower(**towers.inputs(HF["vit"]))
    with pytest.raises(UnsupportedModel, match="block 1 of ViTModel was not called with the out"):
        blocks_of(tower)[1](torch.randn(2, 37, 32, dtype=torch.float64))


def test_someone_elses_forward_is_given_back():
    tower = towers.tower(HF["vit"])
    inputs = towers.inputs(HF["vit"])
    attention = blocks_of(tower)[0].attention
    calls, original = [], attention.forward
    attention.forward = wrapped = lambda *a, **k: calls.append(1) or original(*a, **k)
    handle = tome.patch(tower, r=4)
    tower(**inputs)
    assert calls == [1]
    handle.remove()
    assert attention.forward is wrapped


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({}, ValueError, "give either r or keep, got r=None and keep=None"),
        ({"r": 4, "keep": 0.5}, ValueError, "give either r or keep, got r=4 and keep=0.5"),
        ({"r": -1}, ValueError, "r must be at least 0, got -1"),
        ({"r": 0.5}, TypeError, "r must be an int, got 0.5"),
        ({"r": True}, TypeError, "r must be an int, got True"),
        ({"keep": 0}, ValueError, r"keep must be in \(0, 1\], got 0"),
        ({"keep": 1.5}, ValueError, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": "all"}, TypeError, r"keep must be a ratio \(float\), got 'all'"),
        ({"r": 4, "prop_attn": 1}, TypeError, "prop_attn"),
        ({"r": 4, "order": "raster"}, ValueError, "order must be 'spatial' or 'matching'"),
    ],
)
def test_arguments_are_checked(settings, error, match):
    with pytest.raises(error, match=match):
        tome.patch(towers.tower(HF["vit"]), **settings)
    with pytest.raises(TypeError, match=r"vision_tower must be a torch.nn.Module, got str"):
        tome.patch("vit", r=4)


def test_before_the_first_call_there_is_nothing_to_tell():
    handle = tome.patch(towers.tower(HF["vit"]), r=4)
    for ask in (lambda: handle.sizes, lambda: handle.assignment, lambda: handle.unmerge(None)):
        with pytest.raises(RuntimeError, match="has not run on this thread yet"):
            ask()
