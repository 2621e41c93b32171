"""KV-cache layers in which every sequence has a length of its own, filled from its start."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache

from hico_kernels.patch.columns import (
    Columns,
    DroppedLayer,
    DroppedSlidingLayer,
    DroppedStaticLayer,
    DroppedStaticSlidingLayer,
    initialize,
    layer_of,
)
from hico_kernels.patch.masks import real_tokens
from hico_kernels.patch.packed import PackedRows
from hico_kernels.patch.rows import ascending, to_device

_ROOM = 256  # columns that a cache layer grows by


class PackedLayer:
    """A cache layer in which every sequence has a length: keys [B, H, room, D], filled from 0."""

    lengths: Tensor | None = None  # [B] int64; None: nothing packed here, a stock layer
    counts: list[int] | None = None  # the same on the host, where known
    longest: int = 0
    coming: PackedRows | int | None = None  # announced for the next update; 1: a token for each
    by_mask: bool = False  # whether attention goes by a mask here, not by lengths alone
    positions: Tensor | None = None  # [B, room], of the columns then: places in that mask

    @property
    def holds_fewer(self) -> bool:
        """Whether anything was dropped here."""
        return self.lengths is not None or super().holds_fewer

    def announce(self, coming: PackedRows | int, seen: int) -> None:
        """Say what the next `update` brings, and how long the sequences are then."""
        self.coming, self.seen = coming, seen

    def host_counts(self) -> list[int]:
        """Lengths on the host; after a beam search this waits for the device."""
        if self.counts is None:
            self.counts = self.lengths.tolist()
        return self.counts

    def shown(self) -> Columns:
        """The columns when the one token has come that was announced for each sequence."""
        here = torch.arange(self.longest + 1, device=self.lengths.device)
        valid = here <= self.lengths[:, None]
        positions = torch.nn.functional.pad(self.positions[:, : self.longest], (0, 1))
        return Columns(
            positions.masked_fill(here == self.lengths[:, None], self.seen - 1), valid, False
        )

    def fill(self, keys: Tensor, values: Tensor, valid: Tensor, positions: Tensor) -> None:
        """Take over the valid [B, N] columns of a padded layer, of these positions [B, N]."""
        counts = valid.sum(1).tolist()
        rows = PackedRows.whole(valid, counts, [0] * len(counts))
        packed = (
            x.transpose(1, 2).flatten(0, 1)[rows.slots].transpose(0, 1)[None]
            for x in (keys, values)
        )
        self.start(len(counts), keys.device)
        self._write(rows, *packed, positions.flatten()[rows.slots])

    def start(self, batch: int, device: torch.device) -> None:
        """Be an empty packed layer."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.counts, self.longest = [0] * batch, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """Packed: keys and values [1, H, sum of lengths, D]; else those of all rows."""
        coming, self.coming = self.coming, None
        if coming is None:
            if self.lengths is None:
                return super().update(key_states, value_states, *args, **kwargs)
            raise RuntimeError(
                "past_key_values: tokens were dropped from this cache; only the patched model "
                "that filled it can go on with it"
            )
        if isinstance(coming, PackedRows):
            empty = self.longest == 0
            positions = coming.slots % coming.length + (self.seen - coming.length)
            self._write(coming, key_states, value_states, positions)
            return (key_states, value_states) if empty else self._packed()
        self._grow(key_states, self.longest + 1)
        each = torch.arange(len(self.lengths), device=key_states.device)
        self.keys[each, :, self.lengths] = key_states[:, :, 0]
        self.values[each, :, self.lengths] = value_states[:, :, 0]
        if self.by_mask:
            self.positions[each, self.lengths] = self.seen - 1
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self.counts = None if self.counts is None else [n + 1 for n in self.counts]
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def _write(self, rows: PackedRows, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Append packed keys and values [1, H, T, D] of these positions [T]."""
        held = self.host_counts()
        counts = [a + b for a, b in zip(held, rows.counts, strict=True)]
        self._grow(keys, max(counts))
        sequence = rows.sequence
        places = self.lengths[sequence] + rows.places
        self.keys[sequence, :, places] = keys[0].transpose(0, 1)
        self.values[sequence, :, places] = values[0].transpose(0, 1)
        if self.by_mask:
            self.positions[sequence, places] = positions
        self.lengths = self.lengths + to_device(rows.counts, keys.device)
        self.counts, self.longest = counts, max(counts)

    def _packed(self) -> tuple[Tensor, Tensor]:
        columns = torch.arange(self.keys.shape[2], device=self.keys.device)
        slots = ascending(columns < self.lengths[:, None], sum(self.counts))
        return _pick_slots(self.keys, slots), _pick_slots(self.values, slots)

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, as the caller counts them."""
        return super().get_seq_length() if self.lengths is None else self.seen

    def crop(self, tokens: int) -> None:
        """Remove the last tokens of every sequence."""
        if self.lengths is None:
            super().crop(tokens)
            return
        removed = self._shorten(tokens)
        self.longest -= removed
        self.lengths = self.lengths - removed
        self.counts = None if self.counts is None else [n - removed for n in self.counts]

    def reset(self) -> None:
        """Forget everything."""
        self.lengths, self.counts, self.longest, self.coming = None, None, 0, None
        self.positions = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self._pick(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._pick(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._pick(lambda t: t[indices.to(t.device)])

    def _pick(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.lengths is not None:
            self.lengths, self.counts = pick(self.lengths), None
            if self.positions is not None:
                self.positions = pick(self.positions)


class _Growing(PackedLayer):
    """One that grows."""

    def start(self, batch: int, device: torch.device) -> None:
        """Be an empty packed layer."""
        super().start(batch, device)
        self.keys = self.values = self.positions = None

    def _grow(self, like: Tensor, needed: int) -> None:
        held = 0 if self.keys is None or not self.keys.numel() else self.keys.shape[2]
        if needed <= held:
            return
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        batch, room = len(self.lengths), needed + _ROOM
        for name in ("keys", "values"):
            grown = like.new_zeros(batch, like.shape[1], room, like.shape[3])
            if held:
                grown[:, :, :held] = getattr(self, name)
            setattr(self, name, grown)
        if self.by_mask:
            grown = self.lengths.new_zeros(batch, room)
            if held:
                grown[:, :held] = self.positions
            self.positions = grown


class PackedDynamicLayer(_Growing, DroppedLayer):
    """One that grows, and keeps everything."""


class _Window(PackedLayer):
    """One with a window of positions."""

    lost: bool = False  # whether tokens were let go

    def start(self, batch: int, device: torch.device) -> None:
        """Be an empty packed layer."""
        super().start(batch, device)
        self.lost = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """As above, counting the tokens of the sequence."""
        many = isinstance(self.coming, PackedRows)
        out = super().update(key_states, value_states, *args, **kwargs)
        if self.lengths is not None:
            self._count()
        if many:
            self._let_go()
        return out

    def _last(self, stay: int, room: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last `stay` tokens of each sequence, with as much room as asked
        for; only they count from now on.
        """
        pad = torch.nn.functional.pad
        first = (self.lengths - stay).clamp(min=0)[:, None]
        columns = first + torch.arange(stay, device=first.device)
        each = torch.arange(len(columns), device=first.device)[:, None]
        self.positions = pad(self.positions[each, columns], (0, room - stay))
        self.counts = None if self.counts is None else [min(n, stay) for n in self.counts]
        self.lengths, self.longest, self.lost = self.lengths.clamp(max=stay), stay, True
        left = (x[each, :, columns].transpose(1, 2) for x in (self.keys, self.values))
        return tuple(pad(x, (0, 0, 0, room - stay)) for x in left)

    def crop(self, tokens: int) -> None:
        """Remove the last tokens of every sequence, where none before them were let go."""
        if self.lengths is not None and self.lost:
            raise RuntimeError(
                "past_key_values: a sliding window of packed sequences cannot be rolled back once "
                f"it is full, got crop({tokens})"
            )
        super().crop(tokens)
        if self.lengths is not None:
            self._count()


class PackedSlidingLayer(_Window, _Growing, DroppedSlidingLayer):
    """Of each sequence it holds the last window - 1 tokens, and up to `_ROOM` more: they are let go
    together, not at every step.
    """

    def announce(self, coming: PackedRows | int, seen: int) -> None:
        """Say what the next `update` brings, and how long the sequences are then."""
        super().announce(coming, seen)
        if self.longest and self.longest == self.keys.shape[2]:
            self._let_go()

    def _let_go(self) -> None:
        stay = self.sliding_window - 1
        if self.longest > stay:
            self.keys, self.values = self._last(stay, stay + _ROOM)

    def _count(self) -> None:
        self.cumulative_length = self.seen


class PackedStaticSlidingLayer(_Window, DroppedStaticSlidingLayer):
    """The last window of each sequence, in the tensors that it has. Prompts that are longer pass
    through larger ones.
    """

    own: tuple[Tensor, Tensor] | None = None  # while there are larger ones

    def announce(self, coming: PackedRows | int, seen: int) -> None:
        """Say what the next `update` brings, and how long the sequences are then."""
        super().announce(coming, seen)
        if coming == 1 and self.longest == self.max_cache_len:
            self._keep(self.max_cache_len - 1)

    def _let_go(self) -> None:
        if self.own is not None:
            self._keep(self.max_cache_len)

    def _keep(self, stay: int) -> None:
        own, self.own = self.own or (self.keys, self.values), None
        for mine, left in zip(own, self._last(stay, self.max_cache_len), strict=True):
            mine.copy_(left)
        self.keys, self.values = own

    def _grow(self, like: Tensor, needed: int) -> None:
        initialize(self, like.new_empty(len(self.lengths), like.shape[1], 0, like.shape[3]))
        if self.positions is None:
            self.positions = self.lengths.new_zeros(len(self.lengths), self.max_cache_len)
        more = needed - self.keys.shape[2]
        if more > 0:
            pad, self.own = torch.nn.functional.pad, (self.keys, self.values)
            self.keys, self.values = (pad(x, (0, 0, 0, more)) for x in self.own)
            self.positions = pad(self.positions, (0, more))


class PackedStaticLayer(PackedLayer, DroppedStaticLayer):
    """One of fixed capacity, in the tensors that it has."""

    def _grow(self, like: Tensor, needed: int) -> None:
        if needed > self.max_cache_len:
            raise ValueError(
                f"past_key_values: a sequence needs {needed} columns, the static cache has "
                f"{self.max_cache_len}"
            )
        initialize(self, like.new_empty(len(self.lengths), like.shape[1], 0, like.shape[3]))
        if self.by_mask and self.positions is None:
            self.positions = self.lengths.new_zeros(len(self.lengths), self.max_cache_len)


_PACKED = {
    DroppedLayer: PackedDynamicLayer,
    DroppedSlidingLayer: PackedSlidingLayer,
    DroppedStaticLayer: PackedStaticLayer,
    DroppedStaticSlidingLayer: PackedStaticSlidingLayer,
}


def _pick_slots(x: Tensor, slots: Tensor) -> Tensor:
    """[B, H, N, D] -> [1, H, T, D], rows of the flattened [B * N]."""
    return x.transpose(1, 2).flatten(0, 1)[slots].transpose(0, 1)[None]


def has_packed(cache: Cache | None, index: int) -> bool:
    """Whether a cache layer holds packed sequences."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return isinstance(layer, PackedLayer) and layer.lengths is not None


def packed_layer(
    cache: Cache | None,
    index: int,
    mask: Tensor | None,
    length: int,
    batch: int,
    device: torch.device,
    by_mask: bool,
) -> PackedLayer | None:
    """The packed cache layer of a decoder layer, in place of the padded one that there is.

    mask: what the model was given: padding does not come along; length: of the new tokens;
    by_mask: whether the decoder layer attends by one of its own.
    """
    if cache is None or has_packed(cache, index):
        return None if cache is None else cache.layers[index]
    old = layer_of(cache, index, True)
    kind = _PACKED.get(type(old), type(old))  # packed before, and then emptied
    new = kind.__new__(kind)
    past, held = int(old.get_seq_length()), old.stored()
    new.__dict__ = old.__dict__.copy()
    new.columns, new.by_mask = None, by_mask
    if held:
        if old.columns is not None:
            valid, positions = old.columns.valid, old.columns.positions
        else:
            positions = torch.arange(past - held, past, device=device).expand(batch, -1)
            valid = real_tokens(mask, past - held, past, past + length)
            valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        new.fill(old.keys[:, :, :held], old.values[:, :, :held], valid, positions)
    else:
        new.start(batch, device)
    new.seen = past
    cache.layers[index] = new
    return new
