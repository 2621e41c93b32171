"""Plans that count per frame, and plans from papers."""

import patch_models as tiny
import pytest
import torch

import hico_kernels
from hico_kernels import DropPlan, PerFrame, TextTopK, Uniform, presets
from hico_kernels.patch.families import take_apart
from hico_kernels.patch.frames import frames

PLAN = DropPlan({1: Uniform(PerFrame(3)), 3: TextTopK(PerFrame(1))})
# Of 12 or 13 visual tokens. Qwen's videos of 4 pictures are 2 frames; its other "frames" are 3.
FRAMES = dict.fromkeys(tiny.MODELS, 3) | dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], 2)
FRAMES |= {"glm4v": 2, "qwen3_5": 2, "qwen3_5_moe": 2}


def run(name, inputs, plan=PLAN):
    with hico_kernels.compress(tiny.model(name), plan) as handle, torch.no_grad():
        tiny.model(name)(**inputs)
    return handle.report().visual


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_number_per_frame_is_that_of_the_frames_the_language_model_sees(name):
    frames = FRAMES[name]
    for padding in ((0,), (0, 3)):
        visual = run(name, tiny.prompt(name, padding))
        assert visual[1] == [3 * frames] * len(padding)
        assert visual[3] == [frames] * len(padding)


def test_videos_of_different_sizes_belong_to_the_sequences_whose_tokens_they_fill():
    inputs = tiny.prompt("qwen2_vl", (0, 0))
    # as many tokens, in 2 frames of 6 and in 6 frames of 2
    inputs["video_grid_thw"] = torch.tensor([[2, 4, 6], [6, 2, 4]])
    assert run("qwen2_vl", inputs)[1:] == [[6, 12], [6, 12], [2, 6]]
    # a first sequence without video
    inputs["video_grid_thw"] = inputs["video_grid_thw"][1:]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][48:]
    inputs["input_ids"][0, 4:16] = 5
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][0] = 0
    assert run("qwen2_vl", inputs)[3] == [0, 6]


@pytest.mark.skipif("video_llama_3" not in tiny.MODELS, reason="not in this transformers")
def test_tokens_that_a_model_takes_out_itself_are_not_counted():
    inputs = tiny.prompt("video_llama_3", (0, 0))
    gone = torch.tensor([1, 2, 3, 4, 5, 16])  # of the first video's tokens, and of the second's
    inputs["video_compression_mask"][gone] = False
    ids = inputs["input_ids"]
    ids[0, 4:9], ids[1, 4:5] = 5, 5
    assert run("video_llama_3", inputs)[3] == [3, 3]


def test_empty_images_that_fill_up_a_batch_are_no_frames():
    inputs = tiny.prompt("smolvlm", (0, 0))
    inputs["pixel_values"][1, 1:] = 0
    inputs["input_ids"][1, 9:18] = 5
    assert run("smolvlm", inputs)[3] == [3, 1]


def test_in_one_sequence_all_frames_are_its_own():
    """Images and videos of GLM-4V have one placeholder; images of LLaVA various numbers of tiles.

    In a batch neither tells which are whose.
    """
    parts = take_apart(tiny.model("glm4v"))
    mixed = {
        "input_ids": torch.full((1, 18), tiny.IMAGE),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }
    assert frames(parts, mixed, torch.ones(1, 18, dtype=torch.bool)) == [3]
    parts = take_apart(tiny.model("llava_onevision"))
    tiles = {
        "input_ids": torch.full((1, 30), tiny.IMAGE),
        "pixel_values": torch.zeros(2, 5, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16], [32, 16]]),
    }
    assert frames(parts, tiles, torch.ones(1, 30, dtype=torch.bool)) == [2]
    tiles["input_ids"] = tiles["input_ids"].view(2, 15)
    with pytest.raises(ValueError, match="PerFrame cannot tell which frames of pixel_values"):
        frames(parts, tiles, torch.ones(2, 15, dtype=torch.bool))


def test_where_frames_cannot_be_told_a_plan_by_frames_is_refused():
    inputs = tiny.prompt("qwen2_vl", (0, 0))
    inputs["video_grid_thw"] = torch.tensor([[2, 4, 4], [2, 4, 8]])
    with pytest.raises(ValueError, match="PerFrame cannot tell which frames of pixel_values_video"):
        run("qwen2_vl", inputs)
    inputs = tiny.prompt("llava_onevision")
    inputs["mm_encoder_outputs"] = {"video": inputs.pop("pixel_values_videos")}
    with pytest.raises(ValueError, match="PerFrame needs pixels, or the grids of videos"):
        run("llava_onevision", inputs)


def test_presets_say_what_their_papers_say():
    flash = presets.videochat_flash()
    assert flash.counts(8192) == {4: 6144, 18: 2048}
    assert flash.positions == "renumber"
    assert [type(rule) for rule in flash.drops.values()] == [Uniform, TextTopK]
    assert presets.videochat_flash("keep").positions == "keep"
    assert presets.fastv() == DropPlan({2: TextTopK(0.5)})
    model = tiny.model("llava_onevision")  # of 4 layers
    assert presets.pyramid(model) == DropPlan(
        {1: TextTopK(0.5), 2: TextTopK(0.25), 3: TextTopK(0.125)}
    )
    assert list(presets.pyramid(model, keep=(0.5,)).drops) == [2]
    with pytest.raises(ValueError, match="keep must have 1 to 3 ratios, got 4"):
        presets.pyramid(model, keep=(0.5, 0.4, 0.3, 0.2))


def test_presets_run():
    model, inputs = tiny.model("llava_onevision"), tiny.prompt("llava_onevision", (0, 3))
    for plan in (
        presets.pyramid(model),
        presets.fastv(),
        presets.pyramid(model, (0.5,), "renumber"),
    ):
        with hico_kernels.compress(model, plan) as handle:
            got = tiny.generate(model, inputs)
        assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@pytest.mark.skipif("qwen3_5" not in tiny.MODELS, reason="no Qwen3.5 in this transformers")
def test_presets_move_to_the_nearest_layer_that_attends():
    model, inputs = tiny.fresh("qwen3_5", kinds="lllf" * 3), tiny.prompt("qwen3_5", (0, 3))
    assert list(presets.pyramid(model, (0.5, 0.25)).drops) == [3, 7]  # 4 and 8
    assert list(presets.pyramid(model).drops) == [3, 7, 11]  # 3, 6 and 9
    assert presets.fastv(model=model) == DropPlan({3: TextTopK(0.5)})
    assert presets.fastv(5, 0.25, model=model) == DropPlan({3: TextTopK(0.25)})  # 7 is as near
    flash = presets.videochat_flash("keep", model=model)
    assert flash == DropPlan({4: Uniform(0.75), 11: TextTopK(0.25)})
    match = "at most 3 ratios for this model, whose text can choose in layers 3, 7, 11, got 4"
    with pytest.raises(ValueError, match=match):
        presets.pyramid(model, (0.8, 0.6, 0.4, 0.2))
    for plan in (presets.pyramid(model), presets.fastv(model=model), flash):
        with hico_kernels.compress(model, plan) as handle:
            got = tiny.generate(model, inputs)
        assert tiny.difference(got, tiny.reference(model, handle, inputs)) < 1e-12


@pytest.mark.skipif("gemma4" not in tiny.MODELS, reason="no Gemma 4 in this transformers")
def test_presets_stay_in_front_of_keys_that_are_shared():
    model = tiny.model("gemma4")  # of 7 layers, 3 is the last that can drop
    plan = presets.pyramid(model)
    assert list(plan.drops) == [1, 2, 3]  # 1, 3 and 5
    with hico_kernels.compress(model, plan):
        pass
    plain = tiny.model("llava_onevision")
    assert presets.fastv(model=plain) == presets.fastv()
