"""Drop-in token dropping for other people's models.

This module can be called: ``hico_kernels.patch(model, DropPlan({4: Uniform(keep=0.5)}))``. It stays
a package as well, so that ``hico_kernels.patch.plan`` can be imported. transformers is imported
when something is patched, not before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from hico_kernels.patch import presets
from hico_kernels.patch.families import (
    UnsupportedModel,
    has_own_plan,
    take_apart,
    why_not_packed,
    why_not_renumber,
)
from hico_kernels.patch.plan import DropPlan, PerFrame, TextTopK, Uniform
from hico_kernels.patch.prellm import LAYOUTS, PreLLM

if TYPE_CHECKING:
    from hico_kernels.patch.handle import Handle
    from hico_kernels.patch.vision import VisionAttention

__all__ = [
    "DropPlan",
    "PerFrame",
    "PreLLM",
    "TextTopK",
    "Uniform",
    "UnsupportedModel",
    "compress",
    "presets",
    "selfcheck",
    "supports",
    "vision_attention",
]


@contextmanager
def compress(model: nn.Module, plan: DropPlan | PreLLM, rows: str = "padded") -> "Iterator[Handle]":
    """`hico_kernels.patch` for the time of a with block."""
    from hico_kernels.patch import handle

    with handle.compress(model, plan, rows) as patched:
        yield patched


def supports(model: nn.Module) -> dict[str, Any]:
    """Whether `model` can be patched, and which plans fit it.

    -> {"supported": bool, "reason": why not, or None}, and where supported "family", "layers", the
    "positions" that a plan, and "rows" that `patch` may ask for, and whether clips can be merged in
    front of it ("pre_llm").
    """
    if has_own_plan(model):
        family, layers, renumber, rows = (
            type(model).__name__,
            model.config.num_layers,
            True,
            ["packed"],
        )
    else:
        try:
            parts = take_apart(model)
        except UnsupportedModel as error:
            return {"supported": False, "reason": str(error)}
        family, layers = parts.family.name, len(parts.decoder.layers)
        renumber = why_not_renumber(parts) is None
        rows = ["padded"] if why_not_packed(parts) else ["padded", "packed"]
    return {
        "supported": True,
        "reason": None,
        "family": family,
        "layers": layers,
        "positions": ["keep", "renumber"] if renumber else ["keep"],
        "rows": rows,
        "pre_llm": getattr(model.config, "model_type", None) in LAYOUTS,
    }


def selfcheck(
    model: nn.Module, plan: DropPlan | PreLLM | None = None, rows: str = "padded"
) -> dict[str, float]:
    """Check on your own stack that dropping is exact: see `hico_kernels.patch.check.selfcheck`."""
    from hico_kernels.patch import check

    return check.selfcheck(model, plan, rows)


def vision_attention(model: nn.Module) -> "VisionAttention":
    """One attention call for all frames in a vision tower: `hico_kernels.patch.vision`."""
    from hico_kernels.patch import vision

    return vision.vision_attention(model)


class _Patch(ModuleType):
    def __call__(self, model: nn.Module, plan: DropPlan | PreLLM, rows: str = "padded") -> "Handle":
        """Let `model` drop or merge visual tokens by `plan` until `remove()` on the result.

        rows: "padded" or "packed", see `hico_kernels.patch.handle.patch`.
        """
        from hico_kernels.patch.handle import patch

        return patch(model, plan, rows)


sys.modules[__name__].__class__ = _Patch
