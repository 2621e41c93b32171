"""What the text attends to in one layer of someone else's model."""

import copy
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hico_kernels.patch.rows import to_device
from hico_kernels.select import text_guided_scores

_PROBE = "hico_probe"


def attention_inputs(
    layer: nn.Module, hidden: Tensor, embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Queries [B, L, H, D], keys [B, L, Hkv, D] and the scale that `layer` would attend with.

    The layer's own code makes them (its projections, norms of queries and keys, rotary variant):
    a shallow copy of its attention module runs with an attention function that only looks. The
    module itself and its config are not touched.
    """
    probe = copy.copy(layer.self_attn)
    probe.config = copy.copy(probe.config)
    probe.config._attn_implementation = _PROBE
    probe._modules = {**probe._modules, "o_proj": nn.Identity()}
    probe.hico_seen = []
    type(probe).forward(
        probe,
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=embeddings,
        attention_mask=None,
    )
    return probe.hico_seen[0]


def text_scores(
    layer: nn.Module,
    hidden: Tensor,
    embeddings: tuple[Tensor, Tensor],
    asking: Tensor,
    slots: Tensor,
    lengths: list[int],
) -> Tensor:
    """What the token `asking` of each row attends to among `slots`, a softmax over all of them.

    hidden [B, L, C]; asking [B] its column; slots [S] rows of the flattened [B*L], ascending, of
    which each row of the batch has lengths[b] -> [S] float32 (float64 for float64).
    """
    with torch.no_grad():
        q, k, scale = attention_inputs(layer, hidden, embeddings)
        rows = torch.arange(len(lengths) + 1, device=hidden.device)
        return text_guided_scores(
            q[rows[:-1], asking],
            k.flatten(0, 1)[slots],
            rows,
            to_device(list(accumulate(lengths, initial=0)), hidden.device),
            scale=scale,
        )


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, None]:
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    scale = kwargs.get("scaling")
    module.hico_seen.append((query, key, query.shape[-1] ** -0.5 if scale is None else scale))
    return query, None


AttentionInterface.register(_PROBE, _look)  # a new name, used by the copies above only
