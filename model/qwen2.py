"""The weights of a Qwen2 and the arithmetic of its layers, on packed rows."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico_model.config import Config


class Qwen2Weights(nn.Module):
    """Parameters by their names in the checkpoints: `model.layers.*`, `lm_head.weight` and so on.

    With tied embeddings `lm_head` is None and `head` uses the embedding: there is one tensor, and
    no load or copy can untie it.
    """

    def __init__(self, config: Config):
        super().__init__()
        container = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.rms_norm_eps,
                rope_theta=config.rope_theta,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=config.tie_word_embeddings,
            )
        )
        self.model = container.model
        self.lm_head = None if config.tie_word_embeddings else container.lm_head
        # Its buffer is rounded with the weights and has no data on the meta device: see `rope`.
        del self.model.rotary_emb

    def head(self, x: Tensor) -> Tensor:
        """x [..., D] -> logits [..., V]."""
        tied = self.lm_head is None
        return F.linear(x, self.model.embed_tokens.weight if tied else self.lm_head.weight)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm: sums in float32 (float64 for float64), rounded once."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rope(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [...] integers -> cos and sin [..., 1, head_dim / 2] of `dtype`.

    The angles are in float32 whatever the dtype of the model (float64 for float64): most positions
    above 256 do not exist in bfloat16.
    """
    wide = torch.promote_types(dtype, torch.float32)
    step = _inverse_frequencies(config.head_dim, config.rope_theta, positions.device, wide)
    angles = positions[..., None, None].to(wide) * step
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=16)
def _inverse_frequencies(
    head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[head_dim / 2]. From the CPU: another device's last bit is 0.06 rad at position 10^6."""
    with torch.inference_mode(False):  # a cached tensor must serve every mode
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim
        return (1 / theta**exponents).to(device, non_blocking=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H, head_dim] turned by its position; the halves of a head are the two coordinates."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def heads(projection: nn.Linear, x: Tensor, head_dim: int) -> Tensor:
    """x [S, D] -> [S, H, head_dim]."""
    return projection(x).unflatten(-1, (-1, head_dim))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(
    layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, head_dim: int, attend: Attend
) -> Tensor:
    """One decoder layer: hidden [S, D] -> [S, D].

    attend: q [S, H, head_dim], k and v [S, Hkv, head_dim], with positions applied  ->  like q.
    """
    project = layer.self_attn
    x = norm(layer.input_layernorm, hidden)
    q = rotate(heads(project.q_proj, x, head_dim), cos, sin)
    k = rotate(heads(project.k_proj, x, head_dim), cos, sin)
    v = heads(project.v_proj, x, head_dim)
    hidden = hidden + project.o_proj(attend(q, k, v).flatten(-2))
    return hidden + layer.mlp(norm(layer.post_attention_layernorm, hidden))
