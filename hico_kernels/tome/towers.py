"""Which vision towers can be patched, and where their parts are. What is not here is refused."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hico_kernels.patch.families import UnsupportedModel


@dataclass(frozen=True)
class Kind:
    """What merging needs to know about a kind of block."""

    attention: str
    norm: str  # in front of attention
    prefix: Callable[[nn.Module], int] = lambda tower: 0  # tokens in front that never merge
    tables: str | None = None  # argument of a block that holds rotary tables of the patches
    padded: bool = False  # whether images of a batch may be padded, told by attention_mask
    packed: bool = False  # whether frames follow each other, and groups of patches become one token


def _registers(tower: nn.Module) -> int:
    return 1 + tower.config.num_register_tokens


def _timm_prefix(tower: nn.Module) -> int:
    return tower.num_prefix_tokens


def _one(tower: nn.Module) -> int:
    return 1


_CLIP = {"CLIPEncoderLayer": Kind("self_attn", "layer_norm1", _one)}
_SIGLIP = {"SiglipEncoderLayer": Kind("self_attn", "layer_norm1")}
_PACKED = Kind("attn", "norm1", tables="position_embeddings", packed=True)
# Class of the tower -> its block classes, by library: others have towers of the same name.
TOWERS = {
    "transformers": {
        "ViTModel": {"ViTLayer": Kind("attention", "layernorm_before", _one)},
        "CLIPVisionModel": _CLIP,
        "CLIPVisionTransformer": _CLIP,
        "CLIPVisionModelWithProjection": _CLIP,
        "SiglipVisionModel": _SIGLIP,
        "SiglipVisionTransformer": _SIGLIP,
        "Siglip2VisionModel": {
            "Siglip2EncoderLayer": Kind("self_attn", "layer_norm1", padded=True)
        },
        "VideoMAEModel": {"VideoMAELayer": Kind("attention", "layernorm_before")},
        "Dinov2Model": {"Dinov2Layer": Kind("attention", "norm1", _one)},
        "Dinov2WithRegistersModel": {
            "Dinov2WithRegistersLayer": Kind("attention", "norm1", _registers)
        },
        "DINOv3ViTModel": {
            "DINOv3ViTLayer": Kind("attention", "norm1", _registers, "position_embeddings")
        },
        "Qwen2VisionTransformerPretrainedModel": {"Qwen2VLVisionBlock": _PACKED},
        "Qwen2_5_VisionTransformerPretrainedModel": {"Qwen2_5_VLVisionBlock": _PACKED},
        "Qwen3VLVisionModel": {"Qwen3VLVisionBlock": _PACKED},
        "Qwen3VLMoeVisionModel": {"Qwen3VLMoeVisionBlock": _PACKED},
        "Qwen3_5VisionModel": {"Qwen3_5VisionBlock": _PACKED},
        "Qwen3_5MoeVisionModel": {"Qwen3_5MoeVisionBlock": _PACKED},
        "InternVLVisionModel": {"InternVLVisionLayer": Kind("attention", "layernorm_before", _one)},
    },
    "timm": {
        "VisionTransformer": {"Block": Kind("attn", "norm1", _timm_prefix)},
        "VisionTransformerDistilled": {"Block": Kind("attn", "norm1", _timm_prefix)},
        "Eva": {"EvaBlock": Kind("attn", "norm1", _timm_prefix, "rope")},
    },
}


@dataclass(frozen=True)
class Block:
    """A block of a tower, with the parts that merging works on."""

    module: nn.Module
    attention: nn.Module
    norm: nn.Module


@dataclass(frozen=True)
class Parts:
    """A tower taken apart."""

    kind: Kind
    prefix: int
    blocks: tuple[Block, ...]
    merging: tuple[int, ...]  # which blocks merge
    unit: int = 0  # patches that the patch merger of a packed tower joins
    mergers: tuple[nn.Module, ...] = ()


def take_apart(tower: nn.Module) -> Parts:
    """The parts of a tower; raises `UnsupportedModel` with the reason when it cannot be patched."""
    if not isinstance(tower, nn.Module):
        raise TypeError(f"vision_tower must be a torch.nn.Module, got {type(tower).__name__}")
    known = _known(tower)
    if known is None:
        raise UnsupportedModel(f"vision_tower: cannot patch {type(tower).__name__}: {_hint(tower)}")
    found = _blocks(tower)
    strange = sorted({type(m).__name__ for m in found} - set(known))
    if strange or not found:
        raise UnsupportedModel(
            f"vision_tower: cannot patch {type(tower).__name__}: its blocks must be "
            f"{', '.join(known)}, got {', '.join(strange) or 'none'}"
        )
    kind = known[type(found[0]).__name__]
    blocks = tuple(Block(m, _part(m, kind.attention), _part(m, kind.norm)) for m in found)
    pool = getattr(tower, "attn_pool", None)  # timm's
    reason = why_not_fused(tower, blocks)
    if pool is not None and type(pool).__name__ != "AttentionPoolLatent":
        reason = f"its pooling must be AttentionPoolLatent, got {type(pool).__name__}"
    if reason is not None:
        raise UnsupportedModel(f"vision_tower: cannot patch {type(tower).__name__}: {reason}")
    if not kind.packed:
        return Parts(kind, kind.prefix(tower), blocks, tuple(range(len(blocks))))
    mergers = (tower.merger, *getattr(tower, "deepstack_merger_list", ()))
    unit = tower.spatial_merge_size**2
    return Parts(kind, kind.prefix(tower), blocks, _in_windows(tower, len(blocks)), unit, mergers)


def _in_windows(tower: nn.Module, depth: int) -> tuple[int, ...]:
    """The blocks that attend in windows (Qwen2.5-VL), or all where none does."""
    full = getattr(tower, "fullatt_block_indexes", range(depth))
    return tuple(i for i in range(depth) if i not in full) or tuple(range(depth))


def why_not_fused(tower: nn.Module, blocks: tuple[Block, ...]) -> str | None:
    """Why the attention set now cannot be met; it may change after patching."""
    if _library(tower) == "transformers":
        implementation = tower.config._attn_implementation
        if implementation != "sdpa":
            return f"attn_implementation must be 'sdpa', got {implementation!r}"
    elif not all(getattr(block.attention, "fused_attn", False) for block in blocks):
        return "its attention must be fused (timm.layers.set_fused_attn), got an unfused block"
    return None


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _known(module: nn.Module) -> dict[str, Kind] | None:
    return TOWERS.get(_library(module), {}).get(type(module).__name__)


def _blocks(tower: nn.Module) -> list[nn.Module]:
    lists = (
        part
        for name, part in tower.named_modules()
        if name.rpartition(".")[2] in ("blocks", "layers", "layer")
        and isinstance(part, nn.ModuleList | nn.Sequential)
    )
    return [block for part in lists for block in part]


def _part(block: nn.Module, name: str) -> nn.Module:
    part = getattr(block, name, None)
    if not isinstance(part, nn.Module):
        raise UnsupportedModel(
            f"vision_tower: cannot patch {type(block).__name__}: it has no {name}"
        )
    return part


def _hint(module: nn.Module) -> str:
    inside = [name for name, part in module.named_modules() if name and _known(part)]
    if inside:
        return f"pass the vision tower in it, .{inside[0]}"
    towers = ", ".join(f"{lib} ({', '.join(names)})" for lib, names in TOWERS.items())
    return f"the supported towers are {towers}"
