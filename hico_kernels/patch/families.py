"""Which models can be patched, and where their parts are. What is not in the table is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from torch import nn

_PIXELS = {
    "pixel_values": "image_token_id",
    "pixel_values_videos": "video_token_id",
}
_IMAGES = {"pixel_values": "image_token_id", "image_hidden_states": "image_token_id"}


class UnsupportedModel(ValueError):
    """A model that cannot be patched; the message says why."""


@dataclass(frozen=True)
class Family:
    """What hooks need to know about a kind of model."""

    name: str
    text: tuple[str, ...]  # model types of the language model that were tested
    decoder: str = "language_model"
    visual: Mapping[str, str] = field(default_factory=lambda: _PIXELS)  # input -> its placeholder
    multi_axis: bool = False  # rotary positions of time, height and width


_LLAVA_TEXT = ("qwen2", "qwen3", "llama", "mistral")
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", ("qwen2_vl_text",), multi_axis=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("qwen2_5_vl_text",), multi_axis=True),
    "qwen3_vl": Family("Qwen3-VL", ("qwen3_vl_text",), multi_axis=True),
    "llava_onevision": Family("LLaVA-OneVision", _LLAVA_TEXT),
    "llava_next_video": Family("LLaVA-NeXT-Video", _LLAVA_TEXT),
    "internvl": Family("InternVL3", _LLAVA_TEXT, visual=_IMAGES),
    "video_llama_3": Family("VideoLLaMA3", ("qwen2",)),
    "smolvlm": Family("SmolVLM2", ("llama",), decoder="text_model", visual=_IMAGES),
    "glm4v": Family(
        "GLM-4V",
        ("glm4v_text",),
        visual={"pixel_values": "image_token_id", "pixel_values_videos": "image_token_id"},
        multi_axis=True,
    ),
    "gemma3": Family("Gemma 3", ("gemma3_text",), visual=_IMAGES),
    "gemma4": Family("Gemma 4", ("gemma4_text",)),
    "qwen3_5": Family("Qwen3.5", ("qwen3_5_text",), multi_axis=True),
    "qwen3_5_moe": Family("Qwen3.5", ("qwen3_5_moe_text",), multi_axis=True),
}
_OFFICIAL = (
    "its own code drops tokens (config.llm_compress_type) and was written for transformers 4.39; "
    "load the folder with hico_model.VideoChatFlash.from_pretrained and patch that"
)
_KNOWN_REASONS = {
    "VideoChatFlash": "it merges and drops by itself, and patch() with a DropPlan sets where",
    "VideoChatFlashQwenForCausalLM": _OFFICIAL,  # of one checkpoint the model type is qwen2
}
LINEAR = "linear_attention"  # a state that runs over the tokens; no keys, no positions
SLIDING = "sliding_attention"
_LAYER_KINDS = {"full_attention", SLIDING, LINEAR}
_AHEAD = {"gemma3_text"}  # tokens of an image see each other, in layers of full attention too
PACKED = "hico_packed"  # stands in for sdpa in models patched with rows="packed"
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class Parts:
    """A model taken apart, as far as the hooks need it."""

    family: Family
    inner: nn.Module  # has the placeholders: input_ids and pixels come in here
    decoder: nn.Module  # has the layers


def has_own_plan(model: nn.Module) -> bool:
    """Whether the model drops by a `DropPlan` of its own, as the one of `hico_model` does."""
    return hasattr(type(model), "hico_patch")


def take_apart(model: nn.Module) -> Parts:
    """The parts of a model; raises `UnsupportedModel` with the reason when it cannot be patched."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        names = (kind, *(base.__name__ for base in type(model).__mro__))
        known = (_KNOWN_REASONS[name] for name in names if name in _KNOWN_REASONS)
        reason = next(known, f"the supported model types are {', '.join(FAMILIES)}")
        raise UnsupportedModel(f"model: cannot patch {type(model).__name__} ({kind}): {reason}")
    family = FAMILIES[kind]
    inner = getattr(model, "model", None)  # 4.57 shows its decoder on the outside, too
    inner = inner if hasattr(inner, family.decoder) else model
    decoder = getattr(inner, family.decoder, None)
    layers = getattr(decoder, "layers", None)
    reason = "it has no language model with layers" if layers is None else _why_not(family, decoder)
    if reason is not None:
        raise UnsupportedModel(f"model: cannot patch {type(model).__name__}: {reason}")
    return Parts(family, inner, decoder)


def _why_not(family: Family, decoder: nn.Module) -> str | None:
    config = decoder.config
    if config.model_type not in family.text:
        known = ", ".join(family.text)
        return f"its language model must be one of {known}, got {config.model_type}"
    kinds = set(layer_kinds(decoder))
    if not kinds <= _LAYER_KINDS:
        return f"it has layers of kind {', '.join(sorted(kinds - _LAYER_KINDS))}"
    for index, (layer, kind) in enumerate(zip(decoder.layers, layer_kinds(decoder), strict=True)):
        for part in ("linear_attn" if kind == LINEAR else "self_attn", "input_layernorm"):
            if not hasattr(layer, part):
                return f"its layer {index} ({type(layer).__name__}) has no {part}"
    if LINEAR in kinds and not hasattr(_cache_utils(), "LinearAttentionLayer"):
        return (
            "this transformers has another cache for linear attention, whose states begin anew "
            "with every call of several tokens; 5.13 and newer are tested"
        )
    if getattr(config, "use_bidirectional_attention", None) == "all":
        return "its attention is not causal (use_bidirectional_attention='all')"
    return why_not_attention(decoder)


def _cache_utils() -> ModuleType:
    from transformers import cache_utils  # with the model, not before

    return cache_utils


def why_not_attention(decoder: nn.Module) -> str | None:
    """Why the attention implementation set now cannot be used; it may change after patching."""
    attention = decoder.config._attn_implementation
    if attention not in (*_ATTENTION, PACKED):
        return f"attn_implementation must be one of {', '.join(_ATTENTION)}, got {attention!r}"
    if "flash" in attention and SLIDING in layer_kinds(decoder):
        return f"{attention} counts sliding windows in stored tokens; use sdpa for this model"
    return None


def why_not_packed(parts: Parts) -> str | None:
    """Why sequences cannot run one behind the other."""
    attention = parts.decoder.config._attn_implementation
    if attention != "sdpa" and "flash" not in attention and attention != PACKED:
        return f"attn_implementation must be sdpa or flash attention, got {attention!r}"
    return None


def why_not_renumber(parts: Parts) -> str | None:
    """Why kept tokens cannot be given new positions."""
    if parts.family.multi_axis:
        return f"{parts.family.name} has rotary positions of time, height and width"
    if SLIDING in layer_kinds(parts.decoder):
        return "this model has sliding windows, which count original positions"
    if hasattr(parts.decoder.rotary_emb, "layer_types"):
        return f"{parts.family.name} has rotary positions for every kind of layer"
    return None


def why_not_drop(decoder: nn.Module, layer: int, scored: bool) -> str | None:
    """Why tokens cannot be dropped in that layer. scored: by what the text attends to there."""
    last = last_drop(decoder)
    if layer > last:
        return (
            f"the last layers read the keys of layer {last}, and would go on seeing what is "
            f"dropped behind it: drop in layer {last} or before"
        )
    scoring = scoring_layers(decoder)
    if scored and layer not in scoring:
        others = ", ".join(map(str, scoring))
        return f"nothing attends to tokens in a layer of linear attention: score in one of {others}"
    return None


def scoring_layers(decoder: nn.Module) -> list[int]:
    """The layers where tokens can be dropped by what the text attends to there."""
    kinds = layer_kinds(decoder)
    return [layer for layer in range(last_drop(decoder) + 1) if kinds[layer] != LINEAR]


def last_drop(decoder: nn.Module) -> int:
    """The last layer where tokens can be dropped.

    Where layers read the keys of an earlier one, it is the first whose keys are read.
    """
    kinds, shared = layer_kinds(decoder), [reads_keys(layer) for layer in decoder.layers]
    if not any(shared):
        return len(kinds) - 1
    first = shared.index(True)
    last_of = {kind: index for index, kind in enumerate(kinds[:first])}
    return min(last_of[kind] for kind in set(kinds[first:]))


def reads_keys(layer: nn.Module) -> bool:
    """Whether the layer has no keys of its own, but those of an earlier layer of its kind."""
    return getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False)


class Layer(NamedTuple):
    """What stays the same of a decoder layer."""

    kind: str
    reads_keys: bool
    by_mask: bool  # a token sees other tokens than all before it


def describe(decoder: nn.Module) -> list[Layer]:
    """Every layer of a decoder."""
    ahead = decoder.config.model_type in _AHEAD
    pairs = zip(layer_kinds(decoder), decoder.layers, strict=True)
    return [Layer(kind, reads_keys(each), ahead or kind == SLIDING) for kind, each in pairs]


def layer_kinds(decoder: nn.Module) -> list[str]:
    """What each layer attends to: everything, a sliding window, or a state of what came before."""
    kinds = getattr(decoder.config, "layer_types", None)
    return list(kinds) if kinds else ["full_attention"] * len(decoder.layers)
