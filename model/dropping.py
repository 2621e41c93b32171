"""One drop of visual tokens: evenly spaced ones stay, or those that the text attends to most."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hico_kernels import (
    TextTopK,
    Uniform,
    gather_tokens,
    select_topk,
    text_guided_scores,
    uniform_indices,
)
from hico_model import qwen2
from hico_model.config import Config
from hico_model.rows import Rows, to_device


class Kept(NamedTuple):
    """What a drop leaves; `numbers` and `scores` have a tensor per sequence."""

    hidden: Tensor  # [S', D]: all text, and of the visual tokens those that stay, in their order
    positions: Tensor  # [S'] int64, those they had
    numbers: list[Tensor]  # ascending, among the visual tokens there were
    scores: list[Tensor] | None  # of the visual tokens there were, for `TextTopK`


def drop(
    rule: Uniform | TextTopK,
    layer: nn.Module,
    hidden: Tensor,
    positions: Tensor,
    rows: Rows,
    counts: Sequence[int],
    config: Config,
) -> Kept:
    """Leave `counts` visual tokens in each sequence of what comes into `layer`.

    hidden [S, D] and positions [S] are packed as `rows` says; every count is at most the visual
    tokens that the sequence has.
    """
    scores = None
    if isinstance(rule, Uniform):
        pairs = zip(rows.visual, counts, strict=True)
        numbers = [uniform_indices(n, keep, device=hidden.device) for n, keep in pairs]
    else:
        scores = text_scores(layer, hidden, positions, rows, config)
        firsts = list(accumulate(rows.visual, initial=0))
        best = select_topk(torch.cat(scores), to_device(firsts, hidden.device), counts)
        parts = best.split(list(counts))
        numbers = [own - first for own, first in zip(parts, firsts[:-1], strict=True)]
    index = _rows_left(rows, numbers)
    hidden, positions = gather_tokens(hidden, index, positions)
    return Kept(hidden, positions, numbers, scores)


def text_scores(
    layer: nn.Module, hidden: Tensor, positions: Tensor, rows: Rows, config: Config
) -> list[Tensor]:
    """What the last prompt token attends to in `layer`: [visual] float32 (or float64) per sequence.

    With the layer's own norm and projections, and a softmax over all keys, text included, as in
    VideoChat-Flash (arXiv 2501.00574, section 3.1). Scores of text are left out.
    """
    offsets = rows.offsets
    last = to_device([end - 1 for end in offsets[1:]], hidden.device)
    cos, sin = qwen2.rope(positions, config, hidden.dtype)
    x = qwen2.norm(layer.input_layernorm, hidden)
    q = qwen2.heads(layer.self_attn.q_proj, x[last], config.head_dim)
    k = qwen2.heads(layer.self_attn.k_proj, x, config.head_dim)
    scores = text_guided_scores(
        qwen2.rotate(q, cos[last], sin[last]),
        k,
        torch.arange(len(last) + 1, device=hidden.device),
        to_device(offsets, hidden.device),
        cos=cos[:, 0].repeat(1, 2),  # for both halves of a head
        sin=sin[:, 0].repeat(1, 2),
    )
    sequences = zip(scores.split(rows.lengths), rows.starts, rows.visual, strict=True)
    return [own[start : start + visual] for own, start, visual in sequences]


def _rows_left(rows: Rows, numbers: Sequence[Tensor]) -> Tensor:
    parts = []
    sequences = zip(pairwise(rows.offsets), rows.starts, rows.visual, numbers, strict=True)
    for (first, end), start, visual, own in sequences:
        video = first + start
        before = torch.arange(first, video, device=own.device)
        after = torch.arange(video + visual, end, device=own.device)
        parts += [before, own + video, after]
    return torch.cat(parts)
