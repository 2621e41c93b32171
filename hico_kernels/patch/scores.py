"""What the text attends to in one layer of someone else's model."""

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hico_kernels.patch.rows import to_device
from hico_kernels.select import text_guided_scores

_PROBE = "hico_probe"


def probe_config(config: Any) -> Any:
    """A language model's config, with an attention function that only looks."""
    probe = copy.copy(config)
    probe._attn_implementation = _PROBE
    return probe


def attention_inputs(
    layer: nn.Module, hidden: Tensor, embeddings: tuple[Tensor, Tensor], config: Any
) -> tuple[Tensor, Tensor, float]:
    """Queries [B, L, H, D], keys [B, L, Hkv, D] and the scale that `layer` would attend with.

    The layer's own code makes them (its projections, norms of queries and keys, rotary variant):
    a shallow copy of its attention module runs with `config`, of `probe_config`. The module itself
    and its config are not touched. torch.compile cannot trace the copy; there the module has the
    other config for the time of the trace, and what its output projection makes of the queries is
    never used, so not computed.
    """
    attention, seen = layer.self_attn, []
    compiling = torch.compiler.is_compiling()
    stock = attention.config
    if not compiling:
        attention = copy.copy(attention)
        attention._modules = {**attention._modules, "o_proj": nn.Identity()}
    attention.config = config
    type(attention).forward(
        attention,
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=embeddings,
        attention_mask=None,
        hico_seen=seen,
        **({"shared_kv_states": {}} if hasattr(attention, "store_full_length_kv") else {}),
    )
    if compiling:
        attention.config = stock
    return seen[0]


def text_scores(
    layer: nn.Module,
    hidden: Tensor,
    embeddings: tuple[Tensor, Tensor],
    asking: Tensor,
    slots: Tensor,
    lengths: list[int],
    config: Any,
) -> Tensor:
    """What the token `asking` of each row attends to among `slots`, a softmax over all of them.

    hidden [B, L, C]; asking [B] and slots [S] are rows of the flattened [B*L], slots ascending and
    lengths[b] of them of each sequence; config: `probe_config`'s -> [S] float32 (float64 for
    float64).
    """
    with torch.no_grad():
        q, k, scale = attention_inputs(layer, hidden, embeddings, config)
        return text_guided_scores(
            q.flatten(0, 1)[asking],
            k.flatten(0, 1)[slots],
            torch.arange(len(lengths) + 1, device=hidden.device),
            to_device(list(accumulate(lengths, initial=0)), hidden.device),
            scale=scale,
        )


def _look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    hico_seen: list,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    hico_seen.append((query, key, query.shape[-1] ** -0.5 if scaling is None else scaling))
    return query, None


AttentionInterface.register(_PROBE, _look)  # a new name, used by the copies above only
