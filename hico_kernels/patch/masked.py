"""The definition that patched models are compared with: nothing is dropped, but from its drop layer
on no token attends to a dropped one. No cache; it shares only the set of kept tokens with what it
checks. The state of a linear-attention layer takes all its tokens in, so there the definition is
the layer itself, run over each sequence's kept tokens alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.patch.families import LINEAR, layer_kinds


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
            if stage is None or kinds[index] == LINEAR:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if kwargs.get("past_key_values") is not None:
                raise ValueError("past_key_values: the masked reference runs without a cache")
            given = kwargs.get("attention_mask")
            allowed = _allowed(given, hidden, kept[stage], length)
            new = dict(kwargs, attention_mask=_like(given, allowed[:, None], hidden, decoder))
            if renumber:
                places = (allowed[:, -1].cumsum(1) - 1).clamp(min=0)
                new["position_embeddings"] = decoder.rotary_emb(hidden, places.to(hidden.device))
            return args, new

        return hook

    kinds = layer_kinds(decoder)
    hooks = [
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    # Gemma 4 would run its last layers for the last token only.
    hooks.append(decoder.register_forward_pre_hook(_every_token, with_kwargs=True))
    linear = [
        (layer.linear_attn, kept[max(stages)])
        for index, layer in enumerate(decoder.layers)
        if kinds[index] == LINEAR and (stages := [stage for stage in kept if stage <= index])
    ]
    for mixer, rows in linear:
        mixer.forward = _alone(mixer.forward, rows, length)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mixer, _ in linear:
            del mixer.forward


def _every_token(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    return (args, {**kwargs, "logits_to_keep": 0}) if kwargs.get("logits_to_keep") else None


def _alone(stock: Callable[..., Tensor], kept: Sequence[Tensor], length: int) -> Callable:
    """`stock` for the tokens of each sequence that stay, padding as zeros; zeros for the others."""

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        out = torch.zeros_like(hidden_states)
        after = torch.arange(length, hidden_states.shape[1], device=hidden_states.device)
        for row, own in enumerate(kept):
            at, one = torch.cat([own.to(after.device), after]), slice(row, row + 1)
            out[row, at] = stock(hidden_states[one, at], **kwargs)[0]
        return out

    return forward


def _allowed(given: Tensor | None, hidden: Tensor, kept: Sequence[Tensor], length: int) -> Tensor:
    batch, total = hidden.shape[:2]
    device = hidden.device if given is None else given.device
    if given is None:
        allowed = torch.ones(total, total, dtype=torch.bool, device=device).tril()[None]
    else:
        allowed = (given if given.dtype == torch.bool else given == 0)[:, 0]
    stays = torch.zeros(batch, total, dtype=torch.bool, device=device)
    stays[:, length:] = True
    for row, positions in zip(stays, kept, strict=True):
        row[positions.to(device)] = True
    allowed = allowed & stays[:, None]
    itself = torch.eye(total, dtype=torch.bool, device=device)
    return allowed | (itself & ~allowed.any(-1, keepdim=True))  # a softmax over nothing is NaN


def _like(given: Tensor | None, allowed: Tensor, hidden: Tensor, decoder: nn.Module) -> Tensor:
    additive = given is not None and given.is_floating_point()
    if not additive and decoder.config._attn_implementation != "eager":
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=hidden.dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(hidden.dtype).min)
