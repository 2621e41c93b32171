"""The definition that patched models are compared with: nothing is dropped, but from its drop layer
on no token attends to a dropped one. No cache, no compaction; it shares only the set of kept tokens
with what it checks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def masked(
    decoder: nn.Module,
    kept: Mapping[int, Sequence[Tensor]],
    length: int,
    *,
    renumber: bool = False,
) -> Iterator[None]:
    """Let an unpatched `decoder`, called without a cache, forbid what a patched one dropped.

    kept: layer -> positions that stay in each sequence, as in `Handle.kept`; length: of the prompt
    they lie in. What follows the prompt stays.
    """

    def before(index: int) -> Any:
        stage = max((layer for layer in kept if layer <= index), default=None)

        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
            if stage is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if kwargs.get("past_key_values") is not None:
                raise ValueError("past_key_values: the masked reference runs without a cache")
            given = kwargs.get("attention_mask")
            allowed = _allowed(given, hidden, kept[stage], length)
            new = dict(kwargs, attention_mask=_like(given, allowed[:, None], hidden, decoder))
            if renumber:
                places = (allowed[:, -1].cumsum(1) - 1).clamp(min=0)
                new["position_embeddings"] = decoder.rotary_emb(hidden, places)
            return args, new

        return hook

    hooks = [
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _allowed(given: Tensor | None, hidden: Tensor, kept: Sequence[Tensor], length: int) -> Tensor:
    batch, total = hidden.shape[:2]
    if given is None:
        allowed = torch.ones(total, total, dtype=torch.bool, device=hidden.device).tril()[None]
    else:
        allowed = (given if given.dtype == torch.bool else given == 0)[:, 0]
    stays = torch.zeros(batch, total, dtype=torch.bool, device=hidden.device)
    stays[:, length:] = True
    for row, positions in zip(stays, kept, strict=True):
        row[positions] = True
    allowed = allowed & stays[:, None]
    itself = torch.eye(total, dtype=torch.bool, device=hidden.device)
    return allowed | (itself & ~allowed.any(-1, keepdim=True))  # a softmax over nothing is NaN


def _like(given: Tensor | None, allowed: Tensor, hidden: Tensor, decoder: nn.Module) -> Tensor:
    additive = given is not None and given.is_floating_point()
    if not additive and decoder.config._attn_implementation != "eager":
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
    return zeros.masked_fill(~allowed, torch.finfo(hidden.dtype).min)
