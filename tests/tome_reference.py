"""Token merging from the equations of arXiv 2210.09461, one picture at a time, in plain torch.

Nothing of hico_kernels is used. Tokens are rows of x, `members[i]` lists the input tokens behind
row i, `place[i]` is the input token whose place it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Anatomy:
    """The parts of a block, found by name."""

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Sequence[Tensor]]  # [T, C] -> three of [T, C], normed, not rotated
    heads: int
    project: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]  # LayerScale
    second_half: Callable[[Tensor], Tensor]
    half: bool = True  # whether rotation pairs channels half a head apart, or neighbours


def same(x: Tensor) -> Tensor:
    return x


def projections(attention: nn.Module, names: str) -> Callable[[Tensor], list[Tensor]]:
    return lambda x: [getattr(attention, name)(x) for name in names.split()]


def older_qkv(a: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    q_bias, v_bias = getattr(a, "q_bias", None), getattr(a, "v_bias", None)

    def qkv(x: Tensor) -> list[Tensor]:
        q, k, v = a.query(x), a.key(x), a.value(x)
        return [q if q_bias is None else q + q_bias, k, v if v_bias is None else v + v_bias]

    return qkv


def timm_qkv(a: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    def qkv(x: Tensor) -> list[Tensor]:
        if a.qkv is None:
            three = [a.q_proj(x), a.k_proj(x), a.v_proj(x)]
        else:
            three = list(a.qkv(x).chunk(3, dim=-1))
            if getattr(a, "q_bias", None) is not None:
                three = [three[0] + a.q_bias, three[1], three[2] + a.v_bias]
        per_head = [y.unflatten(-1, (a.num_heads, -1)) for y in three]
        return [y.flatten(-2) for y in (a.q_norm(per_head[0]), a.k_norm(per_head[1]), per_head[2])]

    return qkv


def anatomy(b: nn.Module) -> Anatomy:
    kind = type(b).__name__
    inner = getattr(getattr(b, "attention", None), "attention", None)
    if inner is not None:  # VideoMAE, and ViT, DINOv2 of older transformers
        if hasattr(b, "layer_scale1"):
            norm, scale = b.norm1, lambda u: b.layer_scale1.lambda1 * u
            mlp = lambda x: x + b.layer_scale2.lambda1 * b.mlp(b.norm2(x))  # noqa: E731
        else:
            norm, scale = b.layernorm_before, same
            mlp = lambda x: x + b.output.dense(b.intermediate(b.layernorm_after(x)))  # noqa: E731
        heads, project = inner.num_attention_heads, b.attention.output.dense
        return Anatomy(norm, older_qkv(inner), heads, project, scale, mlp)
    if kind == "ViTLayer":
        a = b.attention
        qkv = projections(a, "q_proj k_proj v_proj")
        mlp = lambda x: x + b.mlp(b.layernorm_after(x))  # noqa: E731
        return Anatomy(b.layernorm_before, qkv, a.num_attention_heads, a.o_proj, same, mlp)
    if kind in ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"):
        a = b.self_attn
        qkv = projections(a, "q_proj k_proj v_proj")
        mlp = lambda x: x + b.mlp(b.layer_norm2(x))  # noqa: E731
        return Anatomy(b.layer_norm1, qkv, a.num_heads, a.out_proj, same, mlp)
    if kind in ("Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer"):
        a = b.attention
        qkv = projections(a, "q_proj k_proj v_proj")
        heads = a.num_heads if kind == "DINOv3ViTLayer" else a.num_attention_heads
        mlp = lambda x: x + b.layer_scale2.lambda1 * b.mlp(b.norm2(x))  # noqa: E731
        return Anatomy(b.norm1, qkv, heads, a.o_proj, lambda u: b.layer_scale1.lambda1 * u, mlp)
    if kind == "InternVLVisionLayer":
        a = b.attention
        qkv = lambda x: (a.q_norm(a.q_proj(x)), a.k_norm(a.k_proj(x)), a.v_proj(x))  # noqa: E731
        mlp = lambda x: x + b.lambda_2 * b.mlp(b.layernorm_after(x))  # noqa: E731
        project, scale = a.projection_layer, lambda u: b.lambda_1 * u
        return Anatomy(b.layernorm_before, qkv, a.num_heads, project, scale, mlp)
    if kind.startswith("Qwen"):
        a = b.attn
        mlp = lambda x: x + b.mlp(b.norm2(x))  # noqa: E731
        return Anatomy(b.norm1, lambda x: a.qkv(x).chunk(3, -1), a.num_heads, a.proj, same, mlp)
    if kind in ("Block", "EvaBlock"):  # timm
        a = b.attn
        if kind == "Block":
            first, second = getattr(b.ls1, "gamma", 1.0), getattr(b.ls2, "gamma", 1.0)
        else:
            first, second = (1.0 if g is None else g for g in (b.gamma_1, b.gamma_2))
        mlp = lambda x: x + second * b.mlp(b.norm2(x))  # noqa: E731
        half = getattr(a, "rotate_half", True)
        project = lambda y: a.proj(a.norm(y))  # noqa: E731
        return Anatomy(b.norm1, timm_qkv(a), a.num_heads, project, lambda u: first * u, mlp, half)
    raise AssertionError(f"no anatomy of {kind}")


def rotated(x: Tensor, angle_cos: Tensor, angle_sin: Tensor, half: bool) -> Tensor:
    """x [H, T, D] turned by angles [T, D], in pairs of channels."""
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * angle_cos + turned * angle_sin


@dataclass
class Picture:
    """The state of one picture."""

    x: Tensor  # [T, C]
    members: list[list[int]]
    place: list[int]


def attention(parts: Anatomy, state: Picture, tables: Any, prefix: int, prop: bool) -> tuple:
    """softmax(QK^T / sqrt(d) + log s) V, and the mean over heads of K."""
    q, k, v = (
        y.unflatten(-1, (parts.heads, -1)).transpose(0, 1) for y in parts.qkv(parts.norm(state.x))
    )
    if tables is not None:
        rows = [place - prefix for place in state.place[prefix:]]
        cos, sin = (table[..., rows, :] for table in tables)
        q, k = (
            torch.cat([y[:, :prefix], rotated(y[:, prefix:], cos, sin, parts.half)], dim=1)
            for y in (q, k)
        )
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if prop:
        logits = logits + torch.tensor([float(len(m)) for m in state.members]).to(q).log()
    out = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return parts.project(out), k.detach().mean(0)


def merge(state: Picture, metric: Tensor, r: int, prefix: int, order: str) -> Picture:
    """The r most similar pairs of tokens in turn: a token of the first kind and its best of the
    second. The last token in front counts in the turn, and stays."""
    turns = list(range(max(prefix - 1, 0), len(state.members)))
    ours, theirs = [i for i in turns[::2] if i >= prefix], turns[1::2]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = {i: max(theirs, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in ours}
    ranked = sorted(ours, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))
    into = {i: best[i] for i in ranked[:r]}
    if order == "spatial":
        left = [i for i in range(len(state.members)) if i not in into]
    else:
        stay = sorted(ranked[r:]) if prefix else ranked[r:]
        left = [*range(prefix), *stay, *(j for j in theirs)]
    rows, members = [], []
    for j in left:
        group = [j] + [i for i in ours if into.get(i) == j]
        sizes = [len(state.members[i]) for i in group]
        total = sum(s * state.x[i] for s, i in zip(sizes, group, strict=True))
        rows.append(total / sum(sizes))
        members.append(sorted(m for i in group for m in state.members[i]))
    return Picture(torch.stack(rows), members, [state.place[j] for j in left])


def run(
    blocks: Sequence[nn.Module],
    x: Tensor,
    pairs: Sequence[int],
    *,
    prefix: int = 0,
    tables: Sequence[Any] | None = None,
    order: str = "spatial",
    prop: bool = True,
) -> Picture:
    """All blocks on the tokens x [T, C] of one picture. tables: cosines and sines, per block."""
    state = Picture(x, [[i] for i in range(len(x))], list(range(len(x))))
    for block, r, table in zip(blocks, pairs, tables or [None] * len(blocks), strict=True):
        parts = anatomy(block)
        update, metric = attention(parts, state, table, prefix, prop)
        state.x = state.x + parts.scale(update)
        if r:
            state = merge(state, metric, r, prefix, order)
        state.x = parts.second_half(state.x)
    return state
