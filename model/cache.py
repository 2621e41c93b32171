"""Keys and values of one call: every layer holds as many tokens of a sequence as that layer saw."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hico_kernels import ragged_decode_attention
from hico_model.rows import Rows, to_device


class Cache:
    """Written by the prefill layer by layer, then a token per sequence and step. Never reallocated.

    rows: what each layer sees of the prompts.  full: the prompts before any drop.  room: tokens
    that can be added to each sequence.  renumber: a token's position in a layer counts the tokens
    which that layer has; else it counts all tokens of the sequence.

    `keys` and `values` are one tensor [B, capacity, Hkv, D] per layer; `lengths` [num_layers, B]
    int64, on the device, says how much of each is filled; `prompt_lengths` has the host ints it
    began with.
    """

    def __init__(
        self, rows: Sequence[Rows], full: Rows, room: int, renumber: bool, device: torch.device
    ):
        self.prompt_lengths = [r.lengths for r in rows]
        self.lengths = to_device(self.prompt_lengths, device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._room = room
        self._shift = torch.zeros_like(self.lengths)
        if not renumber:
            self._shift += to_device(full.lengths, device) - self.lengths
        self._batch = torch.arange(len(full.lengths), device=device)

    @property
    def bytes(self) -> int:
        """Memory of all keys and values, the room for new tokens included."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def put(self, k: Tensor, v: Tensor) -> None:
        """Store the prompts' keys and values [S, Hkv, D] of the next layer, packed."""
        lengths = self.prompt_lengths[len(self.keys)]
        capacity = max(lengths) + self._room
        for stored, packed in ((self.keys, k), (self.values, v)):
            padded = packed.new_empty(len(lengths), capacity, *packed.shape[1:])
            for row, own in zip(padded, packed.split(lengths), strict=True):
                row[: len(own)] = own
            stored.append(padded)

    def advance(self) -> Tensor:
        """Make place for one more token in every layer -> its positions [num_layers, B]."""
        if not self._room:
            raise ValueError("the cache is full: ask the prefill for room for more new tokens")
        self._room -= 1
        positions = self.lengths + self._shift
        self.lengths += 1
        return positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new token's k and v [B, Hkv, D] and attend from its q [B, H, D] -> [B, H, D].

        `advance` has made the place.
        """
        place = (self._batch, self.lengths[layer] - 1)
        self.keys[layer].index_put_(place, k)
        self.values[layer].index_put_(place, v)
        return ragged_decode_attention(q, self.keys[layer], self.values[layer], self.lengths[layer])
