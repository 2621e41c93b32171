"""What happened on the way to an answer, stage by stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hico_model.video import VideoInfo


@dataclass(frozen=True)
class Stage:
    """One stage: the shape and number of tokens of its result (0 for pixels), and its duration."""

    name: str
    shape: tuple[int, ...]
    tokens: int
    seconds: float  # wall clock; the device has finished


@dataclass(frozen=True)
class Trace:
    """An answer's way: N clips of T encoder tokens and K visual tokens. Tensors are on the CPU."""

    stages: list[Stage]
    video: VideoInfo
    times: list[float]  # seconds, of every frame that was looked at
    frames: np.ndarray  # [F, S, S, 3] uint8, as the encoder saw them
    assignment: Tensor  # [N, T] int32, the visual token that an encoder token went into
    sizes: Tensor  # [N, K] int32, encoder tokens behind a visual token
    kept: dict[int, Tensor]  # drop layer -> visual tokens that stay, ascending in 0..num_visual-1
    scores: dict[int, Tensor]  # text-guided drop -> of the visual tokens there were, before it
    num_visual: int
    num_text: int
    layer_tokens: list[int]  # rows that each layer saw of the prompt
    kv_bytes: int  # keys and values, with the room for new tokens
    new_tokens: list[int]  # ids of the answer
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What the model said, and how it came to it."""

    text: str
    trace: Trace


class Recorder:
    """Call it with the result of every stage; each took the time since the call before.

    A stage that runs in batches is recorded with each of them: durations, tokens and the first
    sizes of the shapes add up.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stages: dict[str, Stage] = {}
        self._last = time.perf_counter()

    @property
    def stages(self) -> list[Stage]:
        """In the order of their first call."""
        return list(self._stages.values())

    def __call__(self, name: str, shape: Sequence[int], tokens: int) -> None:
        """Record what the stage made, once the device has made it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds = now - self._last
        if past := self._stages.get(name):
            shape = (past.shape[0] + shape[0], *shape[1:])
            tokens, seconds = past.tokens + tokens, past.seconds + seconds
        self._stages[name] = Stage(name, tuple(shape), tokens, seconds)
        self._last = now
