"""One forward call of a patched decoder: what is dropped in it, and what each layer is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hico_kernels.patch.clock import Clock
from hico_kernels.patch.columns import Columns, holds_fewer, layer_of
from hico_kernels.patch.devices import device_of, moved
from hico_kernels.patch.families import LINEAR, SLIDING, Layer
from hico_kernels.patch.masks import each_mask, layer_mask, real_tokens
from hico_kernels.patch.packed import PackedRows, few_each, many_each, one_each
from hico_kernels.patch.packed_cache import PackedLayer, has_packed, packed_layer
from hico_kernels.patch.plan import DropPlan, Rule, Uniform
from hico_kernels.patch.prellm import Clips
from hico_kernels.patch.rows import Prompt, Rows, best, evenly
from hico_kernels.patch.scores import text_scores
from hico_kernels.select import gather_tokens

# What a call knows of its tokens.
_KNOWN = ("mask", "prompt", "real", "merged", "places", "placed", "rows")
_KNOWN += ("_placed", "_anew", "_told")


@dataclass
class Call:
    """State of one forward call; what outlives it hangs on the cache layers (`columns.py`)."""

    plan: DropPlan
    decoder: nn.Module
    layers: list[Layer]
    batch: int
    length: int  # tokens given to the decoder
    mask: Tensor | None  # what the decoder was given: 2D, 4D or None
    prompt: Prompt | None  # None: nothing to drop in this call
    home: torch.device  # of what the decoder was given
    clock: Clock
    probe: Any  # the config of attention that only looks, `scores.probe_config`
    real: Tensor | None = None  # [B, q] bool, False is padding; None: no padding, or not asked
    frames: list[int] | None = None  # of each sequence, for plans that count by them
    clips: list[Clips] | None = None  # what merges in front of the layers; None: not looked for
    left: list[int] | None = None  # visual tokens of each sequence that merging leaves
    merged: Tensor | None = None  # which rows these are, of the flattened [B * q]
    places: Tensor | None = None  # [B, q] rotary positions, where merging closed gaps in them
    placed: Tensor | None = None  # [B] tokens of each sequence then, this call included
    packing: list[int] | None = None  # tokens of each sequence, padding left out; None: padded rows
    few: int = 0  # of packed sequences only the last so many run where keys are read; 0: all
    at_once: bool = False  # packed in front of the first layer, not from the first drop on
    rows: Rows | PackedRows | None = None  # None until the first drop
    counts: list[dict[int, int]] = field(default_factory=list)  # per row: layer -> visual kept
    drops: bool = False  # whether this call drops anything at all
    kept: dict[int, Rows | PackedRows] = field(default_factory=dict)  # what each drop left
    held: list[list[int]] = field(default_factory=list)  # layer -> rows of each sequence
    last: list[int | None] = field(default_factory=list)  # layer -> only these last rows run in it
    scored: dict[int, list[int]] = field(default_factory=dict)  # layer -> rows that were scored
    idle: bool = False  # the layers are to be left alone
    over: bool = False  # the decoder has returned
    _rules: dict[int, Rule] = field(init=False)
    _at: torch.device = field(init=False)  # where the layers run that this call has come to
    _steps: dict[int, tuple[Rows | PackedRows | None, Tensor | None]] = field(default_factory=dict)
    _placed: tuple[Tensor, Tensor] | None = None  # renumbered tables of the layer before
    _anew: tuple[Tensor, Tensor] | None = None  # tables of `places`
    _once: dict[str, list[tuple[tuple, Any]]] = field(default_factory=dict)
    # By kind of layer, what the last one with keys was told: a mask, or packed; rotary tables.
    _told: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at = self.home
        self._rules = dict(self.plan.drops)  # torch.compile does not look into the plan's proxy
        if self.prompt is not None:
            self._count(self.prompt.num_visual)

    def _count(self, visual: list[int]) -> None:
        frames = self.frames or [None] * self.batch
        pairs = zip(visual, frames, strict=True)
        self.counts = [self.plan.counts(n, own) for n, own in pairs]
        pairs = zip(self.counts, visual, strict=True)
        self.drops = any(min([n, *counts.values()]) < n for counts, n in pairs)

    @property
    def pads_states(self) -> bool:
        """Whether a layer whose state runs over the tokens gets places without a token in front:
        padding, until the first drop takes it away; from then on, those of the shorter sequences.
        """
        whole = self.prompt.num_visual
        left = {0: whole if self.left is None else self.left}
        left.update((i, [counts[i] for counts in self.counts]) for i in self._rules)
        starts = sorted(left)
        for i, end in zip(starts, [*starts[1:], len(self.layers)], strict=True):
            rows = [n + own for n, own in zip(self.prompt.num_text, left[i], strict=True)]
            width = self.length if left[i] == whole else max(rows)
            if min(rows) < width and any(x.kind == LINEAR for x in self.layers[i:end]):
                return True
        return False

    def merge(self, clips: list[Clips], fewer: list[int]) -> None:
        """Say which clips merge, and how many visual tokens of each sequence that takes away; the
        plan counts from those that are left. Only then is `merged` to be set.
        """
        self.clips = clips
        if clips:
            visual = self.prompt.num_visual
            self.left = [n - less for n, less in zip(visual, fewer, strict=True)]
            self._count(self.left)
            self.drops = True

    def rest(self, cache: Any) -> None:
        """Leave the layers alone where nothing is dropped, now or before."""
        changed = self.drops or self.packing is not None or self.places is not None
        if changed or (cache is not None and any(map(holds_fewer, cache.layers))):
            return
        if self.prompt is not None and any(layer.reads_keys for layer in self.layers):
            return  # these may run for the last tokens only, which the report counts
        self.idle = True
        self.held = [[self.length] * self.batch] * len(self.decoder.layers)
        self.last = [None] * len(self.held)

    def finish(self) -> None:
        """The decoder has returned; gradient checkpointing may still run its layers again."""
        self.over = True
        self._once.clear()
        self._told.clear()
        self._placed = self._anew = None

    def before_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """New arguments for a decoder layer; None leaves them alone."""
        hidden = args[0] if args else kwargs["hidden_states"]
        new = dict(kwargs)
        name = rotary_name(layer, kwargs)
        cache = None if is_checkpointed(layer) else kwargs.get("past_key_values")
        packed = has_packed(cache, index)
        device = device_of(layer.input_layernorm, hidden.device)
        if device != self._at:
            self._move(device)
        if device != self.home:
            hidden, args = moved(hidden, device), moved(args, device)
            for given in ("attention_mask", name):
                new[given] = self._arrived(given, kwargs.get(given))
        mask = new.get("attention_mask")
        new[name] = self._tables(new[name], hidden)
        hidden = self._left(index, layer, hidden, new[name], packed)
        args = self._beside(args, hidden)
        kind = self.layers[index].kind
        if kind == LINEAR:
            return self._running(args, hidden, new)
        if self.layers[index].reads_keys and kind in self._told:
            return self._like(self._told[kind], name, args, hidden, new)
        if packed or isinstance(self.rows, PackedRows):
            return self._packed(index, cache, hidden, name, args, new)
        store = layer_of(cache, index, self.rows is not None)
        if self.rows is None and store is None:
            return None
        past = 0 if store is None else int(store.get_seq_length())
        if store is not None and index == 0:
            store.placed = self.placed
        columns, queries = self._extend(store, past, hidden.device)
        shown = columns if store is None else columns.last(store.visible(len(queries)))
        new["attention_mask"] = self._mask(mask, queries, shown, past, store, hidden)
        new[name] = self._embeddings(new[name], columns, hidden)
        self._told[kind] = new["attention_mask"], new[name]
        # Flash attention takes gaps in the positions for packed sequences. Not needed any more: the
        # rotary tables are gathered, the mask is made.
        new["position_ids"] = None
        return _with(hidden, args, new)

    def _move(self, device: torch.device) -> None:
        """The layers from here on run on another device: take along what is known of the tokens."""
        for name in _KNOWN:
            setattr(self, name, moved(getattr(self, name), device))
        self._once.clear()
        self._at = device

    def _arrived(self, name: str, value: Any) -> Any:
        """What the model gives all layers, on the device of this one."""
        return self._remember(f"arrived_{name}", (value,), lambda: moved(value, self._at))

    def _beside(self, args: tuple, hidden: Tensor) -> tuple:
        """Positional arguments of a layer, with what Gemma 4 has beside the hidden states [B, q, D]
        for the rows that are left.
        """
        beside = args[1] if len(args) > 1 else None
        if beside is None or self.rows is None:
            return args
        if isinstance(self.rows, PackedRows):
            return (args[0], beside.flatten(0, 1)[self.rows.slots][None], *args[2:])
        if hidden.shape[1] != len(self.rows):
            return args
        each = torch.arange(self.batch, device=beside.device)[:, None]
        return (args[0], beside[each, self.rows.index], *args[2:])

    def _running(
        self, args: tuple, hidden: Tensor, new: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """New arguments for a layer whose state runs over the tokens: what is dropped is not there.

        Places without a token are zeroed by its 2D mask, as padding is. In front they leave a state
        of zeros alone, and no other: `pads_states`. Packed sequences have none: `linear.py`.
        """
        if self.rows is None:
            return None
        if isinstance(self.rows, PackedRows):
            new["attention_mask"] = self.rows
            return _with(hidden, args, new)
        left = self._remember("queries", (0,), lambda: self._queries(0, hidden.device))
        new["attention_mask"] = None if left.full else left.valid
        return _with(hidden, args, new)

    def _like(
        self,
        told: tuple[Tensor | None, tuple[Tensor, Tensor]],
        name: str,
        args: tuple,
        hidden: Tensor,
        new: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any]]:
        """New arguments for a layer that reads the keys of an earlier one: the columns are that
        one's, and it may be asked for the last tokens only.
        """
        rows, (mask, (cos, sin)) = hidden.shape[1], told
        new["position_ids"] = None
        if isinstance(mask, dict):
            new["attention_mask"] = None
            new.update(mask if self.rows is None else few_each(mask, self.rows))
            new[name] = (cos, sin) if self.rows is None else self._taken(new[name])
            return _with(hidden, args, new)
        new["attention_mask"] = None if mask is None else mask[..., -rows:, :]
        new[name] = cos[..., -rows:, :], sin[..., -rows:, :]
        return _with(hidden, args, new)

    def _packed(
        self, index: int, cache: Any, hidden: Tensor, name: str, args: tuple, new: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """New arguments for a layer without padding."""
        kind, _, by_mask = self.layers[index]
        store = packed_layer(
            cache, index, self.mask, self.length, self.batch, hidden.device, by_mask
        )
        if store is not None and index == 0:
            store.placed = self.placed
        past = 0 if store is None else store.get_seq_length()
        given = new["attention_mask"] if by_mask else None
        new["attention_mask"] = new["position_ids"] = None
        if self.rows is None:  # a new token for each sequence
            store.announce(1, past + 1)
            places = store.lengths[:, None]
            told = self._one_each(store, given if kind == SLIDING else None)
        else:
            if store is not None:
                store.announce(self.rows, past + self.length)
                places = (self.rows.places + store.lengths[self.rows.sequence])[None]
            else:
                places = self.rows.places[None]
            told = self._many_each(store, given, past)
        new.update(told)
        if self.plan.positions == "renumber":
            new[name] = self._placed = self._rotary(hidden, places)
        elif self.rows is not None:
            new[name] = self._taken(new[name])
        self._told[kind] = told, new[name]
        return _with(hidden, args, new)

    def _one_each(self, store: PackedLayer, mask: Tensor | None) -> dict[str, Any]:
        """What attention is told of a new token for each sequence; mask: of its window."""
        if mask is None:
            attention = self.decoder.config._attn_implementation
            return one_each(store.lengths, store.longest, attention)
        past, one = store.seen - 1, torch.ones_like(store.lengths)[:, None]
        queries, keys = Columns(one * past, one.bool(), True), store.shown()
        return {
            "attention_mask": layer_mask(
                mask,
                queries,
                keys,
                start=past,
                length=store.seen,
                past=store.longest,
                capacity=None,
                flash=False,
                dtype=mask.dtype,
                eager=False,
            )
        }

    def _many_each(self, store: PackedLayer | None, mask: Tensor | None, past: int) -> dict:
        """What attention is told of the rows; mask: of a layer that does not see all before."""
        held = [0] * self.batch if store is None else store.host_counts()
        if mask is None:
            attention = self.decoder.config._attn_implementation
            return self._remember(
                "lengths", (self.rows, *held), lambda: many_each(self.rows, held, attention)
            )

        def make() -> dict:
            own = (self.rows.slots % self.length).split(self.rows.counts)
            before = [own[0][:0]] * self.batch
            if any(held):
                before = [row[:n] for row, n in zip(store.positions, held, strict=True)]
            return {"hico_masks": each_mask(mask, own, before, past, past + self.length)}

        # What layers hold of a sequence may be as long and yet not the same.
        return make() if any(held) else self._remember("masks", (self.rows, mask), make)

    def _left(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        embeddings: tuple[Tensor, Tensor],
        packed: bool,
    ) -> Tensor:
        """The rows that the layer sees.

        Decided once: gradient checkpointing runs the layers again, the last one first.
        """
        tables = None
        if index not in self._steps:
            whole = self.length if self.rows is None else len(self.rows)
            self.last.append(hidden.shape[1] if hidden.shape[1] < whole else None)
            source, drops = None, index in self._rules and self.prompt is not None
            merges = index == 0 and self.merged is not None
            if drops or merges:
                tables = self._flat_tables(embeddings)
            packs = drops or merges or packed or self.at_once
            if self.packing is not None and self.rows is None and packs:
                source = self._pack(hidden.device)
            if merges:
                source = _through(source, self._keep_merged())
            if drops:
                with torch.no_grad():  # what is chosen has no gradient
                    left = self._drop(index, layer, hidden, source, embeddings)
                source = _through(source, left)
            width = self.length if self.rows is None else len(self.rows)
            packed = isinstance(self.rows, PackedRows)
            seen = self.rows.counts if packed else [width] * self.batch
            if packed and self.layers[index].reads_keys and 0 < self.few <= min(seen):
                seen, self.last[-1] = self.held[-1], self.few  # as in the layers with keys
                self.rows, source = self.rows.last(self.few)
            self.held.append(seen)
            self._steps[index] = (self.rows, source)
        rows, source = self._steps[index]
        if rows is not self.rows:
            self.rows = rows
            self._once.clear()
        if source is None:
            return hidden
        with self.clock.time("compacting", hidden.device):
            if tables is None:
                return self._filled(hidden, source)
            batch = 1 if isinstance(self.rows, PackedRows) else self.batch
            taken = gather_tokens(hidden.flatten(0, 1), source, *tables)
            hidden, *tables = (x.unflatten(0, (batch, -1)) for x in taken)
            self._once["tables"] = [((embeddings[0],), tuple(tables))]
            return hidden

    def _flat_tables(self, given: tuple[Tensor, Tensor]) -> list[Tensor] | None:
        """Rotary tables [rows, D] of the rows as they are, which a drop takes along with the hidden
        states; None where they are not at hand, and `_taken` takes them from all of the call's.
        """
        if self.plan.positions == "renumber":
            return None
        batch, length = self.batch, self.length
        if self.rows is not None:
            known = self._once.get("tables", ())
            given = next((own for (key,), own in known if key is given[0]), None)
            packed = isinstance(self.rows, PackedRows)
            batch, length = (1, len(self.rows.slots)) if packed else (batch, len(self.rows))
        if given is None or given[0].dim() != 3 or given[0].shape[:2] != (batch, length):
            return None
        return [table.flatten(0, 1) for table in given]

    def _filled(self, hidden: Tensor, source: Tensor | None) -> Tensor:
        """The rows as they are now, from the flat rows `source` of `hidden`; None: hidden."""
        if source is None:
            return hidden
        batch = 1 if isinstance(self.rows, PackedRows) else self.batch
        return gather_tokens(hidden.flatten(0, 1), source).unflatten(0, (batch, -1))

    def _keep_merged(self) -> Tensor:
        """Leave out the places that merging emptied; the flat row of each that stays."""
        rows = self.rows if self.rows is not None else Rows.whole(self.prompt)
        chosen, left = self.merged, self.left
        if isinstance(rows, PackedRows):
            chosen = torch.searchsorted(rows.slots, chosen)
        self.rows, source = rows.after(self.prompt, chosen, left)
        self._once.clear()
        self.kept[0] = self.rows
        return source

    def _pack(self, device: torch.device) -> Tensor:
        """Leave the padding out; the flat rows of the tokens."""
        if self.prompt is not None:
            visual, real = self.prompt.num_visual, self.prompt.real
            real = None if real is None else real | self.prompt.visual
        else:
            visual, real = [0] * self.batch, self.real
        if real is None:
            real = torch.ones(self.batch, self.length, dtype=torch.bool, device=device)
        self.rows = PackedRows.whole(real, self.packing, visual)
        self._once.clear()
        return self.rows.slots

    def _drop(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        source: Tensor | None,
        embeddings: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """Choose what stays of `_filled(hidden, source)`: the flat row that each place is filled
        from; None: everything.
        """
        rows = self.rows if self.rows is not None else Rows.whole(self.prompt)
        keep = [counts[index] for counts in self.counts]
        if keep == rows.visual:
            return None
        slots = rows.visual_slots(self.prompt)
        if isinstance(self._rules[index], Uniform):
            chosen = evenly(slots, rows.visual, keep)
        else:
            with self.clock.time("scoring", hidden.device):
                heard = self._filled(hidden, source)
                chosen = self._best(layer, heard, embeddings, rows, slots, keep)
            packed = isinstance(rows, PackedRows)
            self.scored[index] = rows.counts if packed else [len(rows)] * self.batch
        with self.clock.time("compacting", hidden.device):
            self.rows, source = rows.after(self.prompt, chosen, keep)
        self._once.clear()
        self.kept[index] = self.rows
        return source

    def _best(
        self,
        layer: nn.Module,
        hidden: Tensor,
        embeddings: tuple[Tensor, Tensor],
        rows: Rows,
        slots: Tensor,
        keep: list[int],
    ) -> Tensor:
        if self.rows is not None:  # as in the layer before
            placed = self._placed if self.plan.positions == "renumber" else None
            embeddings = self._taken(embeddings) if placed is None else placed
        heard, lengths, asking = rows.heard_slots(self.prompt)
        scores = text_scores(layer, hidden, embeddings, asking, heard, lengths, self.probe)
        return best(slots, scores[torch.searchsorted(heard, slots)], rows.visual, keep)

    def _extend(self, store: Any, past: int, device: torch.device) -> tuple[Columns, Columns]:
        """The columns that the layer attends to, and those of them that are this call's."""
        queries = self._remember("queries", (past,), lambda: self._queries(past, device))
        if store is None:
            return queries, queries
        old = store.columns
        if old is None:
            held = store.stored()
            old = self._remember("old", (past, held), lambda: self._before(past, held, device))
        store.extend(old, queries, past + self.length)
        return store.columns, queries

    def _queries(self, past: int, device: torch.device) -> Columns:
        if self.rows is not None:
            index, valid, full = self.rows.index, self.rows.valid, self.rows.full
            if self.prompt.real is not None:
                valid = valid & (self.prompt.real | self.prompt.visual).gather(1, index)
            return Columns(index + past, valid, full and not self.prompt.padded)
        positions = torch.arange(past, past + self.length, device=device).expand(self.batch, -1)
        real = None
        if self.length > 1:
            real = real_tokens(self.mask, past, past + self.length, past + self.length)
        valid = torch.ones_like(positions, dtype=torch.bool) if real is None else real
        return Columns(positions, valid, real is None)

    def _before(self, past: int, held: int, device: torch.device) -> Columns:
        """The columns of a layer that has dropped nothing so far: its last `held` tokens."""
        positions = torch.arange(past - held, past, device=device).expand(self.batch, -1)
        real = real_tokens(self.mask, past - held, past, past + self.length)
        valid = torch.ones_like(positions, dtype=torch.bool) if real is None else real
        return Columns(positions, valid, real is None)

    def _mask(
        self,
        mask: Tensor | None,
        queries: Columns,
        keys: Columns,
        past: int,
        store: Any,
        hidden: Tensor,
    ) -> Tensor | None:
        def make() -> Tensor | None:
            attention = self.decoder.config._attn_implementation
            return layer_mask(
                mask,
                queries,
                keys,
                start=past,
                length=past + self.length,
                past=len(keys) - len(queries),
                capacity=getattr(store, "max_cache_len", None),
                flash="flash" in attention,
                dtype=hidden.dtype,
                eager=attention == "eager",
            )

        return self._remember("mask", (mask, queries, keys), make)

    def _tables(self, tables: tuple[Tensor, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of all tokens of the call: the model's own, or without merging's gaps."""
        if self.places is None:
            return tables
        anew = self._anew
        if anew is None:
            anew = self._rotary(hidden, self.places)
        if not self.over:  # kept through drops: what these leave is found by it
            self._anew = anew
        return anew

    def _embeddings(
        self, tables: tuple[Tensor, Tensor], columns: Columns, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotary tables of the tokens that are left: their own, or those of 0..len-1 anew."""
        if self.plan.positions == "renumber":
            self._placed = self._remember(
                "renumbered", (columns,), lambda: self._renumbered(columns, hidden)
            )
            return self._placed
        return tables if self.rows is None else self._taken(tables)

    def _renumbered(self, columns: Columns, hidden: Tensor) -> tuple[Tensor, Tensor]:
        places = (columns.valid.cumsum(1) - 1).clamp(min=0)
        return self._rotary(hidden, places[:, -hidden.shape[1] :])

    def _rotary(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return moved(self.decoder.rotary_emb(hidden, places), hidden.device)

    def _taken(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        take, given = self.rows.table, tables[0].shape[-2]
        if given != self.length:
            raise ValueError(
                f"position_ids must be of this call's {self.length} tokens, got {given}"
            )
        return self._remember("tables", (tables[0],), lambda: (take(tables[0]), take(tables[1])))

    def _remember(self, name: str, given: tuple, make: Callable[[], Any]) -> Any:
        """`make()` once for the same ints and objects `given`, until the next drop.

        They are no keys of a dict: torch.compile would make a graph for every length of a sequence.
        """
        if self.over:  # what is made again in the backward pass is needed once
            return make()
        known = self._once.setdefault(name, [])
        for objects, value in known:
            if all(map(_same, objects, given)):
                return value
        known.append((given, make()))
        return known[-1][1]


def _through(first: Tensor | None, then: Tensor | None) -> Tensor | None:
    """Rows taken out of rows that were taken; None: all of them."""
    if first is None or then is None:
        return then if first is None else first
    return first[then]


def _same(a: object, b: object) -> bool:
    return a == b if isinstance(a, int) else a is b


def rotary_name(layer: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The argument with the rotary tables of the layer. Gemma 3 in 4.57 has two, for its windows
    and for its other layers.
    """
    if "position_embeddings" in kwargs:
        return "position_embeddings"
    return "position_embeddings_" + ("local" if layer.self_attn.is_sliding else "global")


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether the layer runs again in the backward pass. It is given no cache then."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def _with(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
