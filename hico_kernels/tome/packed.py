"""The packed frames of one forward call of a tower that ends in a patch merger (Qwen-VL).

The merger joins every `unit` patches that follow each other, a square of the picture, to one token
of the language model. So whole groups merge, each patch with the one at its place in the other
group, and only with groups of the same sequence: the frame or window that merging blocks attend in.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.merge import merge_similar
from hico_kernels.patch.families import UnsupportedModel
from hico_kernels.tome.schedule import Settings
from hico_kernels.tome.towers import Parts


class Packed:
    """What every group stands for, block after block. Patches are [P, C], groups [G, unit * C].

    Lengths and bounds of sequences count groups and are on the host: one copy from the device for
    every tensor of bounds that the tower has.
    """

    def __init__(self, parts: Parts, settings: Settings, x: Tensor, given: dict[str, Any]) -> None:
        self.parts, self.settings, self.unit = parts, settings, parts.unit
        self.device, self.num_patches = x.device, len(x)
        self.places = torch.arange(len(x) // self.unit, device=x.device)  # group -> place at first
        self.groups = self.places  # place at first -> group now
        self.group_sizes = torch.ones_like(self.places, dtype=torch.int32)
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.merged = False
        self.done = 0  # blocks
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._bounds: Tensor | None = None  # of the sequences that groups merge in, at first

    @property
    def sizes(self) -> Tensor:
        """[K] int32: input patches behind each patch."""
        return self.group_sizes.repeat_interleave(self.unit)

    @property
    def assignment(self) -> Tensor:
        """[P] int32: which of the K patches each patch went into."""
        inside = torch.arange(self.unit, device=self.device)
        return (self.groups[:, None] * self.unit + inside).flatten().int()

    @property
    def bias(self) -> Tensor | None:
        """What attention adds to the logits of each key, [1, K]; None where it is nothing."""
        if not (self.settings.prop_attn and self.merged):
            return None
        return self.sizes.to(self.wide).log()[None]

    def fits(self, x: Tensor) -> bool:
        """Whether x holds one row for each patch that is left."""
        return len(x) == len(self.group_sizes) * self.unit

    def pairs(self, index: int, given: dict[str, Any]) -> list[int]:
        """How many pairs of groups merge in a sequence of each length; empty: none at all."""
        if index not in self.parts.merging:
            return []
        bounds = self._at_first(given["cu_seqlens"])
        if self._bounds is None:
            self._begin(bounds)
        elif not torch.equal(bounds, self._bounds):
            raise UnsupportedModel("vision_tower: blocks that merge attend in different sequences")
        turn = self.parts.merging.index(index)
        found = [pairs[turn] for pairs in self._pairs]
        return found if any(found) else []

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a block was given for its attention, for the patches that are left.

        Bounds: of a single sequence, so that attention calls torch's once; see `ends`.
        """
        new = {**given, "cu_seqlens": torch.tensor([0, len(self.group_sizes) * self.unit])}
        name = self.parts.kind.tables
        if self.merged:
            new[name] = tuple(
                self._by_group(table)[self.places].view(-1, table.shape[1]) for table in given[name]
            )
        return new

    def ends(self, given: dict[str, Any]) -> tuple[Tensor, int]:
        """Where the sequences of a block's attention end now, [B+1] int32, and the longest."""
        bounds = self._at_first(given["cu_seqlens"])
        index = torch.searchsorted(self._bounds, bounds)
        if not torch.equal(self._bounds[index], bounds):
            raise UnsupportedModel("vision_tower: a block attends across sequences that merge")
        now = self._starts()[index] * self.unit
        return now.int().to(self.device), int(now.diff().max())

    def merge(self, key: Tensor, r: list[int], x: Tensor, update: Tensor) -> list[Tensor]:
        """Merge r[i] pairs of groups in every sequence of the i-th length.

        x [K, C] and what attention adds to it, by the key [1, H, K, D]: the mean over heads, the
        patches of a group side by side.
        """
        metric = self._by_group(key[0].detach().mean(dim=0, dtype=self.wide))
        groups, updates = self._by_group(x), self._by_group(update)
        old = self._rows()
        found = [
            merge_similar(
                self._of(groups, rows),
                self._of(metric, rows),
                pairs,
                self._of(self.group_sizes, rows),
                other=self._of(updates, rows),
                order=self.settings.order,
            )
            for rows, pairs in zip(old, r, strict=True)
        ]
        self._lengths = self._lengths - torch.tensor(r)
        new = self._rows()
        merged, into = [], torch.empty_like(self.groups[: len(self.group_sizes)])
        for step, before, after in zip(found, old, new, strict=True):
            places = self._of(self.places, before).gather(1, step.places.long())
            merged.append((step.tokens, step.other, step.sizes, places))
            into[before] = after.gather(1, step.matching.assignment.long())
        width = x.shape[1]
        x, update, self.group_sizes, self.places = (
            self._join(parts, new) for parts in zip(*merged, strict=True)
        )
        self.groups = into[self.groups]
        self.merged = True
        return [x.view(-1, width), update.view(-1, width)]

    def unmerge(self, x: Tensor) -> Tensor:
        """x [K, ...] -> [P, ...]: every patch at first has the value of what it went into."""
        if not self.fits(x):
            expected = len(self.group_sizes) * self.unit
            raise ValueError(f"x must be [{expected}, ...], got {tuple(x.shape)}")
        return x[self.assignment.long()]

    def _at_first(self, ends: Tensor) -> Tensor:
        """Bounds of sequences in groups, [B+1] on the host, each once."""
        for seen, bounds in self._seen:
            if seen is ends:
                return bounds
        host = ends.cpu().long()
        if (host % self.unit).any() or host[0] != 0 or host[-1] != self.num_patches:
            raise ValueError(
                f"grid_thw must be of whole groups of {self.unit} patches, {self.num_patches} in "
                f"all, got sequences that end at {host.tolist()}"
            )
        bounds = torch.unique_consecutive(host // self.unit)
        self._seen.append((ends, bounds))
        return bounds

    def _begin(self, bounds: Tensor) -> None:
        self._bounds = bounds
        # Sequences of one length at first have one length always.
        self._lengths, self._kinds = bounds.diff().unique(return_inverse=True)
        plan, layers = self.settings.schedule, len(self.parts.merging)
        self._pairs = [plan.pairs(length, layers) for length in self._lengths.tolist()]

    def _starts(self) -> Tensor:
        """Bounds of the sequences now, [B+1] on the host."""
        return nn.functional.pad(self._lengths[self._kinds].cumsum(0), (1, 0))

    def _rows(self) -> list[Tensor]:
        """The groups [N, L] of the N sequences of each length."""
        starts = self._starts()[:-1]
        return [
            starts[self._kinds == kind].to(self.device)[:, None]
            + torch.arange(length, device=self.device)
            for kind, length in enumerate(self._lengths.tolist())
        ]

    def _by_group(self, x: Tensor) -> Tensor:
        """[K, C] -> [K / unit, unit * C]"""
        return x.reshape(-1, self.unit * x.shape[1])

    def _of(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [G, ...], rows [N, L] -> [N, L, ...]"""
        return x.unflatten(0, rows.shape) if len(self._lengths) == 1 else x[rows]

    def _join(self, parts: tuple[Tensor, ...], rows: list[Tensor]) -> Tensor:
        """Back from [N, L, ...] of every length to [G, ...]."""
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        if len(parts) == 1:
            return flat
        return flat[torch.cat([each.flatten() for each in rows]).argsort()]


class Mergers:
    """The patch mergers of a tower, changed until `remove`: every group gets a token again.

    batch: gives this thread's last call, None before the first.
    """

    def __init__(self, mergers: list[nn.Module], batch: Any) -> None:
        self.batch = batch
        self._hooks = [merger.register_forward_hook(self._after) for merger in mergers]

    def remove(self) -> None:
        """Leave everything as it was."""
        for hook in self._hooks:
            hook.remove()

    def _after(self, merger: nn.Module, args: tuple, out: Tensor) -> Tensor:
        batch = self.batch()
        called = batch is not None and batch.merged and batch.fits(args[0])
        return out[batch.groups] if called else out
