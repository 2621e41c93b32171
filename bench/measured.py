"""What stands beside the papers' tables: time and memory to the first token, with random weights.

On a CUDA device at the real sizes, in bfloat16, in a process that may take 80 GB as on the papers'
cards; else with the `nano` model at an eighth of the tokens per frame, in float32, so that the code
and the shape of the curve are seen.
"""

import functools
import gc
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.results import short
from hico_kernels import DropPlan
from hico_kernels.flops import CARD_BYTES, cost
from hico_model.config import Config, presets
from hico_model.llm import LanguageModel, Prompt
from hico_model.model import VideoChatFlash
from hico_model.pipeline import encode
from hico_model.trace import Recorder

FRAMES = (64, 256, 1000, 10_000)
NEW_TOKENS = 16
CPU_FLOPS = 5e12  # of a prefill: about half a minute
LONG_FLOPS = 3e15  # on a GPU: above 10 s, so they come last, in case time is up before
STAGES = {"clips": "clips_s", "encoder": "encode_s", "merge": "merge_s", "projector": "project_s"}


@dataclass(frozen=True)
class System:
    """A model that reads videos: its sizes, and what it makes of a frame."""

    config: Config
    tokens_per_frame: int
    plan: DropPlan
    vision: bool  # whether encoder, merge and projector run; else random tokens are read

    def flops(self, frames: int) -> int:
        """Of its language model's prefill."""
        decoder = self.config.decoder
        return cost(decoder, frames=frames, tokens_per_frame=self.tokens_per_frame).flops


@functools.cache
def systems(device: str) -> dict[str, System]:
    """Table 1's systems by name. Only VideoChat-Flash has a vision part here: of the others the
    table counts the language model alone."""
    if device == "cuda":
        qwen, share = presets["7b-1m-224"], 1
        llama = replace(  # Llama-3-8B's sizes; its own rotary base changes no cost
            qwen,
            name="llama-3-8b",
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            vocab_size=128256,
        )
    else:
        share = 8
        qwen = llama = replace(
            presets["nano"], image_size=64, tokens_per_clip=64 // share, max_positions=1 << 20
        )
    none = DropPlan({})
    return {
        "videochat_flash": System(qwen, 16 // share, none, True),
        "videochat_flash_drop": System(qwen, 16 // share, qwen.plan, True),
        "longva": System(qwen, 144 // share, none, False),
        "longvila": System(llama, 196 // share, none, False),
    }


def cases(device: str, timed: bool) -> list[tuple[str, int]]:
    """System and frames of Table 1, as far as this device gets in minutes."""
    if not timed and device == "cpu":
        return [(name, FRAMES[0]) for name in systems(device)]
    found = [(name, frames) for name in systems(device) for frames in FRAMES]

    def flops(case: tuple[str, int]) -> int:
        return systems(device)[case[0]].flops(case[1])

    if device == "cpu":
        return [case for case in found if flops(case) < CPU_FLOPS]
    return sorted(found, key=lambda case: flops(case) > LONG_FLOPS)  # models stay together


def limit_memory() -> None:
    """Give this process no more of the CUDA device than the papers' card has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total))


@functools.lru_cache(maxsize=1)  # two do not fit
def _model(config: Config, vision: bool, device: str) -> nn.Module:
    """With random weights, drawn on the device: that takes a second instead of a minute."""
    with torch.device("meta"):
        model = VideoChatFlash(config, device="meta") if vision else LanguageModel(config)
    model = model.eval().to(dtype_of(device)).to_empty(device=device)
    for weight in model.parameters():
        weight.data.fill_(1.0) if weight.dim() < 2 else weight.data.normal_(std=0.02)
    return model


def dtype_of(device: str) -> torch.dtype:
    """What models run in there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def dtype_name(device: str) -> str:
    """The same in the name of a benchmark."""
    return short(dtype_of(device))


def first_token(
    system: System, frames: int, device: str, *, text: int = 128, plan: DropPlan | None = None
) -> dict[str, Any]:
    """Seconds by stage, bytes, and tokens a second after the first; "oom" where 80 GB do not do.

    plan: instead of the system's.
    """
    head = {
        "seconds": 0.0,
        "size": system.config.name,
        "frames": frames,
        "tokens_per_frame": system.tokens_per_frame,
    }
    plan = system.plan if plan is None else plan
    if device == "cuda":
        limit_memory()
    try:
        _warm_up(system, device, text, plan)
        return head | _first_token(system, frames, device, text, plan)
    except torch.OutOfMemoryError:
        return head | {"oom_at_gb": CARD_BYTES / 1e9}
    finally:
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@functools.cache
def _warm_up(system: System, device: str, text: int, plan: DropPlan) -> None:
    """Load and compile what the first run would wait for, on one clip."""
    _first_token(system, system.config.frames_per_clip, device, text, plan)


@torch.no_grad()
def _first_token(
    system: System, frames: int, device: str, text: int, plan: DropPlan
) -> dict[str, Any]:
    config, place = system.config, torch.device(device)
    model = _model(config, system.vision, device)
    llm = model.llm if system.vision else model
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if system.vision:
        shape = (frames, config.image_size, config.image_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        record = Recorder(place)
        visual, _, _ = encode(pixels, model, record)
    else:
        shape = (frames * system.tokens_per_frame, config.hidden_size)
        visual = torch.randn(shape, device=device, dtype=dtype_of(device))
        record = Recorder(place)
    prompt = Prompt([], visual, [0] * text)
    result = llm.prefill(
        [prompt], plan, room=NEW_TOKENS, watch=lambda name, x: record(name, x.shape, len(x))
    )
    tokens = result.logits.argmax(dim=-1)
    record("LLM head", tokens.shape, 1)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    spent = dict.fromkeys([*STAGES.values(), "prefill_s", "drop_s"], 0.0)
    for stage in record.stages:
        inside = "drop_s" if stage.name.startswith("drop") else "prefill_s"
        spent[STAGES.get(stage.name, inside)] += stage.seconds
    first = sum(spent.values())
    start = time.perf_counter()
    for _ in range(NEW_TOKENS):
        tokens = llm.decode(tokens, result.cache).argmax(dim=-1)
    tokens.tolist()  # waits for the device
    decode = time.perf_counter() - start
    return {
        "seconds": first,
        "first_token_s": _rounded(first),
        **{name: _rounded(seconds) for name, seconds in spent.items()},
        "frames_per_s": _rounded(frames / first),
        "decode_tokens_per_s": _rounded(NEW_TOKENS / decode),
        "peak_gb": peak and _rounded(peak / 1e9),
        "kv_gb": _rounded(result.cache.bytes / 1e9),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
