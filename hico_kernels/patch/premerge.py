"""A model whose clips are merged in front of its language model (`PreLLM`).

Merging happens where the language model's input is complete: each clip's tokens are taken from it,
merged, and put back at the places of their first members; the other places are dropped before the
first layer, as a `DropPlan` drops. So caches, masks, labels and later turns follow as they do for
one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.merge import Matching, merge_tokens
from hico_kernels.patch.families import Parts, why_not_renumber
from hico_kernels.patch.handle import Handle, _named
from hico_kernels.patch.plan import DropPlan, Uniform
from hico_kernels.patch.prellm import Clips, PreLLM, clips, layout_of


class PreHandle(Handle):
    """A model patched with `PreLLM`."""

    def __init__(self, model: nn.Module, parts: Parts, plan: PreLLM) -> None:
        self._layout = layout_of(parts, plan)
        super().__init__(model, parts, plan)

    def _check(self, plan: PreLLM) -> None:
        if not isinstance(plan, PreLLM):
            raise TypeError(f"plan must be a PreLLM here, got {type(plan).__name__}")
        layout_of(self.parts, plan)

    def _set(self, plan: PreLLM) -> None:
        self.pre = plan
        self.model.config.hico = plan.to_json()
        # With rotary positions of time, height and width a merged token keeps those of its first
        # member, and text its distance. One-dimensional positions are what a prompt with fewer
        # placeholders has: without gaps, and no longer than the model was trained for.
        positions = "renumber" if why_not_renumber(self.parts) is None else "keep"
        self.plan = DropPlan({0: Uniform(keep=1)}, positions)  # how many stay: `_before_decoder`

    def _before_inner(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super()._before_inner(module, args, kwargs)
        given = _named(module, args, kwargs)
        ids, kinds = given.get("input_ids"), given.get("mm_token_type_ids")
        if ids is not None:
            self._local.videos = ids == getattr(self.parts.inner.config, self._layout.token)
        else:
            self._local.videos = None if kinds is None else kinds == 2

    def _after_inner(self, module: nn.Module, args: tuple, output: Any) -> None:
        super()._after_inner(module, args, output)
        self._local.videos = None

    def _before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        super()._before_decoder(module, args, kwargs)
        call, videos = self._call, getattr(self._local, "videos", None)
        if call.prompt is None:
            return None
        call.counts = [{0: number} for number in call.prompt.num_visual]
        if videos is None:
            raise ValueError("inputs_embeds: PreLLM needs mm_token_type_ids, which tell videos")
        given = _named(module, args, kwargs)
        places = call.prompt.visual & videos.to(call.prompt.visual.device)
        found, fewer = clips(
            self._layout,
            self.parts.inner.config,
            self.pre,
            *_on_the_host(places, given.get("position_ids"), self.parts.family.multi_axis),
        )
        if not found:
            return None
        left = [n - less for n, less in zip(call.prompt.num_visual, fewer, strict=True)]
        visual = call.prompt.visual
        more = given.get("deepstack_visual_embeds") or []
        embeds, stay, more = merged(given["inputs_embeds"], more, visual, found)
        rows = torch.nonzero_static(stay.flatten(), size=sum(left))[:, 0]
        call.counts = [{0: number} for number in left]
        call.pick = lambda slots, counts, keep: rows
        new = {**given, "inputs_embeds": embeds}
        return (), {**new, "deepstack_visual_embeds": more} if more else new


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
