"""Prompts -> new token ids: greedy or sampled, for a batch whose answers end at different times."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hico_kernels import DropPlan
from hico_model.errors import UserError
from hico_model.llm import LanguageModel, Prefill, Prompt, Watch


class Generated(NamedTuple):
    """New ids of each sequence, without the end token, and what reading the prompts gave."""

    tokens: list[list[int]]
    prefill: Prefill


@torch.no_grad()
def generate(
    llm: LanguageModel,
    prompts: Sequence[Prompt],
    plan: DropPlan,
    *,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    watch: Watch | None = None,
) -> Generated:
    """Continue every prompt until one of `eos_ids`, or by `max_new_tokens`.

    temperature: 0 takes the likeliest token. Above, tokens are drawn, with `seed`, from the
    likeliest ones which together have the probability `top_p`.  repetition_penalty: divides (a
    negative logit: multiplies) the logits of tokens in the answer so far. The checkpoints'
    generation_config has 1.05 or 1.1, which VideoChat-Flash applies to greedy answers too and, as
    here, not to the tokens of the prompt.  watch: as in `LanguageModel.prefill`.

    A prompt beyond the model's `max_positions` is run with a warning: nothing of it is cut off.
    Raises UserError for options out of range.
    """
    _check(max_new_tokens, temperature, top_p, repetition_penalty)
    _warn_if_long(llm, prompts, max_new_tokens)
    result = llm.prefill(prompts, plan, room=max_new_tokens, watch=watch)
    logits = result.logits
    draw = torch.Generator(logits.device).manual_seed(seed)
    said = torch.zeros_like(logits, dtype=torch.bool)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(answers)))
    for left in reversed(range(max_new_tokens)):
        logits = torch.where(said, _weaken(logits, repetition_penalty), logits)
        tokens = _choose(logits, temperature, top_p, draw)
        for i, token in enumerate(tokens.tolist()):
            if token in eos_ids:
                unfinished.discard(i)
            elif i in unfinished:
                answers[i].append(token)
        if not (left and unfinished):
            break
        said.scatter_(1, tokens[:, None], True)
        logits = llm.decode(tokens, result.cache)
    return Generated(answers, result)


def _choose(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> Tensor:
    """logits [B, V] -> tokens [B] int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    likely, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = likely.cumsum(dim=-1) - likely
    drawn = likely.masked_fill(before >= top_p, 0).multinomial(1, generator=draw)
    return order.gather(1, drawn)[:, 0]


def _weaken(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _check(max_new_tokens: int, temperature: float, top_p: float, penalty: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or above, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], got {top_p}")
    if not 0 < penalty < float("inf"):
        raise UserError(f"repetition_penalty must be above 0 (1 is none), got {penalty}")


def _warn_if_long(llm: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    lengths = (
        len(p.before) + (0 if p.visual is None else len(p.visual)) + len(p.after) for p in prompts
    )
    longest = max(lengths, default=0) + max_new_tokens
    if longest > llm.config.max_positions:
        warnings.warn(
            f"prompt and answer take {longest} positions, the model was made for "
            f"{llm.config.max_positions}: answers may suffer, use fewer frames",
            stacklevel=3,
        )
