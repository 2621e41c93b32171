"""Is dropping exact on this machine, with this model, this transformers and these weights?"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hico_kernels.merge.reference import merge_tokens_round_by_round
from hico_kernels.patch.families import LINEAR, Parts, layer_kinds, scoring_layers, take_apart
from hico_kernels.patch.handle import Layout, as_drops, compress
from hico_kernels.patch.masked import masked
from hico_kernels.patch.plan import DropPlan, TextTopK, Uniform
from hico_kernels.patch.prellm import PreLLM, layout_of

VISUAL = slice(6, 38)  # of a prompt of LENGTH tokens, in two sequences, one of them padded
FRAMES = 4  # that the visual tokens are said to come from
LENGTH, STEPS = 48, 3
_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3}


def selfcheck(
    model: nn.Module, plan: DropPlan | PreLLM | None = None, rows: Layout = "padded"
) -> dict[str, float]:
    """Run a tiny prompt and some decoding through `model`, dropping tokens, and through the same
    model with a mask in place of dropping, without a cache; raise `RuntimeError` when they differ.

    model: not patched, any dtype and device; plan: by default a uniform drop and a text-guided one;
    where it merges, the model with a mask is given tokens merged round by round in plain torch;
    rows: as in `patch`.
    The prompt is made of random text embeddings, so the vision tower does not run. Returns the
    largest relative difference of a last hidden state ("error"), what was allowed ("allowed"), and
    how far it is from not dropping at all ("effect"). In half precision "allowed" is a half of
    "effect": only gross mistakes show; check in float32 where you can.
    """
    parts = take_apart(model)
    if plan is None:
        plan = _plan(parts.decoder)
    plan = as_drops(plan)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _compare(model, parts, plan, rows)
    finally:
        model.train(was_training)


def _plan(decoder: nn.Module) -> DropPlan:
    layers = len(decoder.layers)
    second = min(scoring_layers(decoder), key=lambda layer: abs(layer - 2 * layers // 3))
    return DropPlan({min(layers // 3, second // 2): Uniform(0.75), second: TextTopK(0.25)})


def _compare(model: nn.Module, parts: Parts, plan: DropPlan, rows: Layout) -> dict[str, float]:
    decoder = parts.decoder
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (2, LENGTH + STEPS), generator=generator)
    ids = ids.to(decoder.device)
    embeds = decoder.get_input_embeddings()(ids)
    mask = torch.ones(2, LENGTH + STEPS, dtype=torch.long, device=embeds.device)
    mask[1, :4] = 0
    visual = torch.zeros(2, LENGTH, dtype=torch.bool, device=embeds.device)
    visual[:, VISUAL] = True
    beside = None
    if getattr(decoder, "hidden_size_per_layer_input", 0):  # of Gemma 4, from ids
        beside = decoder.get_per_layer_inputs(ids, embeds)

    deepstack = hasattr(decoder, "_deepstack_process")

    def run(start: int, stop: int, **more: object) -> object:
        part = slice(start, stop)
        given = {"inputs_embeds": embeds[:, part], "attention_mask": mask[:, :stop]}
        if beside is not None:
            given["per_layer_inputs"] = beside[:, part]
        if start == 0 and deepstack:
            given |= _deepstack(embeds, visual, stop)
        return decoder(**given | more)

    with compress(model, plan, rows) as handle:
        handle.announce(visual, [FRAMES] * len(visual))
        got = _decode(run)
        kept = handle.kept
    attention = decoder.config._attn_implementation
    try:
        if "flash" in attention:  # takes no mask of single tokens
            decoder.config._attn_implementation = "sdpa"
        stock, length, merged = _whole(run), LENGTH, {}
        if plan.pre_llm is not None:
            extra = _deepstack(embeds, visual, LENGTH) if deepstack else {}
            merged, kept = _merged(parts, plan.pre_llm, embeds, mask, visual, extra, kept)
            length = merged["inputs_embeds"].shape[1] - STEPS
        with masked(decoder, kept, length, renumber=plan.positions == "renumber"):
            want = _whole(run, **merged)
    finally:
        decoder.config._attn_implementation = attention
    error, effect = _difference(got, want), _difference(stock, want)
    # The state of linear attention is in float32 whatever the dtype is.
    least = torch.float32 if LINEAR in layer_kinds(decoder) else torch.float64
    allowed = max(_ALLOWED[least], _ALLOWED.get(embeds.dtype, effect / 2))
    if not error <= allowed:
        raise RuntimeError(
            f"selfcheck: {type(model).__name__} with {plan} differs from the masked reference by "
            f"{error:.2e}, allowed are {allowed:.0e} (not dropping at all differs by {effect:.2e})"
        )
    return {"error": error, "allowed": allowed, "effect": effect}


def _decode(run: Callable) -> Tensor:
    """The last hidden state of the prompt and of each token after it, with a cache."""
    out = run(0, LENGTH, use_cache=True)
    states = [out.last_hidden_state[:, -1:]]
    for end in range(LENGTH + 1, LENGTH + STEPS + 1):
        out = run(end - 1, end, past_key_values=out.past_key_values, use_cache=True)
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


def _whole(run: Callable, **more: object) -> Tensor:
    out = run(0, LENGTH + STEPS, use_cache=False, **more)
    return out.last_hidden_state[:, -1 - STEPS :]


def _merged(
    parts: Parts,
    plan: PreLLM,
    embeds: Tensor,
    mask: Tensor,
    visual: Tensor,
    extra: dict[str, object],
    kept: dict[int, list[Tensor]],
) -> tuple[dict[str, object], dict[int, list[Tensor]]]:
    """What the language model is given when the clips of both sequences are merged one by one; and
    which of its tokens are `kept`.
    """
    clip = plan.per_frames // layout_of(parts).frames(parts.inner.config)
    features = extra.get("deepstack_visual_embeds", [])
    features = [each.view(len(embeds), -1, each.shape[-1]) for each in features]
    places, tokens, means = [], [], [[] for _ in features]
    for row, own in enumerate(embeds):
        at = visual[row].nonzero()[:, 0]
        groups = []  # the places that become one
        for part in at.view(FRAMES, -1).split(clip):
            part, target = part.flatten(), math.ceil(plan.merge_to * len(part) / clip)
            into = torch.arange(len(part), device=part.device)
            if target < len(part):
                into = merge_tokens_round_by_round(own[None, part], target, 1)[2][0]
            groups += [part[into == group] for group in range(min(target, len(part)))]
        groups.sort(key=lambda group: int(group[0]))
        first = torch.stack([group[0] for group in groups])
        stays = torch.ones(len(own), dtype=torch.bool, device=own.device)
        stays[at] = False
        stays[first] = True
        places.append(stays.nonzero()[:, 0])
        mean = torch.stack([own[group].mean(0) for group in groups])
        tokens.append(own.index_copy(0, first, mean)[stays])
        for found, each in zip(means, features, strict=True):
            found += [each[row][group - at[0]].mean(0) for group in groups]
    index = torch.stack(places)
    mask = mask.gather(1, index)
    given = {"inputs_embeds": torch.stack(tokens), "attention_mask": mask}
    numbered = (mask.cumsum(1) - 1).clamp(min=0)
    given["position_ids"] = index if parts.family.multi_axis else numbered
    if means:
        given["visual_pos_masks"] = nn.functional.pad(visual, (0, STEPS)).gather(1, index)
        given["deepstack_visual_embeds"] = [torch.stack(found) for found in means]
    pairs = {layer: zip(places, left, strict=True) for layer, left in kept.items()}
    return given, {n: [torch.isin(*pair).nonzero()[:, 0] for pair in p] for n, p in pairs.items()}


def _deepstack(embeds: Tensor, visual: Tensor, length: int) -> dict[str, object]:
    features = embeds[:, : visual.shape[1]][visual]
    places = nn.functional.pad(visual, (0, length - visual.shape[1]))
    return {"visual_pos_masks": places, "deepstack_visual_embeds": [features, -features]}


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference of a token's state, relative to its length."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
