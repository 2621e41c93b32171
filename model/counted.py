"""FLOPs of the real modules at real sizes, counted by torch on the meta device: no weights, no
memory, milliseconds.
"""

from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hico_kernels import DropPlan, counting
from hico_model.config import Config
from hico_model.encoder import Encoder
from hico_model.llm import LanguageModel, Prompt
from hico_model.projector import Connector


@lru_cache(maxsize=8)
def _on_meta(part: type[nn.Module], config: Config) -> nn.Module:
    with torch.device("meta"):
        return part(config).eval().to(torch.bfloat16)


def _blank(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


_counter = partial(FlopCounterMode, display=False)


class Prefill(NamedTuple):
    """FLOPs of one prefill.

    full: all pairs of the causal attention, as torch's formulas count it; causal: those which the
    mask leaves.
    """

    full: int
    causal: int


@cache  # a count never changes
def prefill(config: Config, visual: int, text: int, plan: DropPlan) -> Prefill:
    """FLOPs of reading `visual` and `text` tokens."""
    model = _on_meta(LanguageModel, config)
    prompt = Prompt([], _blank(visual, config.hidden_size), [0] * text)
    with _counter() as full, _counter(custom_mapping=counting.causal()) as causal:
        model.prefill([prompt], plan)
    return Prefill(full.get_total_flops(), causal.get_total_flops())


@cache
def vision(config: Config, frames: int) -> int:
    """FLOPs of encoding, merging and projecting `frames` frames."""
    size = config.image_size
    clips = _blank(frames // config.frames_per_clip, config.frames_per_clip, 3, size, size)
    with torch.no_grad(), _counter() as counter:
        _on_meta(Connector, config)(_on_meta(Encoder, config)(clips))
    return counter.get_total_flops()


def umt(config: Config, layers: int, frames: int) -> int:
    """FLOPs of UMT-L with so many blocks on `frames` frames in one pass."""
    config = replace(config, vision_layers=layers, frames_per_clip=frames)
    clip = _blank(1, frames, 3, config.image_size, config.image_size)
    with torch.no_grad(), _counter() as counter:
        _on_meta(Encoder, config)(clip)
    return counter.get_total_flops()


def siglip(images: int, *, layers: int = 27, head: bool = True) -> int:
    """FLOPs of transformers' SigLIP-SO400M/14 at 384 pixels."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=layers, image_size=384, patch_size=14)
    config.vision_use_head = head
    with torch.device("meta"):
        model = SiglipVisionModel(config).eval().to(torch.bfloat16)
    with torch.no_grad(), _counter() as counter:
        model(pixel_values=_blank(images, 3, 384, 384))
    return counter.get_total_flops()
