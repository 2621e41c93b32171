"""A whole Qwen2-VL tower with merging: patched, merged by hand in plain torch, and as it is."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from bench import alternatives
from hico_kernels import tome

UNIT = 4  # patches of a group


@dataclass(frozen=True)
class Frames:
    """Frames of side x side patches in one call, on a GPU and on a CPU; groups merged per block."""

    side: int
    number: dict[str, int]
    r: int
    channels: int = 1280
    heads: int = 16
    depth: int = 32
    out: int = 1536

    @property
    def groups(self) -> int:
        return self.side**2 // UNIT


FRAMES = {  # half of the groups is left
    "qwen2_vl_16x16": Frames(16, {"cuda": 64, "cpu": 2}, 1),
    "qwen2_vl_32x32": Frames(32, {"cuda": 64, "cpu": 1}, 4),
}


def tower_of(frames: Frames, device: str) -> nn.Module:
    config = Qwen2VLVisionConfig(
        embed_dim=frames.channels,
        hidden_size=frames.out,
        num_heads=frames.heads,
        depth=frames.depth,
    )
    torch.manual_seed(0)
    make = Qwen2VisionTransformerPretrainedModel._from_config
    return make(config, attn_implementation="sdpa").eval().to(device)


def tables_of(tower: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    """Cosines and sines [2, P, D]."""
    found = []
    hook = tower.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: found.append(torch.stack(kwargs["position_embeddings"])),
        with_kwargs=True,
    )
    tower(pixels, grid)
    hook.remove()
    return found[0]


def attention_by_hand(
    attention: nn.Module, x: Tensor, tables: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(QK^T / sqrt(d) + log s) V of x [N, T, C], and the mean of the keys over heads."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    cos, sin = tables[:, :, None]
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in qkv[:2])
    logits = q @ k.mT * q.shape[-1] ** -0.5 + sizes.log()[:, None, None]
    out = (logits.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
    return attention.proj(out), k.mean(dim=1)


def eager(tower: nn.Module, pixels: Tensor, tables: Tensor, frames: Frames, number: int) -> Tensor:
    """What is left of the patches, [N, K, C]; all frames have one size, so they are a batch."""
    x = tower.patch_embed(pixels).view(number, -1, frames.channels)
    tables = tables.unflatten(1, (number, -1))
    sizes = x.new_ones(number, frames.groups, 1)
    for block in tower.blocks:
        attended = sizes[..., 0].repeat_interleave(UNIT, 1)
        out, key = attention_by_hand(block.attn, block.norm1(x), tables, attended)
        metric = key.reshape(number, sizes.shape[1], -1)
        x, tables, sizes = merge_by_hand(metric, x + out, tables, sizes, frames.r)
        x = x + block.mlp(block.norm2(x))
    tower.merger(x.flatten(0, 1))
    return x


def merge_by_hand(
    metric: Tensor, x: Tensor, tables: Tensor, sizes: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `alternatives.eager_vit_step`, without a class token, and for groups of patches."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, into = (metric[:, ::2] @ metric[:, 1::2].mT).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    groups = x.reshape(*metric.shape[:2], -1)
    summed, counted = (
        alternatives._eager_step(v, order, into[..., None], r) for v in (groups * sizes, sizes)
    )
    by_group = tables.unflatten(2, (-1, UNIT)).flatten(3)
    stay = order[None, :, r:].expand(2, -1, -1, by_group.shape[-1])
    kept = torch.cat([by_group[:, :, ::2].gather(2, stay), by_group[:, :, 1::2]], dim=2)
    x = (summed / counted).view(x.shape[0], -1, x.shape[2])
    return x, kept.view(2, x.shape[0], x.shape[1], -1), counted


def flops(frames: Frames, r: int) -> int:
    """Of the matrix products of the blocks for one frame."""
    total, patches, c = 0, frames.groups * UNIT, frames.channels
    for _ in range(frames.depth):
        total += 8 * patches * c * c + 4 * patches * patches * c
        patches -= UNIT * r
        total += 16 * patches * c * c
    return total


@pytest.mark.parametrize("impl", ["hico", "eager", "stock"])
@pytest.mark.parametrize("shape", FRAMES)
@torch.no_grad()
def test_tower(measure, device, threads, benchmark, timed, shape, impl):
    frames = FRAMES[shape]
    benchmark.group = f"tome_tower-{shape}-f32"
    number = frames.number[device]
    if not timed:
        frames, number = replace(frames, channels=160, heads=2, depth=2, out=64), 2
    tower = tower_of(frames, device)
    grid = torch.tensor([[number, frames.side, frames.side]], device=device)
    pixels = torch.randn(number * frames.side**2, 3 * 2 * 14 * 14, device=device)
    tables = tables_of(tower, pixels, grid)
    by_hand = eager(tower, pixels, tables, frames, number)
    assert by_hand.shape[1] == UNIT * (frames.groups - frames.depth * frames.r)
    if impl == "hico":
        handle = tome.patch(tower, r=frames.r, order="matching")
        out = tower(pixels, grid).last_hidden_state
        torch.testing.assert_close(out, by_hand.flatten(0, 1), rtol=1e-3, atol=1e-3)
        handle.remove()
        tome.patch(tower, r=frames.r)
    run = {
        "hico": lambda: tower(pixels, grid),
        "eager": lambda: eager(tower, pixels, tables, frames, number),
        "stock": lambda: tower(pixels, grid),
    }[impl]
    measure(
        run,
        dtype=torch.float32,
        bytes_=sum(p.nbytes for p in tower.parameters()),
        flops=number * flops(frames, 0 if impl == "stock" else frames.r),
        rounds=3,
    )
