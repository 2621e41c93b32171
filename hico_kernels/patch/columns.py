"""KV-cache layers that know which tokens of the sequence they hold.

After a drop every layer of a model holds fewer columns than the sequence has tokens, while
transformers sizes masks and slices prompts by the length of one layer. As its own sliding-window
layers do, these report the length of the *sequence*, and keep the position of every column beside
it, in step through beam search, rollbacks, copies and pickles. One of these takes the place of a
stock layer with all its state: the cache object and its tensors stay the user's own.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class Columns:
    """The sequence positions behind the columns of a cache layer; never changed in place.

    Layers between two drops hold the same columns and share one object. They stay sharing, since
    the last change is remembered: the next layer that asks for the same gets the same object.
    """

    def __init__(self, positions: Tensor, valid: Tensor, full: bool) -> None:
        self.positions = positions  # [B, N] int64
        self.valid = valid  # [B, N] bool, False is padding
        self.full = full  # known on the host: every column is valid
        self._last: tuple | None = None

    def __len__(self) -> int:
        return self.positions.shape[1]

    def append(self, new: "Columns") -> "Columns":
        """With the columns of `new` behind."""
        return self._once(
            "append",
            new,
            lambda: Columns(
                torch.cat([self.positions, new.positions], 1),
                torch.cat([self.valid, new.valid], 1),
                self.full and new.full,
            ),
        )

    def last(self, count: int) -> "Columns":
        """The last `count`."""
        return self if count == len(self) else self._slice(len(self) - count, len(self))

    def crop(self, count: int) -> "Columns":
        """Without the last `count`."""
        return self if count == 0 else self._slice(0, len(self) - count)

    def _slice(self, start: int, stop: int) -> "Columns":
        def make() -> Columns:
            return Columns(self.positions[:, start:stop], self.valid[:, start:stop], self.full)

        return self._once("slice", (start, stop), make)

    def batch(self, name: str, arg: Tensor | int, pick: Callable[[Tensor], Tensor]) -> "Columns":
        """With `pick` applied to the batch; `name` and `arg` say what it does."""
        return self._once(
            name, arg, lambda: Columns(pick(self.positions), pick(self.valid), self.full)
        )

    def _once(self, name: str, arg: object, make: Callable[[], "Columns"]) -> "Columns":
        same = self._last is not None and self._last[0] == name
        if same:
            kept = self._last[1]
            same = kept == arg if isinstance(arg, tuple) else kept is arg
        if not same:
            self._last = (name, arg, make())
        return self._last[2]


class _Dropped:
    """What the three layers share. Without columns (nothing dropped yet) they act as stock ones."""

    columns: Columns | None = None
    seen: int = 0  # tokens of the sequence so far, dropped ones included
    expected: int | None = None  # columns that the patched model announced for the next update
    placed: Tensor | None = None  # [B], in layer 0: tokens that merging left, for rotary tables

    @property
    def holds_fewer(self) -> bool:
        """Whether anything was dropped here."""
        return self.columns is not None

    def extend(self, old: Columns, new: Columns, seen: int) -> None:
        """Say which columns the next `update` brings."""
        self.columns, self.seen, self.expected = old.append(new), seen, len(new)

    def visible(self, new: int) -> int:
        """How many columns attention is given in an update with `new` ones."""
        return len(self.columns)

    def stored(self) -> int:
        """Columns that hold keys now."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """As the stock layer; refuses tokens that the patched model did not announce."""
        if self.columns is not None:
            self._take(key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def _take(self, count: int) -> None:
        """Check that the patched model announced so many."""
        if self.expected != count:
            raise RuntimeError(
                "past_key_values: tokens were dropped from this cache; only the patched model "
                "that filled it can go on with it"
            )
        self.expected = None

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, as the caller counts them."""
        return super().get_seq_length() if self.columns is None else self.seen

    def reset(self) -> None:
        """Forget everything."""
        self.columns, self.seen, self.expected, self.placed = None, 0, None, None
        if isinstance(self, DynamicLayer):  # before 5.18 the stock one keeps its columns, as zeros
            self.keys, self.values, self.is_initialized = None, None, False
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self._batch("reorder", beam_idx, lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._batch("repeat", repeats, lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._batch("select", indices, lambda t: t[indices.to(t.device)])

    def _shorten(self, tokens: int) -> int:
        """Count off the last tokens, as many as `crop(tokens)` says: a count <= 0, or, in
        transformers before 5.18, a length to come down to. What generation appends is never
        dropped.
        """
        removed = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        self.seen -= removed
        if self.placed is not None:
            self.placed = self.placed - removed
        return removed

    def _batch(self, name: str, arg: Tensor | int, pick: Callable[[Tensor], Tensor]) -> None:
        if self.placed is not None:
            self.placed = pick(self.placed)
        if self.columns is not None:
            self.columns = self.columns.batch(name, arg, pick)


class DroppedLayer(_Dropped, DynamicLayer):
    """A growing layer."""

    def crop(self, tokens: int) -> None:
        """Remove the last tokens: a count <= 0, or a length to come down to."""
        if self.columns is None:
            super().crop(tokens)
            return
        self.columns = self.columns.crop(self._shorten(tokens))
        self.keys, self.values = (x[..., : len(self.columns), :] for x in (self.keys, self.values))


class DroppedSlidingLayer(_Dropped, DynamicSlidingWindowLayer):
    """A sliding-window layer. It holds the last window - 1 *kept* tokens: more than the window of
    positions needs, never less; the mask goes by position.
    """

    def visible(self, new: int) -> int:
        """While recording for a rollback it holds more than it shows."""
        total = len(self.columns)
        recording = getattr(self, "record_past", False)  # since 5.18
        return min(total, self.sliding_window - 1 + new) if recording else total

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """As the stock layer, counting the tokens of the sequence."""
        if self.columns is not None:
            self.cumulative_length = self.seen - key_states.shape[-2]  # the stock update adds these
        out = super().update(key_states, value_states, *args, **kwargs)
        if self.columns is not None:
            self.columns = self.columns.last(self.keys.shape[-2])
        return out

    def crop(self, tokens: int) -> None:
        """Remove the last tokens: a count <= 0, or a length to come down to."""
        lost = self.seen >= self.sliding_window and not getattr(self, "record_past", False)
        if self.columns is None or lost:  # which the stock layer refuses
            super().crop(tokens)
            return
        left = self.columns.crop(self._shorten(tokens))
        self.cumulative_length = self.seen
        self.columns = left.last(min(len(left), self.sliding_window - 1))
        window = slice(len(left) - len(self.columns), len(left))
        self.keys, self.values = self.keys[:, :, window], self.values[:, :, window]


class DroppedStaticLayer(_Dropped, StaticLayer):
    """A layer of fixed capacity, filled from its start; the columns are the filled part."""

    def stored(self) -> int:
        """The filled part."""
        return len(self.columns) if self.columns is not None else int(super().get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """As the stock layer. Before 5.0 it is told where to write, in tokens of the sequence."""
        if self.columns is not None and args and "cache_position" in (args[0] or {}):
            stop = len(self.columns)
            places = torch.arange(stop - key_states.shape[-2], stop, device=key_states.device)
            args = ({**args[0], "cache_position": places}, *args[1:])
        return super().update(key_states, value_states, *args, **kwargs)


class DroppedStaticSlidingLayer(_Dropped, StaticSlidingWindowLayer):
    """A sliding window of fixed capacity: the last kept tokens, filled from its start. As the stock
    one it gives attention all that it has, or, once there are more, those and all new ones.
    """

    def stored(self) -> int:
        """The filled part."""
        seen = min(int(super().get_seq_length()), self.max_cache_len)
        return seen if self.columns is None else len(self.columns)

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """As the stock layer, counting the tokens of the sequence."""
        if self.columns is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self._take(key_states.shape[-2])
        initialize(self, key_states)
        total = len(self.columns)
        held, stay = total - key_states.shape[-2], min(total, self.max_cache_len)
        out = []
        for own, new in ((self.keys, key_states), (self.values, value_states)):
            if total == stay:
                own[:, :, held:total] = new
                out.append(own)
            else:
                out.append(torch.cat([own[:, :, :held], new], 2))
                own.copy_(out[-1][:, :, -stay:])
        self.columns = self.columns.last(stay)
        self._count()
        return tuple(out)

    def _count(self) -> None:
        """Count the tokens of the sequence where the stock layer does."""
        # One count is an int: before 5.0 the only one, then beside a tensor that this needs not.
        name = "cumulative_length"
        setattr(self, f"{name}_int" if hasattr(self, f"{name}_int") else name, self.seen)


def initialize(layer: StaticLayer, like: Tensor) -> None:
    """Let a static layer make its tensors, for keys and values like [B, H, *, D]."""
    if not layer.is_initialized:
        wanted = inspect.signature(layer.lazy_initialization).parameters  # one before 5.0
        layer.lazy_initialization(*[like] * len(wanted))


# Layers without columns, of Qwen3.5 and Gemma 4: a state that runs over the tokens that are left;
# nothing at all.
_WITHOUT = {
    getattr(cache_utils, name)
    for name in ("LinearAttentionLayer", "DummyLayer")
    if hasattr(cache_utils, name)
}
_DROPPED = {
    DynamicLayer: DroppedLayer,
    DynamicSlidingWindowLayer: DroppedSlidingLayer,
    StaticLayer: DroppedStaticLayer,
    StaticSlidingWindowLayer: DroppedStaticSlidingLayer,
}


def check_cache(cache: object) -> None:
    """Raise for a cache whose layers cannot hold fewer tokens than the sequence has."""
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    kinds = {type(layer) for layer in cache.layers} - _WITHOUT
    if cache.layer_class_to_replicate is not None:
        kinds.add(cache.layer_class_to_replicate)
    ours = tuple(_DROPPED.values())
    wrong = [kind.__name__ for kind in kinds if kind not in _DROPPED and not issubclass(kind, ours)]
    if wrong:
        allowed = ", ".join(kind.__name__ for kind in _DROPPED)
        raise TypeError(
            f"past_key_values must be made of {allowed} to drop tokens, got "
            f"{', '.join(sorted(wrong))}"
        )


def holds_fewer(layer: object) -> bool:
    """Whether a cache layer holds other columns than the sequence has tokens."""
    return isinstance(layer, _Dropped) and layer.holds_fewer


def layer_of(cache: Cache | None, index: int, dropping: bool) -> _Dropped | None:
    """The cache layer of a decoder layer where it has, or is about to get, columns of its own."""
    if cache is None:
        return None
    if dropping:
        while len(cache.layers) <= index:  # DynamicCache() without a config makes them on demand
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if not isinstance(layer, _Dropped):
            stock, layer = layer, _DROPPED[type(layer)].__new__(_DROPPED[type(layer)])
            layer.__dict__ = stock.__dict__  # the same tensors and settings
            cache.layers[index] = layer
        return layer
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if isinstance(layer, _Dropped) and layer.columns is not None else None
