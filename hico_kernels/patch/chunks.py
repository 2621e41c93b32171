"""Prompts that `generate` would read in chunks: what the text asks for is known in the last one."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

_PREFILLS = ("_prefill", "_prefill_chunking")  # since 5.0, and before


def refuse_chunks(
    model: nn.Module, visual: Collection[str], drops: Callable[[], bool]
) -> Callable[[], None]:
    """Let `model.generate` refuse `prefill_chunk_size` for prompts with visual tokens while `drops`
    says so; returns what undoes it.

    visual: the names of inputs that bring visual tokens.
    """
    names = [name for name in _PREFILLS if hasattr(model, name)]
    for name in names:
        setattr(model, name, _checking(getattr(model, name), visual, drops))

    def undo() -> None:
        for name in names:
            model.__dict__.pop(name, None)

    return undo


def _checking(stock: Callable, visual: Collection[str], drops: Callable[[], bool]) -> Callable:
    def prefill(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = generation_config.prefill_chunk_size
        given = {**kwargs, **kwargs.get("model_kwargs", args[0] if args else {})}
        ready = (given.get("mm_encoder_outputs") or {}).values()  # pixels that were encoded ahead
        brought = [*ready, *(given.get(name) for name in visual)]
        if size is not None and drops() and any(x is not None for x in brought):
            raise ValueError(
                "prefill_chunk_size must be None when visual tokens are dropped: the question, "
                f"which comes in the last chunk, says which ones; got {size}"
            )
        return stock(input_ids, generation_config, *args, **kwargs)

    return prefill
