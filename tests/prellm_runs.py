"""Inputs merged by hand, which models with `PreLLM` are compared with."""

import math

import patch_models as tiny
import torch

from hico_kernels.merge.reference import merge_tokens_round_by_round
from hico_kernels.patch.masked import masked

# (time steps, tokens in one, frames in one) of the video in a tiny prompt
VIDEOS = {
    "qwen2_vl": (2, 6, 2),
    "qwen2_5_vl": (2, 6, 2),
    "qwen3_vl": (2, 6, 2),
    "qwen3_5": (2, 6, 2),
    "qwen3_5_moe": (2, 6, 2),
    "llava_onevision": (3, 4, 1),
    "llava_next_video": (3, 4, 1),
    "internvl": (3, 4, 1),
    "internvl-qwen3": (3, 4, 1),
}
VIDEOS = {name: video for name, video in VIDEOS.items() if name in tiny.MODELS}
STATES = [name for name in VIDEOS if name.startswith("qwen3_5")]  # linear attention in layer 0
MULTI_AXIS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")


def by_hand(name, embeds, places, plan):
    """The tokens [L, C] of one sequence with its videos merged; which of them they are, and what
    they are the means of.
    """
    steps, tokens, frames = VIDEOS[name]
    per_clip = plan.per_frames // frames
    at = places.nonzero()[:, 0].tolist()
    length = tiny.MODELS[name].tokens if tiny.MODELS[name].runs == 1 else len(at)
    rows, members = dict(enumerate(embeds)), {i: [i] for i in range(len(embeds))}
    for video in range(0, len(at), length):
        for start in range(0, steps, per_clip):
            end = min(start + per_clip, steps)
            clip = at[video + start * tokens : video + end * tokens]
            target = math.ceil(plan.merge_to * (end - start) / per_clip)
            if target < len(clip):
                merged, _, into = merge_tokens_round_by_round(embeds[None, clip], target, 1)
                for slot in clip:
                    del rows[slot]
                for j, token in enumerate(merged[0]):
                    group = [slot for slot, k in zip(clip, into[0], strict=True) if k == j]
                    rows[group[0]], members[group[0]] = token, group
    kept = sorted(rows)
    return torch.stack([rows[i] for i in kept]), kept, [members[i] for i in kept]


def stock(model, inputs):
    """What the language model of an unpatched model is given."""
    seen = {}
    hook = tiny.decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen


def expected(model, name, inputs, plan, row, new=(), drops=None, renumber=False):
    """Logits of one sequence whose videos were merged by hand, with tokens `new` behind it; and
    the places of its tokens.

    drops: what a plan kept of it, layer -> places in the call; the others are masked here.
    renumber: as the plan's positions.
    """
    seen = stock(model, inputs)
    real = inputs["attention_mask"][row].bool()
    places = (inputs["input_ids"][row] == tiny.MODELS[name].token)[real]
    short, kept, members = by_hand(name, seen["inputs_embeds"][row][real], places, plan)
    more = model.get_input_embeddings()(torch.tensor(new, dtype=torch.long))
    if name in MULTI_AXIS:
        own = seen["position_ids"][-3:, row][:, real]
        behind = own.max() + 1 + torch.arange(len(new))
        positions = torch.cat([own[:, kept], behind.expand(3, -1)], 1)[:, None]
    else:
        positions = torch.arange(len(short) + len(new))[None]
    given = {"inputs_embeds": torch.cat([short, more])[None], "position_ids": positions}
    # Without one, transformers 4.57 takes Qwen3-VL's positions for those of packed sequences.
    given["attention_mask"] = torch.ones(1, len(short) + len(new), dtype=torch.long)
    if seen.get("deepstack_visual_embeds"):
        visual = torch.cat([places[kept], torch.zeros(len(new), dtype=torch.bool)])[None]
        given |= {"visual_pos_masks": visual, "deepstack_visual_embeds": []}
        for each in seen["deepstack_visual_embeds"]:
            spread = each.new_zeros(*seen["visual_pos_masks"].shape, each.shape[1])
            spread[seen["visual_pos_masks"]] = each
            own = spread[row][real]
            means = torch.stack([own[group].mean(0) for group in members])
            given["deepstack_visual_embeds"].append(means[places[kept]])
    at = real.nonzero()[:, 0][kept]
    left = {n: [torch.isin(at, places).nonzero()[:, 0]] for n, places in (drops or {}).items()}
    with masked(tiny.decoder(model), left, len(at), renumber=renumber):
        out = tiny.decoder(model)(**given, use_cache=False)
    return model.lm_head(out.last_hidden_state)[0], at
