"""Dropping visual tokens inside someone else's model, by hooks on this one instance."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from hico_kernels.patch.call import Call, is_checkpointed, rotary_name
from hico_kernels.patch.chunks import refuse_chunks
from hico_kernels.patch.clock import Clock
from hico_kernels.patch.columns import check_cache
from hico_kernels.patch.deepstack import with_deepstack
from hico_kernels.patch.devices import moved
from hico_kernels.patch.families import (
    LINEAR,
    PACKED,
    Parts,
    UnsupportedModel,
    describe,
    has_own_plan,
    layer_kinds,
    take_apart,
    why_not_attention,
    why_not_drop,
    why_not_packed,
    why_not_renumber,
)
from hico_kernels.patch.frames import frames
from hico_kernels.patch.linear import with_states_apart
from hico_kernels.patch.loss import why_not_labels, with_loss
from hico_kernels.patch.masks import real_tokens
from hico_kernels.patch.packed import PackedRows
from hico_kernels.patch.packed_cache import has_packed
from hico_kernels.patch.places import places
from hico_kernels.patch.plan import DropPlan, Uniform
from hico_kernels.patch.prellm import PreLLM, check_merging
from hico_kernels.patch.premerge import find_clips, merge_clips, place, placed_so_far
from hico_kernels.patch.report import Report
from hico_kernels.patch.rows import Prompt
from hico_kernels.patch.scores import probe_config

Layout = Literal["padded", "packed"]


def patch(model: nn.Module, plan: DropPlan | PreLLM, rows: Layout = "padded") -> "Handle":
    """Let `model` drop or merge visual tokens by `plan` from now on, until `Handle.remove`.

    model: a transformers video model (`supports` says which). rows: how the sequences of a batch,
    which a drop leaves with different lengths, go on: "padded" to the longest, or "packed" one
    behind the other, with cache layers in which each has its own length (a `DynamicCache` or a
    `StaticCache`; sdpa, which `ragged_attention` then stands in for, or flash attention). Raises
    `UnsupportedModel` with the reason for any other, and for one that is patched already;
    `ValueError` for a plan that does not fit. Nothing but this instance is touched, no copy of its
    weights is made. `PreLLM` alone is a plan that merges and drops nothing.
    """
    if rows not in get_args(Layout):
        raise ValueError(f"rows must be 'padded' or 'packed', got {rows!r}")
    if has_own_plan(model) and not isinstance(plan, PreLLM):
        return model.hico_patch(plan)  # its sequences are always packed
    return Handle(model, take_apart(model), plan, rows)


@contextmanager
def compress(
    model: nn.Module, plan: DropPlan | PreLLM, rows: Layout = "padded"
) -> Iterator["Handle"]:
    """`patch` for the time of a with block."""
    handle = patch(model, plan, rows)
    try:
        yield handle
    finally:
        handle.remove()


class Handle:
    """A patched model. Made by `patch`."""

    def __init__(
        self, model: nn.Module, parts: Parts, plan: DropPlan | PreLLM, rows: Layout = "padded"
    ) -> None:
        hooks = parts.decoder._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in hooks):
            raise UnsupportedModel(
                f"model: this {type(model).__name__} is patched already; "
                "remove() the other patch, or set_plan() on its handle"
            )
        self.model, self.parts, self.rows = model, parts, rows
        self._check(plan)
        self._check_rows()
        # Gemma 4's decoder may give the states of the last tokens only.
        self._counts_logits = (
            "logits_to_keep" in inspect.signature(parts.decoder.forward).parameters
        )
        self._local = threading.local()  # calls of two threads do not mix
        self._last: Call | None = None  # the last call with visual tokens, for the report
        self._swapped = rows == "packed" and parts.decoder.config._attn_implementation == "sdpa"
        if self._swapped:
            parts.decoder.config._attn_implementation = PACKED
        self._probe = probe_config(parts.decoder.config)
        self._layers = describe(parts.decoder)
        self._hooks = self._hook()
        self._undo = [
            with_deepstack(parts.decoder, lambda: self._call),
            refuse_chunks(model, parts.family.visual, self._drops),
        ]
        if rows == "packed":
            self._undo.append(with_states_apart(parts.decoder))
        self._undo_loss: Callable[[], None] | None = None
        self._saved = getattr(model.config, "hico", None)
        self._set(plan)

    def set_plan(self, plan: DropPlan | PreLLM) -> None:
        """Drop by another plan from the next call on. Caches filled so far stay usable.

        Raises `RuntimeError` when the patch is removed.
        """
        if not self._hooks:
            raise RuntimeError("set_plan: this patch is removed; patch() the model again")
        self._check(plan)
        self._set(plan)

    def report(self) -> Report:
        """What the last prompt with visual tokens cost; print it, or take `.as_dict()`."""
        return Report.of(self.parts.decoder, self._last)

    def remove(self) -> None:
        """Take every hook off again: the model is as it was, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for undo in self._undo:
            undo()
        self._hooks, self._undo = [], []
        if self._undo_loss is not None:
            self._undo_loss()
            self._undo_loss = None
        if self._swapped and self.parts.decoder.config._attn_implementation == PACKED:
            self.parts.decoder.config._attn_implementation = "sdpa"
        self._swapped = False
        if getattr(self.model.config, "hico", None) is not self._saved:
            if self._saved is None:
                del self.model.config.hico
            else:
                self.model.config.hico = self._saved

    def __deepcopy__(self, memo: dict) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"a model patched by hico_kernels cannot be {what}: remove() first and patch the copy; "
            "the plan is in model.config.hico (DropPlan.from_json)"
        )

    def announce(self, visual: Tensor, frames: list[int] | None = None) -> None:
        """Say which tokens are visual, [B, q] bool, before calling the language model itself.

        Only for code that makes `inputs_embeds` of its own; the model's own forward finds them.
        frames: of each sequence, equal ones, where the plan counts by them or merges.
        """
        self._local.announced = visual, frames

    @property
    def kept(self) -> dict[int, list[Tensor]]:
        """The last prompt's tokens that each drop left: layer -> ascending positions per row."""
        last = self._last
        left = {} if last is None else moved(last.kept, last.home)
        return {
            layer: [own[ok] for own, ok in zip(rows.index, rows.valid, strict=True)]
            for layer, rows in left.items()
        }

    @property
    def _call(self) -> Call | None:
        return getattr(self._local, "call", None)

    def _check(self, plan: DropPlan | PreLLM) -> None:
        if not isinstance(plan, DropPlan | PreLLM):
            raise TypeError(f"plan must be a DropPlan or a PreLLM, got {type(plan).__name__}")
        plan = as_drops(plan)
        if plan.pre_llm is not None:
            check_merging(self.parts, plan.pre_llm)
        plan.check_layers(len(self.parts.decoder.layers))
        reason = why_not_renumber(self.parts)
        if plan.positions == "renumber" and reason is not None:
            raise ValueError(f"plan: positions must be 'keep', got 'renumber': {reason}")
        spread = (getattr(self.model, "_tp_size", None) or 1) > 1
        for layer, rule in plan.drops.items():
            if spread and not isinstance(rule, Uniform):
                raise UnsupportedModel(
                    f"model: drops[{layer}]: under tensor parallelism each process has some of the "
                    f"heads, and {type(rule).__name__} would choose by these alone; use Uniform"
                )
            reason = why_not_drop(self.parts.decoder, layer, not isinstance(rule, Uniform))
            if reason is not None:
                raise ValueError(f"drops[{layer}]: {type(rule).__name__} cannot be here: {reason}")

    def _check_rows(self) -> None:
        reason = why_not_packed(self.parts) if self.rows == "packed" else None
        if reason is not None:
            raise UnsupportedModel(f"model: rows must be 'padded', got 'packed': {reason}")

    def _set(self, plan: DropPlan | PreLLM) -> None:
        self.plan = as_drops(plan)
        self.model.config.hico = plan.to_json()

    def _drops(self) -> bool:
        return bool(self.plan.drops) or self.plan.pre_llm is not None

    def _hook(self) -> list[torch.utils.hooks.RemovableHandle]:
        inner, decoder = self.parts.inner, self.parts.decoder
        hooks = [
            inner.register_forward_pre_hook(self._before_inner, with_kwargs=True),
            inner.register_forward_hook(self._after_inner, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        if self.model is not inner:
            hooks.append(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        for index, layer in enumerate(decoder.layers):
            before = _BeforeLayer(self, index)
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        return hooks

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        self._local.labels, self._local.answers = given.get("labels"), given.get("logits_to_keep")

    def _before_inner(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        visual = places(self.parts, given)
        by_frame = visual is not None and self.plan.per_frame
        frames_of = frames(self.parts, given, visual) if by_frame else None
        self._local.call = call = self._begin(given, visual, frames_of)
        if self.plan.pre_llm is not None and call.prompt is not None:
            self._find_clips(call, given)

    def _after_inner(self, module: nn.Module, args: tuple, output: Any) -> None:
        local = self._local
        local.call = local.labels = local.answers = None

    def _before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        local, given = self._local, _named(module, args, kwargs)
        if getattr(local, "call", None) is None:  # not called by the model around it
            announced, local.announced = getattr(local, "announced", None), None
            local.call = self._begin(given, *announced or (None, None))
            if self.plan.pre_llm is not None and local.call.prompt is not None:
                self._find_clips(local.call, given, told=False)
        call, cache = local.call, given.get("past_key_values")
        new = merge_clips(call, given)
        start = placed_so_far(cache)
        if (call.merged is not None or start is not None) and not self.parts.family.multi_axis:
            past = self._past(cache, call.length, call.mask)
            place(call, start, past, given.get("position_ids"))
        call.rest(cache)
        watched = call.prompt is not None and not call.idle  # watching takes time, too
        if watched and not torch.compiler.is_compiling():
            kinds = ("self_attn", "linear_attn")
            attention = [getattr(x, n) for x in module.layers for n in kinds if hasattr(x, n)]
            local.unwatch = call.clock.watch(attention, "attention", call.prompt.visual.device)
        wanted = given.get("logits_to_keep", 0) if self._counts_logits else 0
        local.wanted = wanted if isinstance(wanted, int) else 0
        # Layers that read keys would run for the last tokens that came in, dropped or not; where
        # sequences are packed, for those of the last one.
        behind = call.length if call.prompt is None else call.prompt.num_behind
        if local.wanted and (call.packing is not None or local.wanted > behind):
            new = {**(given if new is None else new), "logits_to_keep": 0}
            call.few = 0 if _recorded(module, given) else local.wanted
        return None if new is None else ((), new)

    def _begin(
        self, given: dict[str, Any], visual: Tensor | None, frames_of: list[int] | None
    ) -> Call:
        """What this call drops, from the arguments of the model or of its decoder."""
        local, cache = self._local, given.get("past_key_values")
        entering = given.get("inputs_embeds")
        entering = given.get("input_ids") if entering is None else entering
        batch, length = entering.shape[:2]
        mask = given.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        prompt = None
        if visual is not None:
            visual = visual.to(entering.device)
            past = self._past(cache, length, mask)
            real = real_tokens(mask, past, past + length, past + length)
            answers, labels = getattr(local, "answers", None), getattr(local, "labels", None)
            answers = answers if isinstance(answers, int) else 1
            prompt = Prompt.count(visual, real, answers, labels)
        call = Call(
            self.plan,
            self.parts.decoder,
            self._layers,
            batch,
            length,
            mask,
            prompt,
            entering.device,
            Clock(),
            self._probe,
            frames=frames_of,
        )
        if self.plan.pre_llm is None or prompt is None:  # else merging comes first
            self._check_drops(call, cache)
        if prompt is not None:
            self._last = call
        return call

    def _find_clips(self, call: Call, given: dict[str, Any], told: bool = True) -> None:
        """Outside of the decoder where the model around it was called and so told which tokens are
        of videos: inside, torch.compile could not wait for the device.
        """
        visual, frames = call.prompt.visual, None if told else call.frames
        found = find_clips(self.parts, self.plan.pre_llm, visual, given if told else {}, frames)
        call.merge(*found)
        self._check_drops(call, given.get("past_key_values"))

    def _check_drops(self, call: Call, cache: Any) -> None:
        if call.drops:
            self._check_call(cache)
        if self.rows == "packed":
            self._pack(call, cache)
        padded = call.drops and call.packing is None and call.pads_states
        if padded and self._past(cache, call.length, None):
            raise ValueError(
                "past_key_values: a state of linear attention cannot go on with padding in "
                "front, which a drop leaves where sequences keep different numbers of tokens; "
                "give one sequence at a time, without padding, or patch with rows='packed'"
            )

    @staticmethod
    def _past(cache: Any, length: int, mask: Tensor | None) -> int:
        if mask is not None and mask.dim() == 2:
            return mask.shape[-1] - length
        return 0 if cache is None else int(cache.get_seq_length())

    def _check_call(self, cache: Any) -> None:
        """What cannot be right once tokens are missing."""
        reason = why_not_attention(self.parts.decoder)
        if reason is not None:
            raise UnsupportedModel(f"model: {reason}")
        self._check_rows()
        if torch.is_tensor(getattr(self._local, "answers", None)):
            raise ValueError("logits_to_keep must be an int when tokens are dropped, got a tensor")
        if getattr(self._local, "labels", None) is not None:
            self._follow_labels()
        if cache is not None:
            check_cache(cache)

    def _pack(self, call: Call, cache: Any) -> None:
        """Let the call run without padding, where it drops or goes on with one that did."""
        went = cache is not None and any(has_packed(cache, i) for i in range(len(cache.layers)))
        if not ((went and call.length > 1) or (call.drops and call.batch > 1)):
            return
        past = self._past(cache, call.length, None)
        # A state that there is does not go on with padding in front.
        call.at_once = past > 0 and LINEAR in layer_kinds(self.parts.decoder)
        if call.prompt is not None:
            call.packing = call.prompt.num_real
            return
        end = past + call.length
        call.real = real_tokens(call.mask, past, end, end)
        real = call.real
        call.packing = [call.length] * call.batch if real is None else real.sum(1).tolist()

    def _follow_labels(self) -> None:
        if self._undo_loss is None:
            reason = why_not_labels(self.model)
            if reason is not None:
                raise ValueError(f"labels: {reason}")
            self._undo_loss = with_loss(self.model, lambda: self._local.left)

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        local = self._local
        call, local.call = local.call, None
        unwatch = getattr(local, "unwatch", None)
        if unwatch is not None:
            unwatch()
            local.unwatch = None
        if call is None:
            return None
        self._local.left = call.rows
        call.finish()
        if output is None or call.rows is None:  # None: the decoder raised
            return None
        packed, wanted = isinstance(call.rows, PackedRows), local.wanted
        if not (packed or wanted):
            return None
        rows = moved(call.rows, output[0].device)
        states = rows.padded(output[0][0]) if packed else output[0]
        # The model around it takes the last ones of as many states as it has tokens, not of fewer.
        states = states[:, -wanted:]
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output


class _BeforeLayer:
    """The hook of one layer."""

    def __init__(self, handle: Handle, index: int) -> None:
        self.handle, self.index = handle, index
        self._local = handle._local

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        call = getattr(self._local, "call", None)
        if call is not None and call.idle:
            return None
        if is_checkpointed(layer):
            # Before 5.23 transformers runs hooks again in the backward pass, when the call is over,
            # with the same rotary tables.
            table = kwargs[rotary_name(layer, kwargs)][0]
            call = table.hico_call = getattr(table, "hico_call", call)
        return None if call is None else call.before_layer(self.index, layer, args, kwargs)


def as_drops(plan: DropPlan | PreLLM) -> DropPlan:
    """`PreLLM` alone as a plan that drops nothing."""
    return DropPlan({}, pre_llm=plan) if isinstance(plan, PreLLM) else plan


def _recorded(decoder: nn.Module, given: dict[str, Any]) -> bool:
    """Whether what every layer makes is asked for, of all tokens."""
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(given.get(name) or getattr(decoder.config, name, False) for name in names)


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
