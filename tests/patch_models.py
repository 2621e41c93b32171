"""Tiny random models of the families that can be patched, and prompts with video for them."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from hico_kernels.patch.masked import masked

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
VOCAB, IMAGE, VIDEO, START = 97, 90, 91, 92  # START: where the Qwens look for a video
QWEN_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def text(kind: str, **more: Any) -> dict[str, Any]:
    """A language model of 4 layers."""
    return {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Rotary positions of time, height and width."""
    rope = {"rope_type": "default", "mrope_section": sections, **more}
    if VERSION < (5, 0):
        return {"rope_theta": 1e4, "rope_scaling": rope}
    return {"rope_parameters": {"rope_theta": 1e4, **rope}}


@dataclass(frozen=True)
class Tiny:
    """How to make a model, and a video for it: runs of visual tokens with a text token between."""

    config: Any  # () -> config
    video: Any  # (batch, generator) -> inputs of the video
    runs: int
    tokens: int  # in each run
    token: int = VIDEO
    kinds: str | None = None  # the input that says what each token is


def _patches(runs: int, *grid: int, name: str = "video", size: int = 96) -> Any:
    """`runs` videos or images in each sequence, as flat patches."""
    pixels = {"video": "pixel_values_videos", "image": "pixel_values"}[name]

    def make(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = batch * runs * grid[0] * grid[1] * grid[2]
        return {
            pixels: torch.randn(count, size, generator=generator),
            f"{name}_grid_thw": torch.tensor([grid] * batch * runs),
        }

    return make


def _frames(name: str, *shape: int, flat: int = 1) -> Any:
    """Pixels with a frame axis; flat: images of a sequence follow each other in the batch axis."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(batch * flat, *shape, generator=generator)}

    return make


def _video_llama_3_video(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = _patches(1, 3, 4, 4, size=48)(batch, generator)
    return {
        **inputs,
        "video_merge_sizes": torch.full((batch,), 2),
        "video_compression_mask": torch.ones(batch * 12, dtype=torch.bool),
    }


def _qwen2_vl(**more: Any) -> Any:
    config = text("qwen2_vl_text", **mrope([1, 1, 2]), **more)
    return transformers.Qwen2VLConfig(
        text_config=config,
        vision_config=QWEN_VISION,
        vision_start_token_id=START,
        vision_end_token_id=93,
        **IDS,
    )


def _qwen2_5_vl() -> Any:
    vision = {
        **TOWER,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text("qwen2_5_vl_text", **mrope([1, 1, 2])),
        vision_config=vision,
        vision_start_token_id=START,
        vision_end_token_id=93,
        **IDS,
    )


def _qwen3_vl() -> Any:
    vision = {
        **TOWER,
        "depth": 3,
        "num_heads": 2,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 64,
    }
    return transformers.Qwen3VLConfig(
        text_config=text("qwen3_vl_text", **mrope([1, 1, 2], mrope_interleaved=True)),
        vision_config=vision,
        vision_start_token_id=START,
        vision_end_token_id=93,
        **IDS,
    )


def _glm4v() -> Any:
    vision = {
        **TOWER,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "image_size": 32,
    }
    return transformers.Glm4vConfig(
        text_config=text("glm4v_text", **mrope([1, 1, 2])),
        vision_config=vision,
        image_start_token_id=START,
        image_end_token_id=93,
        video_start_token_id=94,
        video_end_token_id=95,
        **IDS,
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=text("qwen2"),
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, **TOWER},
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
        **IDS,
    )


def _llava_next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        text_config=text("llama"),
        vision_config={"model_type": "clip_vision_model", "image_size": 16, **TOWER},
        vision_feature_layer=-1,
        spatial_pool_stride=2,
        image_grid_pinpoints=[[16, 16]],
        **IDS,
    )


def _internvl(kind: str) -> Any:
    tower = {"model_type": "internvl_vision", "image_size": [16, 16], **TOWER, "patch_size": [4, 4]}
    return transformers.InternVLConfig(
        text_config=text(kind), vision_config=tower, downsample_ratio=0.5, image_token_id=IMAGE
    )


def _video_llama_3() -> Any:
    return transformers.VideoLlama3Config(
        text_config=text("qwen2"),
        vision_config={"model_type": "video_llama_3_vision", **TOWER},
        **IDS,
    )


def _smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        text_config=text("llama"),
        vision_config={"model_type": "smolvlm_vision", "image_size": 16, **TOWER},
        scale_factor=2,
        image_token_id=IMAGE,
    )


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    return transformers.Gemma3Config(
        text_config=text("gemma3_text", sliding_window=20, layer_types=kinds),
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, **TOWER},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def _gemma4(kinds: str, **more: Any) -> Any:
    """kinds: s, a sliding window, or f, full attention, for every layer."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    vision = {
        **TOWER,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
    }
    config = text(
        "gemma4_text",
        sliding_window=20,
        layer_types=[names[kind] for kind in kinds],
        global_head_dim=16,
        vocab_size_per_layer_input=VOCAB,
        **more,
    )
    made = transformers.Gemma4Config(
        text_config={**config, "num_hidden_layers": len(kinds)},
        vision_config={"model_type": "gemma4_vision", **vision},
        audio_config=None,
        **IDS,
    )
    made._experts_implementation = "eager"  # the default takes no float64
    return made


def _gemma4_video(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """3 frames of 4 x 4 patches; 2 x 2 of them are a token."""
    at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    pixels = torch.rand(batch * 3, 16, 48, generator=generator)
    places = at.flatten(0, 1).expand(batch * 3, -1, -1)
    more = {"num_frames_per_video": torch.full((batch,), 3)}
    taken = inspect.signature(transformers.Gemma4Model.forward).parameters
    if "num_frames_per_video" not in taken:  # an axis for the videos instead
        pixels, places, more = pixels.unflatten(0, (-1, 3)), places.unflatten(0, (-1, 3)), {}
    return {"pixel_values_videos": pixels, "video_position_ids": places, **more}


def _qwen3_5(kinds: str = "lfffl", experts: bool = False) -> Any:
    """kinds: l, linear attention, or f, full attention, for every layer."""
    vision = {
        **TOWER,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
    }
    names = {"l": "linear_attention", "f": "full_attention"}
    name, more = "Qwen3_5", {}
    if experts:
        name, more = "Qwen3_5Moe", {"num_experts": 4, "num_experts_per_tok": 2}
        more |= {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    config = text(
        "qwen3_5_moe_text" if experts else "qwen3_5_text",
        layer_types=[names[kind] for kind in kinds],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **mrope([1, 1, 2], mrope_interleaved=True, partial_rotary_factor=1.0),
        **more,
    )
    made = getattr(transformers, f"{name}Config")(
        text_config={**config, "num_hidden_layers": len(kinds)},
        vision_config=vision,
        vision_start_token_id=START,
        vision_end_token_id=93,
        **IDS,
    )
    made._experts_implementation = "eager"  # the default takes no float64
    return made


FRAMES = (3, 3, 16, 16)
MODELS = {
    "qwen2_vl": Tiny(_qwen2_vl, _patches(1, 2, 4, 6), 1, 12, kinds="mm_token_type_ids"),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, _patches(1, 2, 4, 6), 1, 12, kinds="mm_token_type_ids"),
    "qwen3_vl": Tiny(_qwen3_vl, _patches(1, 2, 4, 6), 2, 6, kinds="mm_token_type_ids"),
    "glm4v": Tiny(
        _glm4v, _patches(2, 1, 4, 6, name="image"), 2, 6, IMAGE, kinds="mm_token_type_ids"
    ),
    "llava_onevision": Tiny(_llava_onevision, _frames("pixel_values_videos", *FRAMES), 1, 13),
    "llava_next_video": Tiny(_llava_next_video, _frames("pixel_values_videos", *FRAMES), 1, 12),
    "internvl": Tiny(
        lambda: _internvl("qwen2"), _frames("pixel_values", 3, 16, 16, flat=3), 3, 4, IMAGE
    ),
    "internvl-qwen3": Tiny(
        lambda: _internvl("qwen3"), _frames("pixel_values", 3, 16, 16, flat=3), 3, 4, IMAGE
    ),
    "video_llama_3": Tiny(_video_llama_3, _video_llama_3_video, 1, 12),
    "smolvlm": Tiny(_smolvlm, _frames("pixel_values", *FRAMES), 3, 4, IMAGE),
    "gemma3": Tiny(
        _gemma3, _frames("pixel_values", 3, 16, 16, flat=3), 3, 4, IMAGE, kinds="token_type_ids"
    ),
    # The last two layers read the keys of the two before.
    "gemma4": Tiny(
        lambda: _gemma4("sfssfsf", hidden_size_per_layer_input=6, num_kv_shared_layers=2),
        _gemma4_video,
        3,
        4,
        kinds="mm_token_type_ids",
    ),
    "gemma4-experts": Tiny(
        lambda: _gemma4(
            "sfsf",
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            use_bidirectional_attention="vision",
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=12,
        ),
        _gemma4_video,
        3,
        4,
        kinds="mm_token_type_ids",
    ),
    "qwen3_5": Tiny(_qwen3_5, _patches(1, 2, 4, 6), 2, 6, kinds="mm_token_type_ids"),
    "qwen3_5_moe": Tiny(
        lambda: _qwen3_5(experts=True), _patches(1, 2, 4, 6), 2, 6, kinds="mm_token_type_ids"
    ),
}
if hasattr(transformers, "Qwen3_5Config"):
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    def _in_double(stock: Any) -> Any:
        """The gated delta rule, token by token, for float64: `stock` computes in float32."""

        def rule(query, key, value, g, beta, initial_state=None, **settings):
            if query.dtype != torch.float64:
                return stock(query, key, value, g, beta, initial_state=initial_state, **settings)
            groups = value.shape[2] // key.shape[2]
            query, key = (
                torch.nn.functional.normalize(x, dim=-1, eps=1e-3).repeat_interleave(groups, 2)
                for x in (query, key)
            )
            query, out = query * query.shape[-1] ** -0.5, torch.empty_like(value)
            state = key.new_zeros(*value[:, 0].shape[:2], key.shape[-1], value.shape[-1])
            state = state if initial_state is None else initial_state
            for i in range(query.shape[1]):
                q, k, v = (x[:, i, :, :, None] for x in (query, key, value))
                state = state * g[:, i, :, None, None].exp()
                change = v.mT - k.mT @ state
                state = state + k * beta[:, i, :, None, None] * change
                out[:, i] = (q.mT @ state)[:, :, 0]
            return out, state

        return rule

    for _module in (modeling_qwen3_5, modeling_qwen3_5_moe):
        for _name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            setattr(_module, _name, _in_double(getattr(_module, _name)))
NEEDS = {
    "video_llama_3": "VideoLlama3Config",
    "gemma4": "Gemma4Config",
    "gemma4-experts": "Gemma4Config",
    "qwen3_5": "Qwen3_5Config",
    "qwen3_5_moe": "Qwen3_5MoeConfig",
}
for _name, _config in NEEDS.items():
    if not hasattr(transformers, _config):
        del MODELS[_name]
if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
    for _name in ("qwen3_5", "qwen3_5_moe"):
        MODELS.pop(_name, None)


@cache
def model(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> torch.nn.Module:
    """A model with random weights; shared, so a test must take its patch off again."""
    return fresh(name, dtype, attention)


def fresh(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **more: Any
) -> torch.nn.Module:
    """A model of one's own."""
    torch.manual_seed(0)
    config = MODELS[name].config(**more)
    made = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation=attention
    )
    with torch.no_grad():  # larger than the default: attention that is nearly even hides mistakes
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
        table = made.get_input_embeddings().weight
        table[0] = table[-1]  # zeros would stay zeros in every layer: padding that is unseen anyway
    return made.eval().to(dtype)


def prompt(
    name: str,
    padding: tuple[int, ...] = (0,),
    *,
    side: str = "left",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    after: int = 5,
) -> dict[str, Tensor]:
    """Inputs with a row for each entry of `padding`, the number of padded tokens in it."""
    tiny, batch = MODELS[name], len(padding)
    generator = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for pads in padding:
        body = torch.randint(3, 80, (4,), generator=generator).tolist()
        for _ in range(tiny.runs):
            if tiny.kinds == "mm_token_type_ids":
                body[-1] = START
            body += [tiny.token] * tiny.tokens
            body += torch.randint(3, 80, (1,), generator=generator).tolist()
        body += torch.randint(3, 80, (after + max(padding) - pads,), generator=generator).tolist()
        pad = [0] * pads
        rows.append(pad + body if side == "left" else body + pad)
        real = [1] * len(body)
        masks.append(pad + real if side == "left" else real + pad)
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor(masks)}
    if tiny.kinds == "token_type_ids" or (tiny.kinds and VERSION >= (5, 3)):
        kind = 2 if tiny.token == VIDEO else 1
        inputs[tiny.kinds] = (ids == tiny.token) * kind
    for key, value in tiny.video(batch, generator).items():
        inputs[key] = value.to(dtype) if value.is_floating_point() else value
    return inputs


def generate(tiny: torch.nn.Module, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Greedy, 6 new tokens, with logits; never a placeholder, which a reference without a cache
    would count again.
    """
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [2, *range(90, 97)],  # 2 ends an answer
        **more,
    }
    with torch.no_grad():
        return tiny.generate(**inputs, **settings)


def decoder(tiny: torch.nn.Module) -> torch.nn.Module:
    """The language model."""
    inner = tiny.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


def reference(tiny: torch.nn.Module, handle: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """What a patched `generate` must equal: nothing dropped, the same tokens masked, no cache."""
    length = inputs["input_ids"].shape[1]
    renumber = handle.plan.positions == "renumber"
    with masked(decoder(tiny), handle.kept, length, renumber=renumber):
        return generate(tiny, inputs, use_cache=False, **more)


def difference(got: Any, want: Any) -> float:
    """The largest difference of a logit; infinite where other tokens were generated."""
    if not torch.equal(got.sequences, want.sequences):
        return float("inf")
    pairs = zip(got.logits, want.logits, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)
