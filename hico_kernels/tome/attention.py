"""Someone else's attention, made proportional, with a look at its keys.

Attention modules differ in projections, norms, rotary tables and gates, but all call torch's
scaled_dot_product_attention in the end. So that call is what is met here, for the duration of one
forward call and on this thread only, and no attention code is copied.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hico_kernels.attention import ragged_attention


class Proportional(TorchFunctionMode):
    """While this is entered, softmax(QK^T / sqrt(d) + bias) V (arXiv 2210.09461, section 3).

    bias [B, T]: for the keys of every head and query, the log of their sizes; None: none. ends: the
    bounds [N+1] int32 of packed sequences, and the longest of them: then B is 1, and each attends
    to itself. What the attention used as keys, [B, H, T, D] per call, is in `keys` afterwards.
    """

    def __init__(self, bias: Tensor | None, ends: tuple[Tensor, int] | None = None) -> None:
        super().__init__()
        self.bias, self.ends, self.keys = bias, ends, []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but the attention itself."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attention_mask: merged tokens cannot follow a mask between tokens")
        self.keys.append(key)
        rest = {"dropout_p": dropout_p, "enable_gqa": enable_gqa}
        if self.ends is not None:
            return packed(query, key, value, self.bias, self.ends, scale, **rest)
        if self.bias is None:
            return F.scaled_dot_product_attention(query, key, value, scale=scale, **rest)
        return attend(query, key, value, self.bias, scale, **rest)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None, **rest: Any
) -> Tensor:
    """Attention with bias [B, T] added to the logits of every key, on a fused kernel of torch."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return by_channels(query, key, value, bias, scale, **rest)
    mask = bias.to(query.dtype if query.dtype == torch.float64 else torch.float32)
    mask = mask if query.device.type == "cpu" else mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None, None], scale=scale, **rest
    )


def by_channels(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None, **rest: Any
) -> Tensor:
    """The same without a mask, which torch's flash kernels do not take: q' = [q, 1, 1] and
    k' = [k, high, low] with high + low = bias / scale, two numbers since half precision holds too
    few digits in one. Heads are padded to a multiple of 8 channels, which these kernels need.

    -inf in the bias becomes the lowest number of the dtype, which no logit outweighs.
    """
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    pad = (width + 2 + 7) // 8 * 8 - width
    wide = (bias.float() / scale).clamp(min=torch.finfo(key.dtype).min)
    high = wide.to(key.dtype)
    low = (wide - high.float()).to(key.dtype)
    extra = F.pad(torch.stack([high, low], dim=-1), (0, pad - 2))[:, None]
    ones = F.pad(query.new_ones(2), (0, pad - 2)).expand(*query.shape[:-1], pad)
    out = F.scaled_dot_product_attention(
        torch.cat([query, ones], dim=-1),
        torch.cat([key, extra.expand(*key.shape[:-1], pad)], dim=-1),
        F.pad(value, (0, pad)),
        scale=scale,
        **rest,
    )
    return out[..., : value.shape[-1]]


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    ends: tuple[Tensor, int],
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
) -> Tensor:
    """Attention of every packed sequence to itself, in one call. [1, H, S, D] -> [1, H, S, D]"""
    if dropout_p:
        raise ValueError(f"vision_tower: attention must have no dropout, got {dropout_p}")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    bounds, longest = ends
    out = ragged_attention(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        causal=False,
        scale=scale,
        key_bias=None if bias is None else bias[0],
    )
    return out.transpose(0, 1)[None]
