"""Tiny random vision towers of every supported kind, and pictures for them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}


def picture(batch: int = 2) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 24, 24)}


def wide_picture() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 20, 28)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def padded() -> dict[str, Any]:
    """Two pictures of 6 x 6 and 4 x 5 patches, padded to 36."""
    mask = torch.ones(2, 36, dtype=torch.int64)
    mask[1, 20:] = 0
    shapes = torch.tensor([[6, 6], [4, 5]])
    return {
        "pixel_values": torch.randn(2, 36, 48),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


@dataclass(frozen=True)
class Tower:
    """How to make one, what to show it, and how many of its tokens are no patches."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = picture
    prefix: int = 0


def _of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config_ = getattr(transformers, config)(**{**SIZE, **settings})
        return getattr(transformers, model)(config_)

    return make


INTERNVL = {
    "model": "InternVLVisionModel",
    "config": "InternVLVisionConfig",
    "image_size": [24, 24],
    "patch_size": [4, 4],
    "layer_scale_init_value": 0.3,
}
HF = {
    "vit": Tower(_of("ViTModel", "ViTConfig"), prefix=1),
    "clip": Tower(_of("CLIPVisionModel", "CLIPVisionConfig"), prefix=1),
    "siglip": Tower(_of("SiglipVisionModel", "SiglipVisionConfig")),
    "siglip2": Tower(_of("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=36), padded),
    "videomae": Tower(
        _of("VideoMAEModel", "VideoMAEConfig", image_size=16, num_frames=4, tubelet_size=2), video
    ),
    "dinov2": Tower(_of("Dinov2Model", "Dinov2Config", layerscale_value=0.3), prefix=1),
    "dinov2_registers": Tower(
        _of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4),
        prefix=5,
    ),
    "dinov3": Tower(
        _of("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, layerscale_value=0.3),
        wide_picture,
        prefix=5,
    ),
    "internvl": Tower(_of(**INTERNVL), prefix=1),
    "internvl_norms": Tower(_of(**INTERNVL, use_qk_norm=True, norm_type="rms_norm"), prefix=1),
}


# Towers that end in a patch merger: two frames, a wide picture and a picture, one behind the other.
GRIDS = [[2, 8, 8], [1, 4, 12], [1, 8, 8]]


def grids() -> dict[str, Any]:
    patches = sum(t * h * w for t, h, w in GRIDS)
    return {"hidden_states": torch.randn(patches, 96), "grid_thw": torch.tensor(GRIDS)}


def _packed(module: str, model: str, config: str, **settings: Any) -> Tower:
    def make() -> nn.Module:
        code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        size = {"depth": 3, "num_heads": 2, "patch_size": 4, **settings}
        return getattr(code, model)._from_config(
            getattr(code, config)(**size), attn_implementation="sdpa"
        )

    return Tower(make, grids)


QWEN = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24}
PACKED = {
    "qwen2_vl": _packed(
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        embed_dim=32,
        hidden_size=24,
        mlp_ratio=2,
    ),
    "qwen3_vl": _packed(
        "qwen3_vl",
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        **QWEN,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
    ),
    "qwen3_vl_moe": _packed(
        "qwen3_vl_moe",
        "Qwen3VLMoeVisionModel",
        "Qwen3VLMoeVisionConfig",
        **QWEN,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
    ),
    "qwen3_5": _packed(
        "qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", **QWEN, num_position_embeddings=64
    ),
    "qwen3_5_moe": _packed(
        "qwen3_5_moe",
        "Qwen3_5MoeVisionModel",
        "Qwen3_5MoeVisionConfig",
        **QWEN,
        num_position_embeddings=64,
    ),
    # Windows of 3 x 3 groups and less: 9, 3, 3 and 1 in a frame of 4 x 4.
    "qwen2_5_vl": _packed(
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        **QWEN,
        depth=5,
        window_size=24,
        fullatt_block_indexes=[0, 3],
    ),
}
# Not in every release of transformers.
for _name in ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
    if importlib.util.find_spec(f"transformers.models.{_name}") is None:
        del PACKED[_name]


def tower(kind: Tower, seed: int = 0) -> nn.Module:
    """With weights large enough that every part of a block shows in the output."""
    torch.manual_seed(seed)
    made = kind.make().eval().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return made


def inputs(kind: Tower, seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    made = kind.inputs()
    return {k: v.double() if v.is_floating_point() else v for k, v in made.items()}


def last(output: Any) -> Tensor:
    """The tokens a tower ends with."""
    return output if torch.is_tensor(output) else output.last_hidden_state


def angles(tables: Any) -> Any:
    """Cosines and sines of a rotary table: transformers hands over both, timm one behind the
    other, sines first."""
    if tables is None or isinstance(tables, tuple):
        return tables
    sin, cos = tables.chunk(2, dim=-1)
    return cos, sin
