"""`hico_kernels.patch` for this model, which drops by a plan of its own: the patch replaces it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from hico_kernels import DropPlan, TextTopK
from hico_kernels.flops import Decoder
from hico_kernels.patch.families import UnsupportedModel
from hico_kernels.patch.report import Report
from hico_model.llm import Prefill, Prompt
from hico_model.rows import Rows

if TYPE_CHECKING:
    from hico_model.model import VideoChatFlash


class _Seen(NamedTuple):
    """What one prefill did, without its cache."""

    plan: DropPlan
    whole: Rows  # before any drop
    held: list[tuple[int, ...]]  # rows of each layer and sequence
    kept: dict[int, list[Tensor]]


class Patched:
    """What `hico_kernels.patch` returns for a `VideoChatFlash`: the methods of its `Handle`.

    `answer` and the command line drop by `plan` then, unless they are given another. Whoever calls
    `model.llm.prefill` says a plan there, as ever; the report is on that one.
    """

    def __init__(self, model: "VideoChatFlash", plan: DropPlan) -> None:
        if "_patch" in model.__dict__:
            raise UnsupportedModel(
                f"model: this {type(model).__name__} is patched already; "
                "remove() the other patch, or set_plan() on its handle"
            )
        self.model, self._saved, self._last = model, model.config, None
        self._set(plan)
        self._stock, self._wrapped = model.llm.prefill, model.llm.__dict__.get("prefill")
        model.llm.prefill = self._prefill
        model._patch = self

    @property
    def plan(self) -> DropPlan:
        """The plan in force."""
        return self.model.config.plan

    def set_plan(self, plan: DropPlan) -> None:
        """Drop by another plan from the next call on.

        Raises `RuntimeError` when the patch is removed.
        """
        if not self._on:
            raise RuntimeError("set_plan: this patch is removed; patch() the model again")
        self._set(plan)

    @property
    def _on(self) -> bool:
        return self.model.__dict__.get("_patch") is self

    def _set(self, plan: DropPlan) -> None:
        if not isinstance(plan, DropPlan):
            raise TypeError(f"plan must be a DropPlan, got {type(plan).__name__}")
        if plan.per_frame:
            raise ValueError("plan: keep must be a ratio or a count for this model, got PerFrame")
        if plan.pre_llm is not None:
            raise ValueError(f"plan: pre_llm must be None, clips are merged, got {plan.pre_llm}")
        plan.check_layers(self.model.config.num_layers)
        self.model.config = replace(self.model.config, plan=plan)

    def remove(self) -> None:
        """Give the model its own plan back, and nothing else of its config."""
        if not self._on:
            return
        del self.model._patch
        if self.model.llm.__dict__.get("prefill") == self._prefill:  # else wrapped since
            del self.model.llm.prefill
            if self._wrapped is not None:
                self.model.llm.prefill = self._wrapped
        own = replace(self.model.config, plan=self._saved.plan)
        self.model.config = self._saved if own == self._saved else own

    @property
    def kept(self) -> dict[int, list[Tensor]]:
        """The last prompts' tokens that each drop left: layer -> ascending positions per row."""
        if self._last is None:
            return {}
        rows = self._last.whole
        return {
            layer: [_positions(rows, i, own) for i, own in enumerate(numbers)]
            for layer, numbers in self._last.kept.items()
        }

    def report(self) -> Report:
        """What the last prompts with visual tokens cost. It has no times: `Answer.trace` does."""
        if self._last is None:
            return Report([], [], 0, 0, 0, 0, 0, {})
        plan, whole, held, kept = self._last
        sizes, batch = self.model.config.decoder, range(len(whole.lengths))
        text = [n - v for n, v in zip(whole.lengths, whole.visual, strict=True)]
        stock = [whole.lengths] * len(held)
        flops = [sum(_flops(sizes, [rows[i] for rows in x]) for i in batch) for x in (held, stock)]
        scored = (layer for layer in kept if isinstance(plan.drops[layer], TextTopK))
        before = [whole.lengths, *held]  # a drop scores what comes out of the layer before
        flops[0] += sum(sizes.scoring_flops(n) for layer in scored for n in before[layer])
        each = self.model.dtype.itemsize
        kv = [sum(sizes.kv_bytes(rows, each) for rows in x) for x in (held, stock)]
        return Report(
            rows=[max(rows) for rows in held],
            visual=[[n - t for n, t in zip(rows, text, strict=True)] for rows in held],
            length=max(whole.lengths),
            kv_bytes=kv[0],
            kv_bytes_saved=kv[1] - kv[0],
            flops=flops[0],
            flops_saved=flops[1] - flops[0],
            milliseconds={},
        )

    def __deepcopy__(self, memo: dict) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"a model patched by hico_kernels cannot be {what}: remove() first and patch the copy; "
            "the plan is in model.config.plan"
        )

    def _prefill(self, prompts: Sequence[Prompt], plan: DropPlan, **options: object) -> Prefill:
        result = self._stock(prompts, plan, **options)
        if not self._on:  # under a wrapper that stayed
            return result
        visual = tuple(0 if p.visual is None else len(p.visual) for p in prompts)
        if any(visual):
            starts = tuple(len(p.before) for p in prompts)
            ends = (len(p.after) for p in prompts)
            lengths = tuple(map(sum, zip(starts, visual, ends, strict=True)))
            whole = Rows(lengths, starts, visual)
            self._last = _Seen(plan, whole, result.cache.prompt_lengths, result.kept)
        return result


def _positions(rows: Rows, i: int, numbers: Tensor) -> Tensor:
    """Places of all text and of the visual tokens `numbers` in sequence i."""
    start, device = rows.starts[i], numbers.device
    before = torch.arange(start, device=device)
    after = torch.arange(start + rows.visual[i], rows.lengths[i], device=device)
    return torch.cat([before, numbers + start, after])


def _flops(sizes: Decoder, rows: list[int]) -> int:
    parts = sizes.prefill_flops(rows)
    return parts["matrices"] + parts["attention"]
