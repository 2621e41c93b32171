"""Is dropping exact on this machine, with this model, this transformers and these weights?"""

import torch
from torch import Tensor, nn

from hico_kernels.patch.families import Parts, take_apart
from hico_kernels.patch.handle import Handle, Layout, compress
from hico_kernels.patch.masked import masked
from hico_kernels.patch.plan import DropPlan, TextTopK, Uniform

VISUAL = slice(6, 38)  # of a prompt of LENGTH tokens, in two sequences, one of them padded
FRAMES = 4  # that the visual tokens are said to come from
LENGTH, STEPS = 48, 3
_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3}


def selfcheck(
    model: nn.Module, plan: DropPlan | None = None, rows: Layout = "padded"
) -> dict[str, float]:
    """Run a tiny prompt and some decoding through `model`, dropping tokens, and through the same
    model with a mask in place of dropping, without a cache; raise `RuntimeError` when they differ.

    model: not patched, any dtype and device; plan: by default a uniform drop and a text-guided one;
    rows: as in `patch`.
    The prompt is made of random text embeddings, so the vision tower does not run. Returns the
    largest relative difference of a last hidden state ("error"), what was allowed ("allowed"), and
    how far it is from not dropping at all ("effect"). In half precision "allowed" is a half of
    "effect": only gross mistakes show; check in float32 where you can.
    """
    parts = take_apart(model)
    count = len(parts.decoder.layers)
    if plan is None:
        plan = DropPlan({count // 3: Uniform(0.75), 2 * count // 3: TextTopK(0.25)})
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _compare(model, parts, plan, rows)
    finally:
        model.train(was_training)


def _compare(model: nn.Module, parts: Parts, plan: DropPlan, rows: Layout) -> dict[str, float]:
    decoder = parts.decoder
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (2, LENGTH + STEPS), generator=generator)
    embeds = decoder.get_input_embeddings()(ids.to(decoder.device))
    mask = torch.ones(2, LENGTH + STEPS, dtype=torch.long, device=embeds.device)
    mask[1, :4] = 0
    visual = torch.zeros(2, LENGTH, dtype=torch.bool, device=embeds.device)
    visual[:, VISUAL] = True
    extra = _deepstack(decoder, embeds, visual)
    with compress(model, plan, rows) as handle:
        got = _decode(handle, embeds, mask, visual, extra)
        kept = handle.kept
    attention = decoder.config._attn_implementation
    try:
        if "flash" in attention:  # takes no mask of single tokens
            decoder.config._attn_implementation = "sdpa"
        stock = _whole(decoder, embeds, mask, visual, extra)
        with masked(decoder, kept, LENGTH, renumber=plan.positions == "renumber"):
            want = _whole(decoder, embeds, mask, visual, extra)
    finally:
        decoder.config._attn_implementation = attention
    error, effect = _difference(got, want), _difference(stock, want)
    allowed = _ALLOWED.get(embeds.dtype, effect / 2)
    if not error <= allowed:
        raise RuntimeError(
            f"selfcheck: {type(model).__name__} with {plan} differs from the masked reference by "
            f"{error:.2e}, allowed are {allowed:.0e} (not dropping at all differs by {effect:.2e})"
        )
    return {"error": error, "allowed": allowed, "effect": effect}


def _decode(
    handle: Handle, embeds: Tensor, mask: Tensor, visual: Tensor, extra: dict[str, object]
) -> Tensor:
    """The last hidden state of the prompt and of each token after it, with a cache."""
    decoder = handle.parts.decoder
    handle.announce(visual, [FRAMES] * len(visual))
    out = decoder(
        inputs_embeds=embeds[:, :LENGTH], attention_mask=mask[:, :LENGTH], use_cache=True, **extra
    )
    states = [out.last_hidden_state[:, -1:]]
    for end in range(LENGTH + 1, LENGTH + STEPS + 1):
        out = decoder(
            inputs_embeds=embeds[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


def _whole(
    decoder: nn.Module, embeds: Tensor, mask: Tensor, visual: Tensor, extra: dict[str, object]
) -> Tensor:
    if extra:
        extra = {**extra, "visual_pos_masks": nn.functional.pad(visual, (0, STEPS))}
    out = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **extra)
    return out.last_hidden_state[:, LENGTH - 1 :]


def _deepstack(decoder: nn.Module, embeds: Tensor, visual: Tensor) -> dict[str, object]:
    if not hasattr(decoder, "_deepstack_process"):
        return {}
    features = embeds[:, :LENGTH][visual]
    return {"visual_pos_masks": visual, "deepstack_visual_embeds": [features, -features]}


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference of a token's state, relative to its length."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
