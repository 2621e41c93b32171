"""Linear attention of packed sequences: a state for each, one sequence after the other."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.patch.packed import PackedRows

_STATES = ("conv_states", "recurrent_states")  # of a cache layer: [B, ...], or a dict of these


def with_states_apart(decoder: nn.Module) -> Callable[[], None]:
    """Let the linear attention of a decoder take `PackedRows` as its mask; returns the undo."""
    mixers = [layer.linear_attn for layer in decoder.layers if hasattr(layer, "linear_attn")]
    saved = [mixer.__dict__.get("forward") for mixer in mixers]
    for mixer in mixers:
        mixer.forward = _apart(mixer.forward, mixer.layer_idx)

    def undo() -> None:
        for mixer, own in zip(mixers, saved, strict=True):
            if own is None:
                del mixer.forward
            else:
                mixer.forward = own

    return undo


def _apart(stock: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """`stock` for packed sequences [1, T, C] too. Its kernels in plain torch take no cumulative
    lengths, and what its kernels of other packages do with them and a state differs by release.
    """

    def forward(
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | PackedRows | None = None,
        **kwargs: object,
    ) -> Tensor:
        if not isinstance(attention_mask, PackedRows):
            return stock(
                hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
        parts = hidden_states.split(attention_mask.counts, 1)
        if cache_params is None:
            return torch.cat([stock(part, **kwargs) for part in parts], 1)
        layer, each, out = cache_params.layers[index], [], []
        for row, part in enumerate(parts):
            alone = copy.copy(cache_params)
            alone.layers = list(cache_params.layers)
            alone.layers[index] = _row_of(layer, row)
            out.append(stock(part, cache_params=alone, **kwargs))
            each.append(alone.layers[index])
        _join(layer, each)
        return torch.cat(out, 1)

    return forward


def _row_of(layer: Any, row: int) -> Any:
    """A cache layer with the state of one sequence."""
    own = copy.copy(layer)
    own.__dict__ = {k: dict(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
    for name in _STATES:
        setattr(own, name, _of_all(lambda state: state[row : row + 1], getattr(layer, name)))
    return own


def _join(layer: Any, rows: list[Any]) -> None:
    """Give a cache layer the states of `rows`."""
    layer.__dict__ = rows[0].__dict__
    for name in _STATES:
        states = [getattr(own, name) for own in rows]
        setattr(layer, name, _of_all(lambda *each: torch.cat(each), *states))


def _of_all(change: Callable[..., Tensor], *states: Any) -> Any:
    """`change` of a state, or of every state of dicts; None stays."""
    if isinstance(states[0], dict):
        return {key: _of_all(change, *(each[key] for each in states)) for key in states[0]}
    return None if states[0] is None else change(*states)
