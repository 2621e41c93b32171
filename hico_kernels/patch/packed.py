"""Rows without padding: tokens of a batch one behind the other, every sequence of its own length.

From its first drop on a prompt runs as one row [1, T, C] with cumulative lengths; a cache layer
holds each sequence from its start, with a length of its own, so decoding reads no padding either.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hico_kernels.attention import ragged_attention, ragged_decode_attention
from hico_kernels.patch.columns import DroppedLayer, DroppedStaticLayer, layer_of
from hico_kernels.patch.families import PACKED as ATTENTION
from hico_kernels.patch.masks import real_tokens
from hico_kernels.patch.rows import Prompt, ascending, to_device

_ROOM = 256  # columns that a cache layer grows by


@dataclass(frozen=True)
class PackedRows:
    """The tokens that are left, as `rows.Rows`, but packed and without padding."""

    slots: Tensor  # [T] int64, rows of the flattened call [B * q], ascending
    counts: list[int]  # tokens of each sequence
    visual: list[int]  # visual ones among them
    length: int  # q

    def __len__(self) -> int:
        return max(self.counts)

    @classmethod
    def whole(cls, real: Tensor, counts: list[int], visual: list[int]) -> "PackedRows":
        """Before the first drop. real [B, q] bool, of which each row has counts[b]."""
        return cls(ascending(real, sum(counts)), counts, visual, real.shape[1])

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each sequence begins, and the end: [B + 1] int64."""
        return cumulative(self.counts, self.slots.device)

    @property
    def sequence(self) -> Tensor:
        """The sequence of every token, [T]."""
        return self.slots // self.length

    @property
    def places(self) -> Tensor:
        """Where every token is in its sequence as it is now, [T]."""
        starts = self.cu_seqlens[:-1]
        return torch.arange(len(self.slots), device=self.slots.device) - starts[self.sequence]

    @property
    def index(self) -> Tensor:
        """As `Rows.index`, aligned to the right."""
        return self.padded(self.slots % self.length)

    @property
    def valid(self) -> Tensor:
        """As `Rows.valid`."""
        return self.padded(torch.ones_like(self.slots, dtype=torch.bool))

    def padded(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], aligned to the right, with zeros in front; differentiable."""
        batch, longest = len(self.counts), len(self)
        first = to_device([longest - n for n in self.counts], packed.device)
        flat = self.sequence * longest + first[self.sequence] + self.places
        out = packed.new_zeros(batch * longest, *packed.shape[1:])
        return out.index_copy(0, flat, packed).unflatten(0, (batch, longest))

    def table(self, table: Tensor) -> Tensor:
        """Rotary tables [.., B or 1, q, D] -> [.., 1, T, D]."""
        table = table.expand(*table.shape[:-3], len(self.counts), -1, -1)
        return table.flatten(-3, -2).index_select(-2, self.slots).unsqueeze(-3)

    def visual_slots(self, prompt: Prompt) -> Tensor:
        """The visual tokens left, as rows of [T]."""
        return ascending(prompt.visual.flatten()[self.slots], sum(self.visual))

    def heard_slots(self, prompt: Prompt) -> tuple[Tensor, list[int], Tensor]:
        """What the asking token attends to and a count for each sequence; and where that is."""
        heard = self.slots % self.length <= prompt.asking[self.sequence]
        counts = [t + v for t, v in zip(prompt.num_heard, self.visual, strict=True)]
        at = torch.arange(len(self.counts), device=self.slots.device) * self.length + prompt.asking
        return ascending(heard, sum(counts)), counts, torch.searchsorted(self.slots, at)

    def after(
        self, prompt: Prompt, chosen: Tensor, keep: Sequence[int]
    ) -> tuple["PackedRows", Tensor]:
        """With the visual tokens `chosen` and all text; and the rows of [T] that they were."""
        stay = ~prompt.visual.flatten()[self.slots]
        stay[chosen] = True
        pairs = zip(self.counts, self.visual, keep, strict=True)
        counts = [count - visual + kept for count, visual, kept in pairs]
        source = ascending(stay, sum(counts))
        return PackedRows(self.slots[source], counts, list(keep), self.length), source


class PackedLayer:
    """A cache layer in which every sequence has a length: keys [B, H, room, D], filled from 0."""

    lengths: Tensor | None = None  # [B] int64; None: nothing packed here, a stock layer
    counts: list[int] | None = None  # the same on the host, where known
    longest: int = 0
    coming: PackedRows | int | None = None  # announced for the next update; 1: a token for each

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

    def fill(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        """Take over the valid [B, N] columns of a padded layer."""
        counts = valid.sum(1).tolist()
        rows = PackedRows.whole(valid, counts, [0] * len(counts))
        packed = (
            x.transpose(1, 2).flatten(0, 1)[rows.slots].transpose(0, 1) for x in (keys, values)
        )
        self.start(len(counts), keys.device)
        self._write(rows, *(x[None] for x in packed))

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
            self._write(coming, key_states, value_states)
            return (key_states, value_states) if empty else self._packed()
        self._grow(key_states, self.longest + 1)
        each = torch.arange(len(self.lengths), device=key_states.device)
        self.keys[each, :, self.lengths] = key_states[:, :, 0]
        self.values[each, :, self.lengths] = value_states[:, :, 0]
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self.counts = None if self.counts is None else [n + 1 for n in self.counts]
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def _write(self, rows: PackedRows, keys: Tensor, values: Tensor) -> None:
        """Append packed keys and values [1, H, T, D]."""
        held = self.host_counts()
        counts = [a + b for a, b in zip(held, rows.counts, strict=True)]
        self._grow(keys, max(counts))
        sequence = rows.sequence
        places = self.lengths[sequence] + rows.places
        self.keys[sequence, :, places] = keys[0].transpose(0, 1)
        self.values[sequence, :, places] = values[0].transpose(0, 1)
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


class PackedDynamicLayer(PackedLayer, DroppedLayer):
    """One that grows."""

    def start(self, batch: int, device: torch.device) -> None:
        """Be an empty packed layer."""
        super().start(batch, device)
        self.keys = self.values = None

    def _grow(self, like: Tensor, needed: int) -> None:
        held = 0 if self.keys is None or not self.keys.numel() else self.keys.shape[2]
        if needed <= held:
            return
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        shape = (len(self.lengths), like.shape[1], needed + _ROOM, like.shape[3])
        for name in ("keys", "values"):
            grown = like.new_zeros(shape)
            if held:
                grown[:, :, :held] = getattr(self, name)
            setattr(self, name, grown)


class PackedStaticLayer(PackedLayer, DroppedStaticLayer):
    """One of fixed capacity, in the tensors that it has."""

    def _grow(self, like: Tensor, needed: int) -> None:
        if needed > self.max_cache_len:
            raise ValueError(
                f"past_key_values: a sequence needs {needed} columns, the static cache has "
                f"{self.max_cache_len}"
            )
        if not self.is_initialized:
            empty = like.new_empty(len(self.lengths), like.shape[1], 0, like.shape[3])
            wanted = inspect.signature(self.lazy_initialization).parameters  # one before 5.0
            self.lazy_initialization(*[empty] * len(wanted))


_PACKED = {DroppedLayer: PackedDynamicLayer, DroppedStaticLayer: PackedStaticLayer}


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
) -> PackedLayer | None:
    """The packed cache layer of a decoder layer, in place of the padded one that there is.

    mask: what the model was given: padding does not come along; length: of the new tokens.
    """
    if cache is None or has_packed(cache, index):
        return None if cache is None else cache.layers[index]
    old = layer_of(cache, index, True)
    kind = _PACKED.get(type(old), type(old))  # packed before, and then emptied
    new = kind.__new__(kind)
    past, held = int(old.get_seq_length()), old.stored()
    new.__dict__ = old.__dict__.copy()
    new.columns = None
    if held:
        valid = real_tokens(mask, past - held, past, past + length)
        if old.columns is not None:
            valid = old.columns.valid
        elif valid is None:
            valid = old.keys.new_ones(batch, held, dtype=torch.bool)
        new.fill(old.keys[:, :, :held], old.values[:, :, :held], valid)
    else:
        new.start(batch, device)
    new.seen = past
    cache.layers[index] = new
    return new


def one_each(layer: PackedLayer, attention: str) -> dict[str, Any]:
    """What attention is told when every sequence has one new token."""
    if attention == ATTENTION:
        return {"hico_lengths": layer.lengths + 1}
    columns = torch.arange(layer.longest + 1, device=layer.lengths.device)
    return {"attention_mask": columns <= layer.lengths[:, None]}  # flash attention unpads by it


def many_each(rows: PackedRows, held: Sequence[int], attention: str) -> dict[str, Any]:
    """What attention is told when the sequences bring `rows` and the cache holds `held` of each."""
    keys = [a + b for a, b in zip(held, rows.counts, strict=True)]
    device = rows.slots.device
    cu_q, cu_k = rows.cu_seqlens, cumulative(keys, device)
    if attention == ATTENTION:
        return {"hico_packed": (cu_q, cu_k, len(rows), max(keys))}
    return {
        "cu_seq_lens_q": cu_q.int(),
        "cu_seq_lens_k": cu_k.int(),
        "max_length_q": len(rows),
        "max_length_k": max(keys),
    }


def cumulative(counts: Sequence[int], device: torch.device) -> Tensor:
    """0 and the running sums."""
    return to_device(list(accumulate(counts, initial=0)), device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    hico_packed: tuple[Tensor, Tensor, int, int] | None = None,
    hico_lengths: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Packed: q [1, H, Tq, D], k and v [1, Hkv, Tk, D]; a token for each sequence: [B, H, 1, D]."""
    if hico_packed is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return ragged_attention(q, k, v, *hico_packed, causal=True, scale=scaling)[None], None
    if hico_lengths is not None:
        k, v = (x.transpose(1, 2) for x in (key, value))
        out = ragged_decode_attention(query[:, :, 0], k, v, hico_lengths, scale=scaling)
        return out[:, None], None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


AttentionInterface.register(ATTENTION, _attend)
# Row 12: without a mask function of the same name no layer would get a mask.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
