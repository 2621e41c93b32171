"""Token merging inside someone else's vision tower, on this one instance."""

import threading
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hico_kernels.patch.families import UnsupportedModel
from hico_kernels.tome.ahead import Ahead
from hico_kernels.tome.batch import Batch
from hico_kernels.tome.instead import Instead
from hico_kernels.tome.packed import Mergers, Packed
from hico_kernels.tome.pooling import Pooling
from hico_kernels.tome.schedule import Settings
from hico_kernels.tome.towers import Parts, why_not_fused


class Handle:
    """A patched tower. Made by `hico_kernels.tome.patch`."""

    def __init__(self, tower: nn.Module, parts: Parts, settings: Settings) -> None:
        if any(isinstance(b.module.__dict__.get("forward"), Instead) for b in parts.blocks):
            raise UnsupportedModel(
                f"vision_tower: this {type(tower).__name__} is patched already; remove() the other "
                "patch first"
            )
        self.tower, self.parts, self.settings = tower, parts, settings
        self._local = threading.local()  # calls of two threads do not mix
        # What is not traced: lengths of packed sequences are read from tensors.
        enter = torch.compiler.disable(self._enter) if parts.unit else self._enter
        self._changes = [
            Ahead(block, partial(enter, index), self._local)
            for index, block in enumerate(parts.blocks)
        ]
        self._changes.append(Pooling(tower, lambda: self._last))
        self._changes.append(Mergers(parts.mergers, lambda: getattr(self._local, "batch", None)))

    @property
    def sizes(self) -> Tensor:
        """[B, K] int32: input tokens behind each token of this thread's last call; 0: padding.

        Packed frames (Qwen-VL): [K], as they follow each other.
        """
        return self._last.sizes

    @property
    def assignment(self) -> Tensor:
        """[B, T] int32: which of the K tokens each of the T tokens went into; packed: [T]."""
        return self._last.assignment

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token at first the value of the token it went into, in the tower's own order.

        x [B, K, ...], such as the tower's output -> [B, T, ...]; packed: [K, ...] -> [T, ...].
        Differentiable.
        """
        return self._last.unmerge(x)

    def remove(self) -> None:
        """Take everything off again: the tower is as it was, bit for bit."""
        for change in self._changes:
            change.remove()
        self._changes = []

    def __deepcopy__(self, memo: dict) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"a tower patched by hico_kernels cannot be {what}: remove() first and patch the copy"
        )

    @property
    def _last(self) -> Batch | Packed:
        batch = getattr(self._local, "batch", None)
        if batch is None:
            raise RuntimeError("the patched tower has not run on this thread yet")
        return batch

    def _enter(
        self, index: int, x: Tensor, given: dict[str, Any]
    ) -> tuple[Batch | Packed, int | list[int]]:
        """The tokens of this forward call, which begins with the first block, and how many pairs
        merge.
        """
        local = self._local
        if index == 0:
            local.batch = None
            self._check()
            kind = Packed if self.parts.unit else Batch
            local.batch = kind(self.parts, self.settings, x, given)
        elif self._last.done != index or not self._last.fits(x):
            raise UnsupportedModel(
                f"vision_tower: block {index} of {type(self.tower).__name__} was not called with "
                f"the output of block {index - 1}"
            )
        local.batch.done = index + 1
        return local.batch, local.batch.pairs(index, given)

    def _check(self) -> None:
        """What may have changed since patching and would go wrong."""
        reason = why_not_fused(self.tower, self.parts.blocks)
        if reason is not None:
            raise UnsupportedModel(f"vision_tower: {reason}")
        block = self.parts.blocks[0].module
        if getattr(self.tower, "grad_checkpointing", False) or (
            block.training and getattr(block, "gradient_checkpointing", False)
        ):
            raise ValueError("vision_tower: gradient checkpointing with merging is not supported")
