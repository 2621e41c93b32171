"""What the host knows of a packed batch: where its sequences lie, and their visual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Per sequence: its rows, the first visual one (in the sequence), how many are visual."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    visual: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each sequence in the packed batch, and the number of all rows."""
        return tuple(accumulate(self.lengths, initial=0))

    def keeping(self, counts: Sequence[int]) -> "Rows":
        """The same batch with `counts` visual rows left in each sequence."""
        lengths = (n - v + c for n, v, c in zip(self.lengths, self.visual, counts, strict=True))
        return replace(self, lengths=tuple(lengths), visual=tuple(counts))


def from_zero(rows: Rows, device: torch.device) -> Tensor:
    """[S] int64: 0, 1, 2, ... in each sequence."""
    return torch.cat([torch.arange(n, device=device) for n in rows.lengths])


def to_device(values: Sequence, device: torch.device) -> Tensor:
    """Host ints as an int64 tensor, copied without waiting for the device."""
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
