"""Clips -> tokens: the UMT-L video encoder, which attends over all patches of a clip of 4 frames.

Module and parameter names are those of the checkpoints below
`model.vision_tower.vision_tower.encoder.`.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hico_model.config import Config

PRETRAINED_GRID = 14  # patches along a side at 224 pixels


class PatchEmbed(nn.Module):
    """clips [N, T, 3, S, S] -> [N, T * L, C], frame after frame, row after row."""

    def __init__(self, config: Config):
        super().__init__()
        patch = (1, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.vision_width, patch, stride=patch)

    def forward(self, clips: Tensor) -> Tensor:
        """As the class says."""
        # The kernel is one frame deep. As a 2-D convolution: 1.1 to 1.7 times faster on CPU.
        weight = self.proj.weight.squeeze(2)
        x = F.conv2d(clips.flatten(0, 1), weight, self.proj.bias, stride=weight.shape[-1])
        return x.flatten(2).transpose(1, 2).unflatten(0, clips.shape[:2]).flatten(1, 2)


class Attention(nn.Module):
    """Self-attention over all tokens of a clip; queries and values have a bias, keys none."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.vision_width
        self.num_heads = config.vision_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, C] -> [N, T, C]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, H, T, D] each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (exact), Linear."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.vision_mlp_ratio * config.vision_width
        self.fc1 = nn.Linear(config.vision_width, hidden)
        self.fc2 = nn.Linear(hidden, config.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, C] -> [N, T, C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block without layer scale."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.vision_width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.vision_width, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, C] -> [N, T, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """clips [N, T, 3, S, S] -> tokens [N, T * L, C], of T = 4 frames or 1 still image.

    L patches per frame. Clips do not see each other: encode a long video in slices.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vision_layers))
        self.vision_layernorm = nn.LayerNorm(config.vision_width, eps=1e-12)

    def forward(self, clips: Tensor) -> Tensor:
        """As the class says. Raises ValueError for other shapes."""
        c = self.config
        frame = (3, c.image_size, c.image_size)
        shape = tuple(clips.shape)
        if shape[2:] != frame or shape[1] not in (1, c.frames_per_clip):
            want = f"[N, {c.frames_per_clip} or 1, 3, {c.image_size}, {c.image_size}]"
            raise ValueError(f"clips must be {want}, got {shape}")
        x = self.patch_embed(clips)
        grid = c.image_size // c.patch_size
        x = x + _positions(clips.shape[1], grid, c.vision_width, x.device, x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.vision_layernorm(x)


@torch.compiler.assume_constant_result  # else a compiled encoder makes the table on every call
def _positions(*key) -> Tensor:
    return position_table(*key)


@lru_cache(maxsize=16)
def position_table(
    frames: int,
    grid: int,
    width: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions [1, frames * grid * grid, width] that are added to the patches.

    Sines (even channels) and cosines (odd) of the place in the flattened frames x 14 x 14 grid;
    for larger frames each 14 x 14 table is stretched bicubically. No checkpoint has them. Cached,
    not a buffer: a model built on the meta device has no data for one, and a cast to bfloat16 and
    back would round it.
    """
    places = np.arange(frames * PRETRAINED_GRID**2)[:, None]
    angles = places / np.power(10000, 2 * (np.arange(width) // 2) / width)
    angles[:, 0::2] = np.sin(angles[:, 0::2])
    angles[:, 1::2] = np.cos(angles[:, 1::2])
    table = torch.from_numpy(angles).float()
    if grid != PRETRAINED_GRID:
        table = table.view(frames, PRETRAINED_GRID, PRETRAINED_GRID, width).permute(0, 3, 1, 2)
        table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)
    return table.reshape(1, -1, width).to(device, dtype)
