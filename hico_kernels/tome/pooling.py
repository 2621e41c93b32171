"""Pooling of a patched tower's output: a token of size s counts s times, as in attention.

Without it, a tower that pools by attention or by a mean would see a merged region as one patch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hico_kernels.tome.batch import Batch
from hico_kernels.tome.instead import Instead


class Pooling:
    """What pools a tower's tokens, changed until `remove`. last: gives this thread's last call."""

    def __init__(self, tower: nn.Module, last: Callable[[], Batch]) -> None:
        self.last = last
        self._changes: list[Any] = []
        for head in tower.modules():  # of transformers' SigLIP and SigLIP2
            probe = getattr(head, "attention", None)
            if isinstance(probe, nn.MultiheadAttention):
                self._changes += [
                    head.register_forward_pre_hook(self._head, with_kwargs=True),
                    probe.register_forward_pre_hook(self._probe, with_kwargs=True),
                ]
        pool = getattr(tower, "attn_pool", None)
        if pool is not None:
            self._changes.append(pool.register_forward_pre_hook(self._latent, with_kwargs=True))
        if hasattr(tower, "forward_intermediates"):  # timm
            self._pool = Instead(tower, self._mean, "pool")
            self._maps = Instead(tower, self._intermediates, "forward_intermediates")
            self._changes += [self._pool, self._maps]

    def remove(self) -> None:
        """Leave everything as it was."""
        for change in self._changes:
            change.remove()

    def _bias(self, x: Tensor) -> Tensor | None:
        """The log of sizes of the tokens x [B, K, C], the last ones of the output."""
        batch = self.last()
        bias = batch.bias if batch.merged else None
        return None if bias is None else bias[:, -x.shape[1] :].to(x.dtype)

    def _head(self, head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """The mask of padding [B, T] is for tokens that are not there any more: see `_probe`."""
        return (args[:1], {}) if self.last().merged else None

    def _probe(
        self, probe: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]
    ) -> tuple | None:
        bias = self._bias(args[1])
        if bias is None:
            return None
        mask = bias.repeat_interleave(probe.num_heads, dim=0)[:, None]
        return args, {**kwargs, "attn_mask": mask}

    def _latent(self, pool: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """timm's pooling by attention."""
        bias = self._bias(args[0])
        return None if bias is None else (args, {**kwargs, "attn_mask": bias[:, None, None]})

    def _mean(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """timm's pooling: "avg" weighs, "avgmax" in half of it, the others not at all."""
        _, x, given = self._pool.named(args, kwargs)
        tower, batch = self._pool.module, self.last()
        kind = given.get("pool_type") or tower.global_pool
        weighs = tower.attn_pool is None and kind in ("avg", "avgmax")
        if not weighs or not (batch.merged and batch.prop_attn):
            return self._pool.original(*args, **kwargs)
        first = 0 if getattr(tower, "pool_include_prefix", False) else tower.num_prefix_tokens
        x, sizes = x[:, first:], batch.sizes[:, first:, None]
        mean = (x * sizes).sum(dim=1) / sizes.sum(dim=1)
        mean = mean.to(x.dtype)
        return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)

    def _intermediates(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        _, _, given = self._maps.named(args, kwargs)
        if given.get("output_fmt", "NCHW") != "NLC":
            raise ValueError(
                "output_fmt must be 'NLC' in a patched tower, whose tokens are no grid any more: "
                "use unmerge() on its handle, or remove()"
            )
        return self._maps.original(*args, **kwargs)
