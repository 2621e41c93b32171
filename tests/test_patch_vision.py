"""Vision towers that attend to all frames in one call: a call for each block, the same numbers."""

import patch_models as tiny
import pytest
import torch
from torch.nn import functional as F

import hico_kernels
from hico_kernels import DropPlan, Uniform, UnsupportedModel
from hico_kernels.patch import vision
from hico_kernels.testing.budget import assert_within_budget

pytestmark = pytest.mark.skipif(
    tiny.VERSION < (5, 4), reason="towers know flash attention by its exact name"
)
TOWERS = [n for n in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3")]
TOWERS = [name for name in TOWERS if name in tiny.MODELS]
every_tower = pytest.mark.parametrize("name", TOWERS)


@pytest.fixture
def calls(monkeypatch):
    """How often a frame, or all of them, were attended to."""
    seen = {"sdpa": 0, "ragged": 0}
    stock, ours = F.scaled_dot_product_attention, vision.ragged_attention

    def count(name, function):
        def counting(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return counting

    monkeypatch.setattr(F, "scaled_dot_product_attention", count("sdpa", stock))
    monkeypatch.setattr(vision, "ragged_attention", count("ragged", ours))
    return seen


@torch.no_grad()
def test_a_tower_of_two_blocks_attends_to_2048_frames_in_two_calls(calls):
    """Row 15: with sdpa it is one call for every frame in every block."""
    config = tiny.fresh("qwen2_vl").config.vision_config
    config.depth = 2
    tower = type(tiny.fresh("qwen2_vl").model.visual)(config).eval()
    config._attn_implementation = "sdpa"
    frames = {"hidden_states": torch.randn(2048 * 4, 96), "grid_thw": torch.tensor([[2048, 2, 2]])}
    want = tower(**frames).pooler_output
    assert calls == {"sdpa": 2 * 2048, "ragged": 0}
    handle = hico_kernels.patch.vision_attention(tower)
    got = tower(**frames).pooler_output
    assert calls == {"sdpa": 2 * 2048, "ragged": 2}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    handle.remove()
    tower(**frames)
    assert calls == {"sdpa": 4 * 2048, "ragged": 2}


@every_tower
@torch.no_grad()
def test_the_answer_is_that_of_one_frame_after_the_other(name, calls):
    model, inputs = tiny.fresh(name), tiny.prompt(name, (0, 3))
    want = model(**inputs).logits
    handle = hico_kernels.patch.vision_attention(model)
    got = model(**inputs).logits
    assert calls["ragged"] > 0
    assert (got - want).abs().max() < 1e-12
    handle.remove()
    handle.remove()  # harmless
    assert torch.equal(model(**inputs).logits, want)


@every_tower
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_error_is_within_the_budget(name, dtype):
    model, inputs = tiny.fresh(name), tiny.prompt(name)
    exact = model(**inputs).logits
    model.to(dtype)
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    stock = model(**inputs).logits
    handle = hico_kernels.patch.vision_attention(model)
    assert_within_budget(model(**inputs).logits, exact, stock, name)
    handle.remove()


def test_it_goes_together_with_a_plan_and_with_training(calls):
    model, inputs = tiny.fresh("qwen2_5_vl"), tiny.prompt("qwen2_5_vl", (0, 3))

    def gradients():
        model.zero_grad()
        with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})):
            model(**inputs).logits.sum().backward()
        return [w.grad.clone() for w in model.model.visual.parameters()]

    want = gradients()
    assert calls["ragged"] == 0
    hico_kernels.patch.vision_attention(model)
    got = gradients()
    assert calls["ragged"] == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_what_cannot_is_refused():
    with pytest.raises(UnsupportedModel, match=r"LlavaOnevision.* has no vision tower that splits"):
        hico_kernels.patch.vision_attention(tiny.model("llava_onevision"))
    model = tiny.fresh("qwen2_vl", attention="eager")
    with pytest.raises(UnsupportedModel, match="the vision tower must be sdpa, got 'eager'"):
        hico_kernels.patch.vision_attention(model)
    model = tiny.fresh("qwen2_vl")
    hico_kernels.patch.vision_attention(model)
    with pytest.raises(UnsupportedModel, match="must be sdpa, got 'hico_flash_varlen'"):
        hico_kernels.patch.vision_attention(model)


def test_a_handle_leaves_another_attention_alone():
    model = tiny.fresh("qwen2_vl")
    handle = hico_kernels.patch.vision_attention(model)
    model.model.visual.config._attn_implementation = "eager"
    handle.remove()
    assert model.model.visual.config._attn_implementation == "eager"
