"""Rows without padding: tokens of a batch one behind the other, every sequence of its own length.

From its first drop on a prompt runs as one row [1, T, C] with cumulative lengths; a cache layer
holds each sequence from its start, with a length of its own, so decoding reads no padding either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hico_kernels.attention import ragged_attention, ragged_decode_attention
from hico_kernels.patch.families import PACKED as ATTENTION
from hico_kernels.patch.rows import Prompt, ascending, to_device


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

    def last(self, few: int) -> tuple["PackedRows", Tensor | None]:
        """The last `few` tokens of each sequence, and the rows of [T] that they were; None: all."""
        if max(self.counts) == few:
            return self, None
        ends = self.cu_seqlens[1:, None]
        source = (ends - torch.arange(few, 0, -1, device=ends.device)).flatten()
        return PackedRows(self.slots[source], [few] * len(self.counts), [], self.length), source


def one_each(lengths: Tensor, longest: int, attention: str) -> dict[str, Any]:
    """What attention is told when every sequence has one new token behind `lengths` [B] others."""
    if attention == ATTENTION:
        return {"hico_lengths": lengths + 1}
    columns = torch.arange(longest + 1, device=lengths.device)
    return {"attention_mask": columns <= lengths[:, None]}  # flash attention unpads by it


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


def few_each(told: dict[str, Any], rows: PackedRows) -> dict[str, Any]:
    """What attention was told of more rows, for `rows`, the last ones of each sequence."""
    if "hico_masks" in told:
        pairs = zip(told["hico_masks"], rows.counts, strict=True)
        return {"hico_masks": [mask[-count:] for mask, count in pairs]}
    _, cu_k, _, longest = told["hico_packed"]
    return {"hico_packed": (rows.cu_seqlens, cu_k, len(rows), longest)}


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
    hico_masks: list[Tensor] | None = None,
    hico_lengths: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Packed: q [1, H, Tq, D], k and v [1, Hkv, Tk, D]; with masks [q, k], one of each sequence,
    where not all that came before is seen; a token for each sequence: [B, H, 1, D].
    """
    if hico_packed is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return ragged_attention(q, k, v, *hico_packed, causal=True, scale=scaling)[None], None
    if hico_masks is not None:
        rows, columns = zip(*(mask.shape for mask in hico_masks), strict=True)
        parts = query.split(rows, 2), key.split(columns, 2), value.split(columns, 2), hico_masks
        each = [
            sdpa_attention_forward(module, q, k, v, mask[None, None], scaling=scaling, **kwargs)[0]
            for q, k, v, mask in zip(*parts, strict=True)
        ]
        return torch.cat(each, 1), None
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
