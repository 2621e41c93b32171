"""Merging clips in front of a patched model's language model (`PreLLM`).

Merging happens where the language model's input is complete: each clip's tokens are taken from it,
merged, and put back at the places of their first members; the other places are left out before the
first layer, as a drop leaves tokens out. So caches, masks, labels and later turns follow as they do
for one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hico_kernels.merge import Matching, merge_tokens
from hico_kernels.patch.call import Call
from hico_kernels.patch.families import Parts
from hico_kernels.patch.masks import real_tokens
from hico_kernels.patch.prellm import Clips, PreLLM, clips, layout_of


def find_clips(
    parts: Parts,
    plan: PreLLM,
    visual: Tensor,
    given: Mapping[str, Any],
    frames: Sequence[int] | None = None,
) -> tuple[list[Clips], list[int]]:
    """What merges in a call, and how many tokens each sequence has fewer.

    visual [B, q] bool; given: the arguments of the model, which tell videos, or of its decoder,
    where frames has those of each sequence and all its visual tokens are one video.
    """
    layout, places, inside = layout_of(parts), visual, None
    if frames is None:
        ids, kinds = given.get("input_ids"), given.get("mm_token_type_ids")
        if ids is None and kinds is None:
            raise ValueError(
                "inputs_embeds: PreLLM needs mm_token_type_ids, which tell videos, or the frames "
                "of announce()"
            )
        token = getattr(parts.inner.config, layout.token)
        videos = kinds == 2 if ids is None else ids == token
        places = visual & videos.to(visual.device)
        inside = given.get("position_ids") if parts.family.multi_axis else None
    places, inside = _on_the_host(places, inside)
    if inside is None and given.get("video_grid_thw") is not None:
        inside = _in_grids(places, given["video_grid_thw"], parts)
    return clips(layout, parts.inner.config, plan, places, inside, frames)


def merge_clips(call: Call, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Merge the clips of a call; the decoder's new arguments, or None where nothing is to merge.

    given: what the decoder was given.
    """
    if not call.clips:
        return None
    visual, more = call.prompt.visual, given.get("deepstack_visual_embeds") or []
    with call.clock.time("merging", visual.device):
        embeds, stay, more = merged(given["inputs_embeds"], more, visual, call.clips)
        call.merged = torch.nonzero_static(stay.flatten(), size=sum(call.left))[:, 0]
    new = {**given, "inputs_embeds": embeds}
    return {**new, "deepstack_visual_embeds": more} if more else new


def placed_so_far(cache: Any) -> Tensor | None:
    """Tokens of each sequence [B] in a cache, as merging left them; None: it left all."""
    return getattr(cache.layers[0], "placed", None) if cache is not None and cache.layers else None


def place(call: Call, start: Tensor | None, past: int, positions: Tensor | None) -> None:
    """Give the tokens of a call one-dimensional rotary positions without the gaps of merging.

    They are those of a prompt with fewer placeholders, and no longer than the model was trained
    for. (With positions of time, height and width a merged token keeps those of its first member,
    and text its distance.) start: `placed_so_far`; past: tokens before this call; positions: those
    that the model gives this call's, [B or 1, q].
    """
    if call.length == 1 and call.merged is None:  # a token that was generated
        call.places, call.placed = start[:, None], start + 1
        return
    device = call.prompt.visual.device if start is None else start.device
    valid = real_tokens(call.mask, past, past + call.length, past + call.length)
    if valid is None:
        valid = torch.ones(call.batch, call.length, dtype=torch.bool, device=device)
    if call.merged is not None:
        visual = call.prompt.visual
        stay = torch.zeros_like(visual).flatten()
        stay[call.merged] = True
        valid = (valid & ~visual) | stay.view_as(visual)
    if start is None and past == 0:
        start = torch.zeros(call.batch, dtype=torch.int64, device=device)
    elif start is None:  # tokens of earlier turns are where the model put them
        if positions is None:
            positions = torch.arange(past, past + call.length, device=device)[None]
        first = valid.int().argmax(1, keepdim=True)
        start = positions.expand(call.batch, -1).gather(1, first)[:, 0]
    counted = valid.cumsum(1)
    call.places = start[:, None] + (counted - 1).clamp(min=0)
    call.placed = start + counted[:, -1]


def merged(
    embeds: Tensor, more: list[Tensor], visual: Tensor, found: list[Clips]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Put merged tokens at the places of their first members.

    embeds [B, L, C], more: features [V, C] of the V `visual` places [B, L], which merge alike ->
    embeds, the places that stay, and more.
    """
    flat, stay = embeds.flatten(0, 1), visual.flatten().clone()
    rows = torch.nonzero_static(visual.flatten(), size=len(more[0]))[:, 0] if more else None
    spread = [each.new_zeros(len(flat), each.shape[1]).index_copy(0, rows, each) for each in more]
    for own in found:
        places = own.places.to(embeds.device)  # [N, T]
        n, t = places.shape
        tokens, _, assignment = merge_tokens(flat[places], own.merge_to)
        members = torch.arange(t, device=embeds.device).expand(n, t)
        first = members.new_full((n, own.merge_to), t)
        first = first.scatter_reduce(1, assignment.long(), members, "amin")
        kept = places.gather(1, first).flatten()
        flat = flat.index_copy(0, kept, tokens.flatten(0, 1))
        same = Matching(assignment, own.merge_to)
        for i, each in enumerate(spread):
            spread[i] = each.index_copy(0, kept, same.merge(each[places])[0].flatten(0, 1))
        stay[places.flatten()] = False
        stay[kept] = True
    return flat.view_as(embeds), stay.view_as(visual), [each[rows] for each in spread]


def _on_the_host(places: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One wait for the device: clips have the sizes that these tell."""
    if positions is None or positions.dim() < 3:
        return places.cpu(), None
    height_and_width = positions[-2:].expand(2, *places.shape).to(places.device)
    both = torch.cat([places[None].to(positions.dtype), height_and_width]).cpu()
    return both[0].bool(), both[1:]


def _in_grids(places: Tensor, grids: Tensor, parts: Parts) -> Tensor | None:
    """The number of every token in its time step, twice [2, B, L] as if it were its height and its
    width; None where the videos are of other sizes than their `places`. All on the host.
    """
    unit = parts.inner.config.vision_config.spatial_merge_size**2
    steps = [torch.arange(h * w // unit).repeat(t) for t, h, w in grids.tolist()]
    numbers = torch.cat(steps)
    if len(numbers) != int(places.sum()):
        return None
    return (
        torch.zeros_like(places, dtype=torch.int64)
        .masked_scatter(places, numbers)
        .expand(2, -1, -1)
    )
