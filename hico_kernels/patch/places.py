"""Where the visual tokens of a call are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hico_kernels.patch.families import Parts


def places(parts: Parts, given: Mapping[str, Any]) -> Tensor | None:
    """The places that this call fills with visual tokens, [B, q] bool; None when it brings none.

    given: the arguments of the model. A placeholder counts when its pixels (or features) come with
    it: in later turns, and where the model generates the same id, it is a token like any other.
    """
    ids, kinds, embeds = (
        given.get(name) for name in ("input_ids", "mm_token_type_ids", "inputs_embeds")
    )
    if ids is not None:
        outputs = given.get("mm_encoder_outputs") or {}
        ready = {
            "pixel_values": outputs.get("image"),
            "pixel_values_videos": outputs.get("video"),
        }
        tokens = {
            getattr(parts.inner.config, placeholder)
            for source, placeholder in parts.family.visual.items()
            if given.get(source) is not None or ready.get(source) is not None
        }
        return torch.stack([ids == token for token in tokens]).any(0) if tokens else None
    if embeds is None or embeds.shape[1] == 1:
        return None
    if kinds is None or kinds.shape != embeds.shape[:2]:
        raise ValueError(
            "inputs_embeds: a patched model finds the visual tokens in input_ids, or in "
            "mm_token_type_ids of shape [batch, tokens]; got neither"
        )
    return (kinds == 1) | (kinds == 2)  # image, video; 0 is text
