"""Merging of whole groups of patches in packed frames, one group at a time, in plain torch.

As `tome_reference`, whose anatomy of blocks it takes: nothing of hico_kernels is used. A group has
`unit` patches, a row of x each; it is at the place of the group that others were merged into.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tome_reference import Anatomy, anatomy, rotated
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    x: Tensor  # [unit, C]
    members: list[int]  # groups at first
    place: int  # of a group at first


def rows_of(table: Tensor, groups: Sequence[Group]) -> Tensor:
    unit = len(groups[0].x)
    return torch.cat([table[g.place * unit : (g.place + 1) * unit] for g in groups])


def attention(
    parts: Anatomy, groups: Sequence[Group], tables: Sequence[Tensor], prop: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """softmax(QK^T / sqrt(d) + log s) V of one sequence, and the mean over heads of K, by group."""
    x = torch.cat([g.x for g in groups])
    q, k, v = (y.unflatten(-1, (parts.heads, -1)).transpose(0, 1) for y in parts.qkv(parts.norm(x)))
    cos, sin = (rows_of(table, groups).float() for table in tables)  # these towers turn in float32
    q, k = (rotated(y.float(), cos, sin, parts.half).to(x.dtype) for y in (q, k))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if prop:
        sizes = [float(len(g.members)) for g in groups for _ in g.x]
        logits = logits + torch.tensor(sizes, dtype=x.dtype).log()
    out = parts.project((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    unit = len(groups[0].x)
    return list(out.split(unit)), list(k.detach().mean(0).split(unit))


def merge(groups: list[Group], keys: list[Tensor], r: int, order: str) -> list[Group]:
    """The r most similar pairs of groups of one sequence: patch is compared with patch."""
    flat = [k.flatten() for k in keys]
    unit = [k / k.norm() for k in flat]
    ours, theirs = range(0, len(groups), 2), range(1, len(groups), 2)
    best = {
        i: max(theirs, key=lambda j: (float(unit[i] @ unit[j]), -j)) if theirs else i for i in ours
    }
    ranked = sorted(ours, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))
    into = {i: best[i] for i in ranked[: min(r, len(theirs))]}
    left = [i for i in range(len(groups)) if i not in into]
    if order == "matching":
        left = [*(i for i in ranked if i not in into), *theirs]
    merged = []
    for j in left:
        both = [groups[i] for i in [j, *(i for i in ours if into.get(i) == j)]]
        count = sum(len(g.members) for g in both)
        x = sum(len(g.members) * g.x for g in both) / count
        merged.append(Group(x, sorted(m for g in both for m in g.members), groups[j].place))
    return merged


def split(groups: Sequence[Group], ends: Sequence[int]) -> list[list[Group]]:
    """The groups of each sequence; ends: of sequences, in patches at first."""
    unit = len(groups[0].x)
    return [
        [g for g in groups if start <= g.place * unit < end]
        for start, end in itertools.pairwise(ends)
    ]


def run(
    blocks: Sequence[nn.Module],
    x: Tensor,
    unit: int,
    ends: Sequence[Sequence[int]],
    tables: Sequence[Sequence[Tensor]],
    pairs: Sequence[int],
    *,
    order: str = "spatial",
    prop: bool = True,
) -> list[list[Group]]:
    """All blocks on the patches x [P, C]: the groups behind each block.

    ends: of the sequences that each block attends in. pairs: that merge in each of them, by block.
    """
    groups = [Group(each, [i], i) for i, each in enumerate(x.split(unit))]
    states = []
    for block, where, table, r in zip(blocks, ends, tables, pairs, strict=True):
        parts, done = anatomy(block), []
        for own in split(groups, where):
            updates, keys = attention(parts, own, table, prop)
            both = zip(own, updates, strict=True)
            own = [Group(g.x + parts.scale(u), g.members, g.place) for g, u in both]
            done += merge(own, keys, r, order) if r else own
        groups = [Group(parts.second_half(g.x), g.members, g.place) for g in done]
        states.append(groups)
    return states
