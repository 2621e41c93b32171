"""Vision towers that attend to each frame on its own, in one call instead of one for every frame.

The towers of Qwen-VL and its relatives lay all frames of a call one behind the other. With flash
attention they hand over cumulative lengths; with sdpa every block splits its tokens and calls
attention once for each frame. They decide by "flash" in the name of the attention.
"""

from inspect import signature, unwrap

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hico_kernels.attention import ragged_attention
from hico_kernels.patch.families import UnsupportedModel

ATTENTION = "hico_flash_varlen"


class VisionAttention:
    """A model whose vision tower attends by `ragged_attention`. Made by `vision_attention`."""

    def __init__(self, configs: list) -> None:
        self._configs = configs
        for config in configs:
            config._attn_implementation = ATTENTION

    def remove(self) -> None:
        """Give the tower its sdpa back: it is as it was, bit for bit."""
        for config in self._configs:
            if config._attn_implementation == ATTENTION:
                config._attn_implementation = "sdpa"
        self._configs = []


def vision_attention(model: nn.Module) -> VisionAttention:
    """Let the vision tower in `model` attend to all frames of a call at once, until `remove()`.

    model: any whose tower's attention takes `cu_seqlens` and splits its tokens where it is not
    flash attention (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V, VideoLLaMA3), patched or not, or the
    tower alone; set to sdpa. Raises `UnsupportedModel` with the reason for any other.
    """
    towers = [m for m in model.modules() if _splits(m)]
    if not towers:
        raise UnsupportedModel(
            f"model: {type(model).__name__} has no vision tower that splits its tokens by "
            "cu_seqlens unless it is flash attention's (transformers 5.4 or newer)"
        )
    configs = list({id(m.config): m.config for m in towers}.values())
    for config in configs:
        if config._attn_implementation != "sdpa":
            raise UnsupportedModel(
                "model: attn_implementation of the vision tower must be sdpa, got "
                f"{config._attn_implementation!r}"
            )
    return VisionAttention(configs)


def _splits(module: nn.Module) -> bool:
    forward = unwrap(type(module).forward)  # some releases wrap it in a warning
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "is_flash_attention_requested" in names and "cu_seqlens" in signature(forward).parameters


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: Tensor | int,
    max_length_k: Tensor | int,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """q, k and v [1, H, T, D] of all frames -> [1, T, H, D]."""
    if attention_mask is not None or dropout:
        raise ValueError(f"{type(module).__name__}: {ATTENTION} takes no mask and no dropout")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = int(max_length_q), int(max_length_k)
    ends = cu_seq_lens_q, cu_seq_lens_k
    return ragged_attention(q, k, v, *ends, *longest, causal=False, scale=scaling)[None], None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # or a mask that is needed would be None
