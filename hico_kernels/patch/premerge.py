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


def video_places(parts: Parts, given: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a call are of videos, [B, q] bool; given: the arguments of the model."""
    ids, kinds = given.get("input_ids"), given.get("mm_token_type_ids")
    if ids is not None:
        return ids == getattr(parts.inner.config, layout_of(parts).token)
    return None if kinds is None else kinds == 2


def merge_clips(
    call: Call,
    parts: Parts,
    plan: PreLLM,
    videos: Tensor | None,
    frames: Sequence[int] | None,
    given: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Merge the clips of a call with visual tokens; the decoder's new arguments, or None where
    nothing is to merge.

    videos [B, q] bool, or the frames of each sequence where all its visual tokens are one video;
    given: what the decoder was given.
    """
    visual, layout = call.prompt.visual, layout_of(parts)
    if frames is None and videos is None:
        raise ValueError(
            "inputs_embeds: PreLLM needs mm_token_type_ids, which tell videos, or the frames of "
            "announce()"
        )
    places = visual if videos is None else visual & videos.to(visual.device)
    found, fewer = clips(
        layout,
        parts.inner.config,
        plan,
        *_on_the_host(places, given.get("position_ids"), parts.family.multi_axis),
        frames,
    )
    if not found:
        return None
    left = [n - less for n, less in zip(call.prompt.num_visual, fewer, strict=True)]
    more = given.get("deepstack_visual_embeds") or []
    with call.clock.time("merging", visual.device):
        embeds, stay, more = merged(given["inputs_embeds"], more, visual, found)
        call.merge(torch.nonzero_static(stay.flatten(), size=sum(left))[:, 0], left)
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
        stay[call.merged[0]] = True
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


def _on_the_host(
    places: Tensor, positions: Tensor | None, multi_axis: bool
) -> tuple[Tensor, Tensor | None]:
    """One wait for the device: clips have the sizes that these tell."""
    if not multi_axis or positions is None or positions.dim() < 3:
        return places.cpu(), None
    height_and_width = positions[-2:].expand(2, *places.shape).to(places.device)
    both = torch.cat([places[None].to(positions.dtype), height_and_width]).cpu()
    return both[0].bool(), both[1:]
