"""Models whose clips are merged in front of the language model, against inputs merged by hand."""

from dataclasses import replace

import patch_models as tiny
import pytest
import torch
from patch_runs import grown, second_turn
from prellm_runs import VIDEOS, expected, stock
from torch.nn import functional as F
from transformers import DynamicCache

import hico_kernels
from hico_kernels import DropPlan, PreLLM, Uniform, UnsupportedModel
from hico_kernels.merge.reference import merge_tokens_round_by_round
from hico_kernels.patch.prellm import LAYOUTS

every_model = pytest.mark.parametrize("name", VIDEOS)
PLANS = [PreLLM(3, 2), PreLLM(5, 4), PreLLM(1, 2)]


def merged(model, plan, inputs):
    """Logits of a patched model, and the places of the tokens they are for."""
    with hico_kernels.compress(model, plan) as handle:
        logits = model(**inputs).logits
        kept = handle.kept[0]
    return [(own[-len(at) :], at) for own, at in zip(logits, kept, strict=True)]


@every_model
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_are_those_of_inputs_merged_by_hand(name, plan, side):
    model, inputs = tiny.model(name), tiny.prompt(name, (0, 3), side=side)
    for row, (logits, places) in enumerate(merged(model, plan, inputs)):
        want, kept = expected(model, name, inputs, plan, row)
        assert len(kept) < inputs["attention_mask"][row].sum()
        real = inputs["attention_mask"][row][places].bool()
        assert torch.equal(places[real], kept)
        torch.testing.assert_close(logits[real], want, rtol=1e-9, atol=1e-9)


@every_model
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_goes_on_as_by_hand(name, beams):
    if beams > 1 and tiny.VERSION < (5, 23):
        pytest.skip("older transformers mix up the features of some families' beams")
    if name == "qwen2_5_vl" and tiny.VERSION == (5, 4):
        pytest.skip("5.4 gives generated tokens other positions, patched or not")
    model, inputs, plan = tiny.model(name), tiny.prompt(name, (0, 3)), PreLLM(3, 2)
    with hico_kernels.compress(model, plan):
        got = tiny.generate(model, inputs, num_beams=beams, output_scores=True)
    new = got.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        want = expected(model, name, inputs, plan, row, new[row].tolist())[0][-7:-1]
        if beams == 1:
            have = torch.stack([step[row] for step in got.logits])
            torch.testing.assert_close(have, want.float(), rtol=1e-5, atol=1e-5)
        else:
            each = want.log_softmax(-1)
            each[:, [2, *range(90, 97)]] = -torch.inf
            score = each[torch.arange(6), new[row]].mean()
            assert float(score) == pytest.approx(float(got.sequences_scores[row]), abs=1e-4)


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="generate gives pixels to first turns only")
@torch.no_grad()
def test_a_second_turn_and_a_second_video_go_on_as_by_hand():
    name, plan = "llava_onevision", PreLLM(3, 2)
    model = tiny.model(name)
    one, two = tiny.prompt(name, (0, 3)), tiny.prompt(name, (0, 0), seed=5)
    with hico_kernels.compress(model, plan):
        cache = DynamicCache()
        first = tiny.generate(model, one, past_key_values=cache)
        turn = second_turn(model, one, first, torch.randint(3, 80, (2, 3)))
        second = tiny.generate(model, turn, past_key_values=cache)
        both = grown(turn, torch.cat([second.sequences[:, -6:], two["input_ids"]], 1))
        both["pixel_values_videos"] = two["pixel_values_videos"]
        third = tiny.generate(model, both, past_key_values=cache)
    pixels = [one["pixel_values_videos"], two["pixel_values_videos"]]
    both["pixel_values_videos"] = torch.stack(pixels, 1).flatten(0, 1)
    turn["pixel_values_videos"] = one["pixel_values_videos"]
    for inputs, got in ((turn, second), (both, third)):
        new = got.sequences[:, -6:]
        for row in range(2):
            want = expected(model, name, inputs, plan, row, new[row].tolist())[0][-7:-1]
            have = torch.stack([step[row] for step in got.logits])
            torch.testing.assert_close(have, want.float(), rtol=1e-5, atol=1e-5)


@every_model
def test_loss_and_gradients_are_those_of_inputs_merged_by_hand(name):
    model, inputs, plan = tiny.fresh(name), tiny.prompt(name), PreLLM(3, 2)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100  # the answer, behind the videos
    with hico_kernels.compress(model, plan):
        loss = model(**inputs, labels=labels).loss
    logits, kept = expected(model, name, inputs, plan, 0)
    want = F.cross_entropy(logits[:-1].float(), labels[0, kept][1:])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    weights = list(model.parameters())
    mine, theirs = (torch.autograd.grad(x, weights, materialize_grads=True) for x in (loss, want))
    reached = [n for (n, _), g in zip(model.named_parameters(), mine, strict=True) if g.any()]
    assert any("vis" in n for n in reached)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_videos_of_other_sizes_merge_by_their_own_frames():
    """Rows with one and two videos, of two grids, in one batch."""
    model, plan = tiny.model("qwen2_vl"), PreLLM(3, 2)
    grids = torch.tensor([[2, 4, 6], [3, 4, 4], [2, 4, 6]])
    sizes = (grids.prod(1) // 4).tolist()
    text = torch.randint(3, 80, (9,)).tolist()
    video = [[tiny.START] + [tiny.VIDEO] * size for size in sizes]
    rows = [text[:4] + video[0] + text[4:6] + video[1] + text[6:], text[:5] + video[2] + text[5:]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "mm_token_type_ids": (ids == tiny.VIDEO) * 2,
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, dtype=torch.float64),
        "video_grid_thw": grids,
    }
    if tiny.VERSION < (5, 3):
        del inputs["mm_token_type_ids"]
    seen = stock(model, inputs)
    with hico_kernels.compress(model, plan) as handle:
        given = {}
        hook = tiny.decoder(model).register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        kept = handle.kept[0]
    assert [len(own) for own in kept] == [
        len(row) - less for row, less in zip(rows, (6 + 3, 6), strict=True)
    ]
    start = longest - len(rows[0]) + 5  # the first video
    clip = seen["inputs_embeds"][:1, start : start + 6]
    tokens, _, into = merge_tokens_round_by_round(clip, 3, 1)
    for j in range(3):
        place = start + into[0].tolist().index(j)
        assert place in kept[0]
        torch.testing.assert_close(given["inputs_embeds"][0, place], tokens[0, j])


@every_model
@torch.no_grad()
def test_what_is_small_enough_stays_bit_for_bit(name):
    model, inputs = tiny.model(name), tiny.prompt(name)
    want = model(**inputs).logits
    with hico_kernels.compress(model, PreLLM(16, 4)):
        assert torch.equal(model(**inputs).logits, want)
    with hico_kernels.compress(model, PreLLM(3, 2)):
        assert model(**inputs).logits.shape[1] < want.shape[1]
    assert torch.equal(model(**inputs).logits, want)


@torch.no_grad()
def test_images_stay_bit_for_bit():
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl", (0, 3))
    ids = inputs["input_ids"]
    picture = {
        "input_ids": ids.where(ids != tiny.VIDEO, tiny.IMAGE),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": (ids == tiny.VIDEO).long(),
        "pixel_values": inputs["pixel_values_videos"],
        "image_grid_thw": inputs["video_grid_thw"],
    }
    if tiny.VERSION < (5, 3):
        del picture["mm_token_type_ids"]
    want = model(**picture).logits
    with hico_kernels.compress(model, PreLLM(3, 2)):
        assert torch.equal(model(**picture).logits, want)


@pytest.mark.skipif(tiny.VERSION < (5, 3), reason="token types came with 5.3")
@torch.no_grad()
def test_embeddings_with_token_types_are_as_good_as_ids():
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl", (0, 3))
    seen = stock(model, inputs)
    embeds = {
        "inputs_embeds": seen["inputs_embeds"],
        "position_ids": seen["position_ids"],
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": inputs["mm_token_type_ids"],
    }
    with hico_kernels.compress(model, PreLLM(3, 2)):
        want = model(**inputs).logits
        assert torch.equal(model(**embeds).logits, want)
        del embeds["mm_token_type_ids"]
        with pytest.raises(ValueError, match="inputs_embeds: a patched model finds the visual"):
            model(**embeds)


@torch.no_grad()
def test_frames_that_nothing_tells_are_refused():
    model, inputs = tiny.model("qwen2_vl"), tiny.prompt("qwen2_vl", (0, 3))
    seen = stock(model, inputs)
    with hico_kernels.compress(model, PreLLM(3, 2)) as handle:
        handle.announce(inputs["input_ids"] == tiny.VIDEO)
        with pytest.raises(ValueError, match=r"or the frames of announce\(\)"):
            tiny.decoder(model)(inputs_embeds=seen["inputs_embeds"])
        inputs["video_grid_thw"] = inputs["video_grid_thw"].repeat(2, 1)
        with pytest.raises(ValueError, match="video_grid_thw: PreLLM needs the grids of the vid"):
            model(**inputs)


def test_videos_one_behind_the_other_are_told_apart():
    places = torch.zeros(60, dtype=torch.bool)
    places[3 : 3 + 2 * 13] = True  # two of LLaVA-OneVision: 3 frames of 4 tokens and a newline each
    places[40:53] = True
    found = LAYOUTS["llava_onevision"].videos(places, None, 4)
    assert [video[:, 0].tolist() for video in found] == [[3, 7, 11], [16, 20, 24], [40, 44, 48]]
    places = torch.zeros(60, dtype=torch.bool)
    for start, length in ((3, 6), (10, 6), (20, 4), (25, 4), (30, 6)):
        places[start : start + length] = True
    found = LAYOUTS["qwen3_vl"].videos(places, None, 0)
    assert [video[:, 0].tolist() for video in found] == [[3, 10], [20, 25], [30]]


def test_the_plan_can_change_and_is_in_the_config():
    model, inputs = tiny.fresh("llava_onevision"), tiny.prompt("llava_onevision")
    handle = hico_kernels.patch(model, PreLLM(3, 2))
    assert PreLLM.from_json(model.config.hico) == PreLLM(3, 2)
    model(**inputs)
    assert handle.report().visual[0] == [3 + 2 + 1]
    handle.set_plan(PreLLM(2, per_frames=1))
    model(**inputs)
    assert handle.report().visual[0] == [3 * 2 + 1]
    handle.set_plan(DropPlan({0: Uniform(4)}))
    model(**inputs)
    assert handle.report().visual[0] == [4]
    with pytest.raises(UnsupportedModel, match="patched already"):
        hico_kernels.patch(model, DropPlan({0: Uniform(0.5)}))
    handle.remove()
    assert not hasattr(model.config, "hico")


@pytest.mark.parametrize("name", sorted(set(tiny.MODELS) - set(VIDEOS)))
def test_models_whose_frames_are_not_known_are_refused(name):
    with pytest.raises(
        UnsupportedModel, match=r"PreLLM knows where the frames of qwen2_vl, .* not"
    ):
        hico_kernels.patch(tiny.model(name), PreLLM(3))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ((0,), ValueError, "PreLLM: merge_to must be at least 1, got 0"),
        ((4, 0), ValueError, "PreLLM: per_frames must be at least 1, got 0"),
        ((0.5,), TypeError, "PreLLM: merge_to must be an int, got 0.5"),
        ((True,), TypeError, "PreLLM: merge_to must be an int, got True"),
    ],
)
def test_arguments_are_checked(settings, error, match):
    with pytest.raises(error, match=match):
        PreLLM(*settings)


def test_clips_that_cut_a_time_step_are_refused():
    match = "per_frames must be a multiple of the 2 frames in a time step of Qwen2-VL, got 3"
    with pytest.raises(ValueError, match=match):
        hico_kernels.patch(tiny.model("qwen2_vl"), PreLLM(3, 3))


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "llava_next_video"])
@torch.no_grad()
def test_placeholders_that_are_no_frames_raise(name, monkeypatch):
    model, inputs = tiny.model(name), tiny.prompt(name)
    changed = replace(LAYOUTS[model.config.model_type], tokens=lambda config: 5)
    monkeypatch.setitem(LAYOUTS, model.config.model_type, changed)
    with (
        hico_kernels.compress(model, PreLLM(3, 2)),
        pytest.raises(ValueError, match="placeholders in a row are no whole number of frames of 5"),
    ):
        model(**inputs)
