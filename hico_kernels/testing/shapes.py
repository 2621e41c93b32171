"""The shapes that real models give the operations, by name: one list for tests and benchmarks."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipShape:
    """What an encoder gives for a clip (or a frame, an image), and what merging makes of it."""

    tokens: int
    channels: int
    heads: int
    keep: int = 64


@dataclass(frozen=True)
class LlmShape:
    """Attention of one decoder layer over a video at 16 tokens a frame and the text around it."""

    frames: int
    text: int = 100
    heads: int = 28
    kv_heads: int = 4
    head_width: int = 128

    @property
    def visual(self) -> int:
        """Visual tokens before any drop."""
        return 16 * self.frames

    @property
    def tokens(self) -> int:
        """Rows of the packed sequence before any drop."""
        return self.visual + self.text

    @property
    def channels(self) -> int:
        """Width of a hidden row."""
        return self.heads * self.head_width


CLIPS = {
    "umt224_clip": ClipShape(784, 1024, 16),
    "umt448_clip": ClipShape(3136, 1024, 16),
    "wide_clip": ClipShape(1024, 1024, 16),
    "internvideo2_clip": ClipShape(1024, 1408, 16),
    "siglip_frame": ClipShape(729, 1152, 16),
    "umt224_image": ClipShape(196, 1024, 16),
}
LLMS = {f"qwen2_{frames}frames": LlmShape(frames) for frames in (64, 256, 1000, 10000)}

# Lengths of the sequences of a batch: after a drop they differ, some are far shorter, some empty.
RAGGED = {
    "one": (37,),
    "even": (16, 16, 16),
    "mixed": (5, 1, 9, 3),
    "with_empty": (0, 6, 0, 2, 0),
    "tile_edges": (63, 64, 65, 128, 1),
    "one_long": (2, 190, 3),
}


def cu_seqlens(
    lengths, device: torch.device | str = "cpu", dtype: torch.dtype = torch.int32
) -> Tensor:
    """Cumulative lengths [B+1] of sequences with these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=device)
