"""A block whose attention runs ahead of it, so that tokens merge between the two.

A block computes x + f(attention(norm(x))), then an MLP, token by token. Here u = attention(norm(x))
is computed first, x and u are merged, and the block is run on the merged x; when it asks for its
attention, it gets the merged u. A weighted mean is linear and f (LayerScale, drop path) acts on
channels or whole samples, so the block goes on with exactly the merge of x + f(u), and no code of a
block is copied. norm runs a second time, on the tokens that are left, and goes unused.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.patch.families import UnsupportedModel
from hico_kernels.tome.attention import Proportional
from hico_kernels.tome.batch import Batch
from hico_kernels.tome.instead import Instead
from hico_kernels.tome.packed import Packed
from hico_kernels.tome.towers import Block


class Ahead:
    """One block of a patched tower.

    enter: the tokens of this call and the pairs to merge, given the block's input and the rest of
    its arguments. local: `.waiting` is the `Answer` for the block that runs on this thread.
    """

    def __init__(
        self,
        block: Block,
        enter: Callable[[Tensor, dict[str, Any]], tuple[Batch | Packed, int | list[int]]],
        local: threading.local,
    ) -> None:
        self.enter, self.local = enter, local
        self.norm = Instead(block.norm, self._norm)
        self.attention = Instead(block.attention, self._answer)
        # Compiled attention would meet `Proportional` twice: while it is traced, and when it runs.
        self._attend_and_merge = torch.compiler.disable(self._attended_and_merged)
        self.block = Instead(block.module, self._run)

    def remove(self) -> None:
        """Leave the block as it was."""
        for part in (self.norm, self.attention, self.block):
            part.remove()

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        name, x, given = self.block.named(args, kwargs)
        batch, r = self.enter(x, given)
        if not r and not batch.merged:
            return self.block.original(*args, **kwargs)
        x, update = self._attend_and_merge(x, given, batch, r)
        answer = Answer(x, update, given)
        self.local.waiting = answer
        try:
            out = self.block.original(**{**given, name: x})
        finally:
            self.local.waiting = None
        answer.check(self.block.module, out)
        return out

    def _attended_and_merged(
        self, x: Tensor, given: dict[str, Any], batch: Batch | Packed, r: int | list[int]
    ) -> tuple[Tensor, Any]:
        """What is left of the block's input, and what attention gives for it."""
        # The blocks of all known towers pass on what they are given; `Answer.give` checks that.
        passed = self.attention.takes(batch.arguments(given))
        with Proportional(batch.bias, batch.ends(given)) as seen:
            out = self.attention.original(self.norm.module(x), **passed)
        if len(seen.keys) != 1:
            raise UnsupportedModel(
                f"vision_tower: {type(self.attention.module).__name__} called torch's scaled_dot_"
                f"product_attention, where merging looks at the keys, {len(seen.keys)} times, not 1"
            )
        if not r:
            return x, out
        if not isinstance(out, tuple):
            return tuple(batch.merge(seen.keys[0], r, x, out))
        x, update = batch.merge(seen.keys[0], r, x, out[0])
        return x, (update, *out[1:])

    def _norm(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = self.norm.original(*args, **kwargs)
        answer = getattr(self.local, "waiting", None)
        if answer is not None and args[0] is answer.x:
            answer.normed = out
        return out

    def _answer(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        answer = getattr(self.local, "waiting", None)
        if answer is None:
            return self.attention.original(*args, **kwargs)
        _, x, asked = self.attention.named(args, kwargs)
        return answer.give(x, asked)


class Answer:
    """What attention gives its block, once."""

    def __init__(self, x: Tensor, out: Any, given: dict[str, Any]) -> None:
        self.x, self.out, self.given, self.times = x, out, given, 0
        self.normed: Tensor | None = None  # norm(x), once the block has it

    def give(self, x: Tensor, asked: dict[str, Any]) -> Any:
        """The result; raises where the block does otherwise than when attention ran ahead."""
        if x is not self.normed:
            raise UnsupportedModel(
                "vision_tower: a block's attention is not on the norm of its input"
            )
        for name, value in asked.items():
            given = self.given.get(name)
            if value is not given and not (given is None and value is False):
                raise UnsupportedModel(f"vision_tower: a block changes {name} for its attention")
        self.times += 1
        if self.times > 1:
            raise UnsupportedModel("vision_tower: a block asks for attention more than once")
        return self.out

    def check(self, block: nn.Module, out: Any) -> None:
        """Raise when the block has not used it, or does not give the tokens it was given."""
        tokens = out[0] if isinstance(out, tuple) else out
        if self.times != 1 or tokens.shape[:-1] != self.x.shape[:-1]:
            raise UnsupportedModel(
                f"vision_tower: {type(block).__name__} did not use its attention as expected"
            )
