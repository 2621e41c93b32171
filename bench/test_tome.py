"""A whole ViT with token merging: patched, merged by hand in plain torch, and as it is."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from bench import alternatives
from hico_kernels import tome


@dataclass(frozen=True)
class Vit:
    """The shape of a tower; the images of a batch on a GPU and on a CPU."""

    side: int
    patch: int
    channels: int
    heads: int
    depth: int
    batch: dict[str, int]

    @property
    def tokens(self) -> int:
        return 1 + (self.side // self.patch) ** 2


VITS = {
    "vit_b16_224": Vit(224, 16, 768, 12, 12, {"cuda": 64, "cpu": 2}),
    "vit_l14_336": Vit(336, 14, 1024, 16, 24, {"cuda": 16, "cpu": 1}),
}


def tower_of(vit: Vit, depth: int, device: str) -> ViTModel:
    config = ViTConfig(
        hidden_size=vit.channels,
        intermediate_size=4 * vit.channels,
        num_hidden_layers=depth,
        num_attention_heads=vit.heads,
        image_size=vit.side,
        patch_size=vit.patch,
    )
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False).eval().to(device)


def attention_by_hand(attention: nn.Module, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(QK^T / sqrt(d) + log s) V, and the mean of the keys over heads."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = attention.num_attention_heads
    q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in projections)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + sizes.log()[:, None, None, :, 0]
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.o_proj(out), k.mean(dim=1)


def eager(tower: ViTModel, picture: Tensor, r: int) -> Tensor:
    x = tower.embeddings(picture)
    sizes = x.new_ones(*x.shape[:2], 1)
    for block in tower.layers:
        out, metric = attention_by_hand(block.attention, block.layernorm_before(x), sizes)
        x, sizes = alternatives.eager_vit_step(metric, x + out, sizes, r)
        x = x + block.mlp(block.layernorm_after(x))
    return tower.layernorm(x)


def flops(vit: Vit, depth: int, r: int) -> int:
    """Of the matrix products of the blocks for one picture."""
    total, tokens, c = 0, vit.tokens, vit.channels
    for _ in range(depth):
        total += 8 * tokens * c * c + 4 * tokens * tokens * c
        tokens -= r
        total += 16 * tokens * c * c
    return total


@pytest.mark.parametrize("impl", ["hico", "eager", "stock"])
@pytest.mark.parametrize("r", [8, 14])  # 16 would run out of tokens in the smaller one
@pytest.mark.parametrize("shape", VITS)
@torch.no_grad()
def test_tower(measure, device, threads, benchmark, timed, shape, r, impl):
    vit = VITS[shape]
    benchmark.group = f"tome_tower-{shape}_r{r}-f32"
    depth, batch = (vit.depth, vit.batch[device]) if timed else (2, 1)
    tower = tower_of(vit, depth, device)
    picture = torch.randn(batch, 3, vit.side, vit.side, device=device)
    by_hand = eager(tower, picture, r)
    if impl == "hico":
        handle = tome.patch(tower, r=r, order="matching")
        out = tower(picture).last_hidden_state
        torch.testing.assert_close(out, by_hand, rtol=1e-3, atol=1e-3)
        handle.remove()
        tome.patch(tower, r=r)
    run = {
        "hico": lambda: tower(picture),
        "eager": lambda: eager(tower, picture, r),
        "stock": lambda: tower(picture),
    }[impl]
    assert by_hand.shape[1] == vit.tokens - depth * r
    measure(
        run,
        dtype=torch.float32,
        bytes_=sum(p.nbytes for p in tower.parameters()),
        flops=batch * flops(vit, depth, 0 if impl == "stock" else r),
        rounds=5,
    )
