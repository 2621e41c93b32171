"""The tokens of one forward call of a tower, from [B, T, C] on."""

from typing import Any

import torch
from torch import Tensor

from hico_kernels.merge import merge_similar
from hico_kernels.tome.schedule import Settings
from hico_kernels.tome.towers import Parts


class Batch:
    """What every token stands for, block after block."""

    def __init__(self, parts: Parts, settings: Settings, x: Tensor, given: dict[str, Any]) -> None:
        self.kind, self.prefix = parts.kind, parts.prefix
        self.order, self.prop_attn = settings.order, settings.prop_attn
        b, t = x.shape[:2]
        self._pairs = settings.schedule.pairs(t - self.prefix, len(parts.blocks))
        self.places = torch.arange(t, device=x.device).expand(b, t)  # token -> its place at first
        self.assignment = self.places.int()  # place at first -> token now
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.merged = False
        self.done = 0  # blocks
        mask = given.get("attention_mask") if self.kind.padded else None
        self.padded = mask is not None
        # Padding has size 0: it weighs nothing in a mean, and its log masks it out. The mask is
        # [B, 1, T, T], alike for all queries: bool, or 0 and a large negative number.
        self.sizes = torch.ones_like(self.assignment)
        if mask is not None:
            self.sizes = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0].int()

    @property
    def bias(self) -> Tensor | None:
        """What attention adds to the logits of each key, [B, T]; None where it is nothing."""
        if not self.padded and not (self.prop_attn and self.merged):
            return None
        sizes = self.sizes if self.prop_attn else self.sizes > 0
        return sizes.to(self.wide).log()

    def fits(self, x: Tensor) -> bool:
        """Whether x holds one row for each token that is left."""
        return x.shape[:2] == self.sizes.shape

    def pairs(self, index: int, given: dict[str, Any]) -> int:
        """How many pairs merge in block `index`."""
        return self._pairs[index]

    def ends(self, given: dict[str, Any]) -> None:
        """Of packed sequences: there are none."""

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a block was given for its attention, for the tokens that are left."""
        new = dict(given)
        if self.kind.padded:
            new["attention_mask"] = None  # in the bias
        name = self.kind.tables
        if self.merged and name is not None and given.get(name) is not None:
            tables = given[name]
            several = isinstance(tables, tuple)
            new[name] = tuple(map(self._rows, tables)) if several else self._rows(tables)
        return new

    def _rows(self, table: Tensor) -> Tensor:
        """Rotary table of all patches, [P, D] to [B, H, P, D] -> [B, H, P left, D]: a merged token
        has the position of the place it took.
        """
        table = table.view(*[1] * (4 - table.dim()), *table.shape).expand(
            len(self.places), -1, -1, -1
        )
        rows = (self.places[:, self.prefix :] - self.prefix)[:, None, :, None]
        return table.gather(2, rows.expand(-1, table.shape[1], -1, table.shape[3]))

    def merge(self, key: Tensor, r: int, x: Tensor, update: Tensor) -> list[Tensor]:
        """Merge r pairs of the tokens x [B, T, C] and of what attention adds to them, by the mean
        over heads of the key [B, H, T, D].
        """
        metric = key.detach().mean(dim=1, dtype=self.wide)
        if self.padded:  # NaN never wins: no real token goes to padding
            metric = metric.masked_fill(self.sizes[..., None] == 0, torch.nan)
        # All but the last protected token take no part at all: so with a class token alone, tokens
        # alternate as in arXiv 2210.09461, and any number of registers is treated alike.
        step = merge_similar(
            x,
            metric,
            r,
            self.sizes,
            other=update,
            front=max(self.prefix - 1, 0),
            class_token=self.prefix > 0,
            order=self.order,
        )
        self.sizes = step.sizes
        self.places = self.places.gather(1, step.places.long())
        self.assignment = step.matching.assignment.gather(1, self.assignment.long())
        self.merged = True
        return [step.tokens, step.other]

    def unmerge(self, x: Tensor) -> Tensor:
        """x [B, K, ...] -> [B, T, ...]: every token at first has the value of what it went into."""
        if not self.fits(x):
            expected = ", ".join(map(str, self.sizes.shape))
            raise ValueError(f"x must be [{expected}, ...], got {tuple(x.shape)}")
        rows = torch.arange(len(x), device=x.device)[:, None]
        return x[rows, self.assignment.long()]
