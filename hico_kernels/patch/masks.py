"""Attention masks for layers that hold fewer columns than the sequence has tokens.

transformers makes one mask per kind of layer, for the whole sequence. A layer behind a drop takes
the rows of its queries and the columns of its keys out of that mask, so padding, windows and
bidirectional blocks come along. Where the mask is left out (None: causal, nothing padded) one is
made from positions, unless attention is right without: PyTorch aligns `is_causal` to the upper
left, so a mask is needed as soon as there are more keys than queries and more than one query.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hico_kernels.patch.columns import Columns


def real_tokens(mask: Tensor | None, start: int, stop: int, length: int) -> Tensor | None:
    """Which of the positions [start, stop) are no padding, [B, stop - start] bool; None: all.

    mask: what the decoder was given: 2D over the sequence, or 4D, whose last query sees every
    token but padding. length: of the sequence, this call included.
    """
    if mask is None or start >= stop:
        return None
    if mask.dim() == 4:
        first = max(length - mask.shape[-1], 0)  # a 4D mask may begin later in the sequence
        if start < first:
            return None
        mask = _allowed(mask[:, 0, -1])
        start, stop = start - first, stop - first
    return mask[:, start:stop].bool()


def layer_mask(
    mask: Tensor | None,
    queries: Columns,
    keys: Columns,
    *,
    start: int,
    length: int,
    past: int,
    capacity: int | None,
    flash: bool,
    dtype: torch.dtype,
    eager: bool,
) -> Tensor | None:
    """The mask of one layer: [B, 1, L, N] bool (additive where `mask` is), or 2D [B, N] for flash
    attention.

    mask: what the model gave the layer; queries: this call's columns [B, L]; keys: all columns the
    layer attends to [B, N], the queries last; start: position of this call's first token; length:
    of the sequence; past: columns before the queries; capacity: of a static layer, else None; a
    window of it may give attention more columns than that.
    """
    if flash:
        if mask is None:
            return None if keys.full else keys.valid
        return mask.bool().gather(1, keys.positions.to(mask.device)) & keys.valid
    if mask is None and keys.full and not eager:
        alone = len(queries) == 1 and capacity is None
        if alone or past == 0:
            return None
    if mask is None:
        allowed = queries.positions[:, :, None] >= keys.positions[:, None]
    else:
        allowed = _taken(mask, queries, keys, start, length)
    allowed = allowed & keys.valid[:, None]
    if not queries.full:  # padding with nothing to see sees itself: a softmax over nothing is NaN
        own = torch.arange(len(queries), device=allowed.device)
        itself = torch.zeros_like(allowed)
        itself[:, own, len(keys) - len(queries) + own] = True
        allowed = allowed | (itself & ~allowed.any(-1, keepdim=True))
    if capacity is not None:
        allowed = torch.nn.functional.pad(allowed, (0, max(capacity - len(keys), 0)))
    allowed = allowed[:, None]
    if (mask is not None and mask.is_floating_point()) or eager:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    return allowed


def each_mask(
    mask: Tensor, rows: Sequence[Tensor], held: Sequence[Tensor], past: int, length: int
) -> list[Tensor]:
    """A mask for each sequence, [L, held + L] bool, where they do not share one.

    mask: what the model gave the layer, [B or 1, 1, q, keys]; rows: of each sequence the places of
    its tokens in this call; held: the positions of what the layer holds; past: position of this
    call's first token; length: of the sequence.
    """
    first, out = max(length - mask.shape[-1], 0), []  # as below
    for row, (own, before) in enumerate(zip(rows, held, strict=True)):
        columns = torch.cat([before, own + past]) - first
        allowed = _allowed(mask[row % len(mask), 0, own])
        out.append(allowed[:, columns.clamp(min=0)] & (columns >= 0))
    return out


def _taken(mask: Tensor, queries: Columns, keys: Columns, start: int, length: int) -> Tensor:
    """Rows and columns of the whole mask, [B, L, N] bool."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must be [batch, 1, queries, keys], got {tuple(mask.shape)}"
        )
    batch = queries.positions.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    first = max(length - mask.shape[-1], 0)  # windows begin later, static masks are longer
    columns = (keys.positions - first)[:, None]
    each = torch.arange(batch, device=mask.device)[:, None]
    rows = _allowed(mask[each, 0, queries.positions - start])
    # Whole rows, then their columns: one index for each element takes four times as long.
    return rows.gather(2, columns.clamp(min=0).expand(-1, rows.shape[1], -1)) & (columns >= 0)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0
