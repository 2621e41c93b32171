"""What the text attends to in one layer of someone else's model."""

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hico_kernels.patch.rows import to_device
from hico_kernels.select import gather_tokens, text_guided_scores

_PROBE = "hico_probe"
# Attention of transformers with these projections, with or without a norm of every head, whose
# rotary tables [B, L, D] turn the halves of a head against each other.
_HALVES = {
    "Gemma3Attention",
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3Attention",
    "Qwen3VLTextAttention",
}


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
        if turns_halves(layer.self_attn, embeddings[0]):
            q, k, cos, sin = _keys_to_turn(layer, hidden, embeddings, asking, slots)
            scale = layer.self_attn.scaling
        else:
            q, k, scale = attention_inputs(layer, hidden, embeddings, config)
            q, k, cos, sin = q.flatten(0, 1)[asking], k.flatten(0, 1)[slots], None, None
        return text_guided_scores(
            q,
            k,
            torch.arange(len(lengths) + 1, device=hidden.device),
            to_device(list(accumulate(lengths, initial=0)), hidden.device),
            scale=scale,
            cos=cos,
            sin=sin,
        )


def turns_halves(attention: nn.Module, table: Tensor) -> bool:
    """Whether keys can be had without their rotary positions, which scoring then applies."""
    kind = type(attention)
    known = kind.__name__ in _HALVES and kind.__module__.startswith("transformers.")
    # transformers before 5.18 has tables [3, B, L, D] for positions of time, height and width.
    return known and table.dim() == 3 and table.shape[-1] == attention.head_dim


def _keys_to_turn(
    layer: nn.Module,
    hidden: Tensor,
    embeddings: tuple[Tensor, Tensor],
    asking: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, H, D] of `asking` with rotary positions, keys [S, Hkv, D] of `slots` without, and
    the tables [S, D] of these. No other query is made, and no value.
    """
    attention = layer.self_attn
    x = layer.input_layernorm(hidden).flatten(0, 1)
    cos, sin = (table.expand(len(hidden), -1, -1).flatten(0, 1) for table in embeddings)
    k = _heads(attention, "k", x)
    x, own_cos, own_sin = gather_tokens(x, asking, cos, sin)
    q = _heads(attention, "q", x)
    a, b = q.chunk(2, dim=-1)
    q = q * own_cos[:, None] + torch.cat((-b, a), dim=-1) * own_sin[:, None]
    if len(slots) < len(k):
        taken, cos, sin = gather_tokens(k.flatten(1), slots, cos, sin)
        k = taken.unflatten(1, k.shape[1:])
    return q.to(k.dtype), k, cos, sin  # autocast leaves q as wide as its table


def _heads(attention: nn.Module, name: str, x: Tensor) -> Tensor:
    """Rows x [S, C] -> queries ("q") or keys ("k") [S, heads, D]."""
    heads = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return heads if norm is None else norm(heads)


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
