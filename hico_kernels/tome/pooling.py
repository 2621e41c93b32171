"""Pooling of a patched tower's output: a token of size s counts s times, as in attention.

Without it, a tower that pools by attention or by a mean would see a merged region as one patch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hico_kernels.tome.batch import Batch


class Pooling:
    """Hooks on what pools a tower's tokens. `batch` gives this thread's last call."""

    def __init__(self, tower: nn.Module, batch: Callable[[], Batch]) -> None:
        self.batch = batch
        self._hooks = []
        head = getattr(tower, "head", None)
        probe = getattr(head, "attention", None)
        if isinstance(probe, nn.MultiheadAttention):  # transformers' SigLIP and SigLIP2
            self._hooks = [
                head.register_forward_pre_hook(self._head, with_kwargs=True),
                probe.register_forward_pre_hook(self._probe, with_kwargs=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _head(self, head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """The mask of padding [B, T] is for tokens that are not there any more."""
        if not self.batch().merged:
            return None
        return args[:1], {k: v for k, v in kwargs.items() if k != "attention_mask"}

    def _probe(
        self, probe: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]
    ) -> tuple | None:
        bias = self._bias(args[1])
        if bias is None:
            return None
        mask = bias.repeat_interleave(probe.num_heads, dim=0)[:, None]
        return args, {**kwargs, "attn_mask": mask}

    def _bias(self, x: Tensor) -> Tensor | None:
        batch = self.batch()
        bias = batch.bias if batch.merged else None
        return None if bias is None else bias[:, -x.shape[1] :].to(x.dtype)
