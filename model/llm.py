"""The language model: Qwen2 over packed sequences, which drops visual tokens on the way down."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hico_kernels import DropPlan, TextTopK, Uniform, ragged_attention
from hico_model import qwen2
from hico_model.cache import Cache
from hico_model.config import Config
from hico_model.dropping import drop
from hico_model.rows import Rows, from_zero, to_device

Watch = Callable[[str, Tensor], None]  # gets the name and the result of every finished stage


class Prompt(NamedTuple):
    """One sequence."""

    before: Sequence[int]  # ids
    visual: Tensor | None  # [M, D]; None for text alone
    after: Sequence[int]  # ids, at least one


class Prefill(NamedTuple):
    """What reading the prompts gives.

    logits [B, V] are of the last row of each sequence. The dicts have, for each drop layer, a
    tensor per sequence: `kept`, the visual tokens that stay as ascending numbers among the prompt's
    own, and `scores` (text-guided drops only) of the visual tokens there were to choose from.
    """

    logits: Tensor
    cache: Cache
    kept: dict[int, list[Tensor]]
    scores: dict[int, list[Tensor]]


class LanguageModel(qwen2.Qwen2Weights):
    """`prefill` reads prompts, `decode` adds a token to each. The `Cache` is all state."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.config = config

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Prompt],
        plan: DropPlan,
        *,
        room: int = 0,
        watch: Watch | None = None,
    ) -> Prefill:
        """Run the prompts through all layers, with visual tokens dropped as `plan` says.

        room: how many new tokens the cache shall have place for.  watch: is told of every stretch
        of layers and every drop. Raises ValueError when the plan names a layer that the model lacks
        or merges clips, or a prompt does not end in text. Never waits for the device, apart from
        what reference implementations read: all lengths follow from those of the prompts.
        """
        plan.check_layers(self.config.num_layers)
        if plan.pre_llm is not None:
            raise ValueError(f"plan: pre_llm must be None, clips are merged, got {plan.pre_llm}")
        hidden, rows = self._pack(prompts)
        stretches = _stretches(plan, rows, self.config.num_layers)
        renumber = plan.positions == "renumber"
        seen = [after for layers, after in stretches for _ in layers]
        cache = Cache(seen, rows, room, renumber, hidden.device)
        positions = from_zero(rows, hidden.device)
        numbers = [torch.arange(n, device=hidden.device) for n in rows.visual]
        kept, scores = {}, {}
        for layers, after in stretches:
            first = layers.start
            if rule := plan.drops.get(first):
                layer = self.model.layers[first]
                left = drop(rule, layer, hidden, positions, rows, after.visual, self.config)
                hidden, rows = left.hidden, after
                positions = from_zero(rows, hidden.device) if renumber else left.positions
                numbers = [own[i] for own, i in zip(numbers, left.numbers, strict=True)]
                kept[first] = numbers
                if left.scores is not None:
                    scores[first] = left.scores
                if watch:
                    watch(drop_name(first, rule), hidden)
            hidden = self._stretch(layers, hidden, positions, rows, cache)
            if watch:
                watch(f"LLM layers {first}-{layers.stop - 1}", hidden)
        ends = to_device([end - 1 for end in rows.offsets[1:]], hidden.device)
        return Prefill(self._logits(hidden[ends]), cache, kept, scores)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Add a token to every sequence and to the cache: tokens [B] int64 -> logits [B, V]."""
        hidden = self.model.embed_tokens(tokens)
        cos, sin = qwen2.rope(cache.advance(), self.config, hidden.dtype)
        for i, layer in enumerate(self.model.layers):
            attend = partial(cache.attend, i)
            hidden = qwen2.run_layer(layer, hidden, cos[i], sin[i], self.config.head_dim, attend)
        return self._logits(hidden)

    def _pack(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Rows]:
        """Embeddings of all prompts one after the other, [S, D], and where everything lies."""
        if not prompts:
            raise ValueError("prompts must be at least one prompt, got none")
        width = self.config.hidden_size
        for i, prompt in enumerate(prompts):
            if not len(prompt.after):
                raise ValueError(f"prompt {i} must end in text: give ids after the visual tokens")
            if prompt.visual is not None and prompt.visual.shape[1:] != (width,):
                got = tuple(prompt.visual.shape)
                raise ValueError(f"visual tokens of prompt {i} must be [M, {width}], got {got}")
        embedding = self.model.embed_tokens
        ids = [i for prompt in prompts for i in (*prompt.before, *prompt.after)]
        text = embedding(to_device(ids, embedding.weight.device))
        pieces = text.split([len(ids) for p in prompts for ids in (p.before, p.after)])
        none = text[:0]
        visual = [none if p.visual is None else p.visual.to(text.dtype) for p in prompts]
        parts = [x for group in zip(pieces[::2], visual, pieces[1::2], strict=True) for x in group]
        rows = Rows(
            lengths=tuple(
                len(p.before) + len(v) + len(p.after) for p, v in zip(prompts, visual, strict=True)
            ),
            starts=tuple(len(p.before) for p in prompts),
            visual=tuple(len(v) for v in visual),
        )
        return torch.cat(parts), rows

    def _stretch(
        self, layers: range, hidden: Tensor, positions: Tensor, rows: Rows, cache: Cache
    ) -> Tensor:
        """Layers between two drops: hidden [S, D] -> [S, D]."""
        cos, sin = qwen2.rope(positions, self.config, hidden.dtype)
        ends, longest = to_device(rows.offsets, hidden.device), max(rows.lengths)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.put(k, v)
            return ragged_attention(q, k, v, ends, ends, longest, longest, causal=True)

        for i in layers:
            layer = self.model.layers[i]
            hidden = qwen2.run_layer(layer, hidden, cos, sin, self.config.head_dim, attend)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(qwen2.norm(self.model.norm, hidden))


def drop_name(layer: int, rule: Uniform | TextTopK) -> str:
    """How a drop is called in traces and reports."""
    return f"drop @{layer} {'uniform' if isinstance(rule, Uniform) else 'text'}"


def _stretches(plan: DropPlan, rows: Rows, num_layers: int) -> list[tuple[range, Rows]]:
    """The layers from one drop to the next, and what they see."""
    counts = [plan.counts(n) for n in rows.visual]
    starts = sorted({0, *plan.drops})
    out = []
    for first, stop in zip(starts, [*starts[1:], num_layers], strict=True):
        if first in plan.drops:
            rows = rows.keeping([own[first] for own in counts])
        out.append((range(first, stop), rows))
    return out
