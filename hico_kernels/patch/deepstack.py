"""Qwen3-VL adds features of the vision tower behind its first layers, to the visual tokens that
are left.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hico_kernels.patch.call import Call
from hico_kernels.patch.packed import PackedRows


def with_deepstack(decoder: nn.Module, current: Callable[[], Call | None]) -> Callable[[], None]:
    """Let a decoder with DeepStack find the tokens that are left; returns what undoes it."""
    stock = getattr(decoder, "_deepstack_process", None)
    if stock is None:
        return lambda: None

    def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        call = current()
        if call is None or call.rows is None:
            return stock(hidden_states, visual_pos_masks, visual_embeds)
        visual = visual_pos_masks.to(hidden_states.device)
        number = visual.flatten().cumsum(0).view(visual.shape) - 1  # row of visual_embeds
        if isinstance(call.rows, PackedRows):
            here, number = (x.flatten()[call.rows.slots][None] for x in (visual, number))
        else:
            here = visual.gather(1, call.rows.index) & call.rows.valid
            number = number.gather(1, call.rows.index)
        added = visual_embeds.to(hidden_states)[number.clamp(min=0)]
        return torch.where(here[..., None], hidden_states + added, hidden_states)

    decoder._deepstack_process = process  # on the instance: the class stays as it is
    return lambda: decoder.__dict__.pop("_deepstack_process", None)
