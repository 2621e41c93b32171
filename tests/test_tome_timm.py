"""Merging in timm's towers against the paper's equations."""

import pytest
import tome_towers as towers
import torch

from hico_kernels import tome
from hico_kernels.tome import UnsupportedModel


def imported():
    """timm, also where torchvision was built for CUDA and torch was not: its operators are missing
    then, and it registers shape rules for two of them all the same.
    """
    try:
        return pytest.importorskip("timm"), None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return pytest.importorskip("timm"), library


timm, _library = imported()  # the operators live as long as it

from test_tome import blocks_of, check, equal, refused  # noqa: E402  some models need torchvision
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    VisionTransformer,
)

SIZE = {
    "img_size": 24,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 7,
}


def of(kind, **settings):
    return lambda: kind(**{**SIZE, **settings})


def wide():
    return {"x": torch.randn(2, 3, 20, 28)}


def picture():
    return {"x": torch.randn(2, 3, 24, 24)}


def tower_of(make, prefix, inputs=picture):
    return towers.Tower(make, inputs, prefix)


ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "global_pool": "token"}
TIMM = {
    "vit": tower_of(of(VisionTransformer, qk_norm=True), 1),
    "deit": tower_of(of(VisionTransformerDistilled), 2),
    "deit3": tower_of(of(VisionTransformer, no_embed_class=True, init_values=0.3), 1),
    "dinov2": tower_of(
        of(VisionTransformer, reg_tokens=4, no_embed_class=True, init_values=0.3), 5
    ),
    "clip": tower_of(of(VisionTransformer, pre_norm=True), 1),
    "siglip": tower_of(of(VisionTransformer, class_token=False, global_pool="map"), 0),
    "mean": tower_of(of(VisionTransformer, class_token=False, global_pool="avg"), 0),
    "eva02": tower_of(
        of(
            Eva,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(4, 4),
        ),
        1,
    ),
    "dinov3": tower_of(
        of(
            Eva,
            **ROPE,
            dynamic_img_size=True,
            init_values=0.3,
            rope_type="dinov3",
            rope_rotate_half=True,
            num_reg_tokens=4,
        ),
        5,
        wide,
    ),
    "mixed": tower_of(of(Eva, **ROPE, attn_type="rope", rope_type="mixed", init_values=0.3), 1),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("r", "order"), [(4, "spatial"), (100, "spatial"), (5, "matching")])
def test_merging_r_pairs_is_what_the_equations_say(name, r, order):
    kind = TIMM[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    handle = tome.patch(tower, r=r, order=order)
    seen = check(tower, kind, inputs, r, handle, order=order)
    features = tower.forward_features(inputs["x"])
    assert torch.equal(features, tower.norm(seen["tokens"]))
    assert torch.equal(tower.forward_head(features), seen["output"])


@pytest.mark.parametrize("name", TIMM)
def test_r_0_and_remove_leave_every_bit_as_it_was(name):
    kind = TIMM[name]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    run = lambda: [tower(**inputs), tower.forward_features(inputs["x"])]  # noqa: E731
    state = {**tower.__dict__}, [{**m.__dict__} for m in tower.modules()]
    stock = run()
    nothing = tome.patch(tower, r=0)
    assert equal(run(), stock)
    nothing.remove()
    merging = tome.patch(tower, r=4)
    assert not equal(run()[:1], stock[:1])
    merging.remove()
    assert equal(run(), stock)
    assert state == ({**tower.__dict__}, [{**m.__dict__} for m in tower.modules()])


@pytest.mark.parametrize(
    "tokens",
    [{"class_token": False}, {"reg_tokens": 3}, {"reg_tokens": 3, "pool_include_prefix": True}],
    ids=["no-class", "registers", "registers-pooled"],
)
@pytest.mark.parametrize("pool", ["map", "avg", "avgmax"])
@torch.no_grad()
def test_equal_patches_merge_without_a_trace(tokens, pool):
    without_a_trace(of(VisionTransformer, global_pool=pool, no_embed_class=True, **tokens))


@pytest.mark.parametrize("tokens", [{"class_token": False}, {"num_reg_tokens": 3}], ids=str)
@pytest.mark.parametrize("pool", ["map", "avg", "avgmax"])
@torch.no_grad()
def test_equal_patches_merge_without_a_trace_in_eva(tokens, pool):
    without_a_trace(of(Eva, global_pool=pool, no_embed_class=True, init_values=0.3, **tokens))


def without_a_trace(make):
    """A tower that sees no positions; pictures whose patches are of two kinds."""
    tower = towers.tower(tower_of(make, 0))
    tower.pos_embed.zero_()
    colours = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    picture = torch.where(torch.arange(24)[:, None] < 20, *colours).expand(1, 3, 24, 24)
    dense = tower(picture)
    handle = tome.patch(tower, r=5)
    torch.testing.assert_close(tower(picture), dense)
    handle.remove()
    handle = tome.patch(tower, r=5, prop_attn=False)
    assert (tower(picture) - dense).abs().max() > 1e-3


def test_feature_maps_are_refused():
    tower, inputs = towers.tower(TIMM["vit"]), towers.inputs(TIMM["vit"])
    handle = tome.patch(tower, r=4)
    with pytest.raises(ValueError, match="output_fmt must be 'NLC' in a patched tower"):
        tower.forward_intermediates(inputs["x"])
    states = tower.forward_intermediates(inputs["x"], output_fmt="NLC", intermediates_only=True)
    assert [x.shape[1] for x in states] == [32, 28, 24]
    handle.remove()
    assert tower.forward_intermediates(inputs["x"])[1][0].shape == (2, 32, 6, 6)


def test_blocks_that_are_not_known_are_refused():
    refused(of(VisionTransformer, block_fn=ParallelScalingBlock)(), "must be Block, got Parallel")
    refused(of(Eva, use_post_norm=True)(), "its blocks must be EvaBlock, got EvaBlockPostNorm")
    refused(timm.create_model("resnet18"), "cannot patch ResNet: the supported towers are")
    refused(
        of(VisionTransformer, class_token=False, global_pool="prr")(),
        "its pooling must be AttentionPoolLatent, got AttentionPoolPrr",
    )


def test_attention_that_calls_twice_is_refused():
    tower = of(VisionTransformer, attn_layer="diff")()
    tome.patch(tower, r=4)
    with pytest.raises(UnsupportedModel, match="DiffAttention called torch's scaled_dot_product"):
        tower(torch.randn(1, 3, 24, 24))


def test_unfused_attention_is_refused():
    tower = of(VisionTransformer)()
    blocks_of(tower)[1].attn.fused_attn = False
    refused(tower, "its attention must be fused")


def test_gradient_checkpointing_is_refused():
    tower = of(VisionTransformer)()
    tower.set_grad_checkpointing()
    tome.patch(tower, r=4)
    with pytest.raises(ValueError, match="gradient checkpointing with merging is not supported"):
        tower(torch.randn(1, 3, 24, 24))
