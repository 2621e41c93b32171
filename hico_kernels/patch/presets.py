"""Plans from papers, for `hico_kernels.patch`. Layers count from 0, as in `DropPlan`.

Not every layer of every model lets the text choose: Qwen3.5 attends in every fourth only, and what
is dropped late in a Gemma 4 would stay in keys that its last layers share. Given the model, a plan
has the nearest layers that do; `patch` refuses one that has others.
"""

from collections.abc import Sequence

from torch import nn

from hico_kernels.patch.families import scoring_layers, take_apart
from hico_kernels.patch.plan import DropPlan, Positions, TextTopK, Uniform
from hico_kernels.patch.prellm import PreLLM


def videochat_flash(
    positions: Positions = "renumber",
    pre_llm: PreLLM | None = None,
    *,
    model: nn.Module | None = None,
) -> DropPlan:
    """VideoChat-Flash: 75 % evenly from layer 4 on, 25 % by text from layer 18 on, of 28 layers.

    arXiv 2501.00574, section 3.1; layers and ratios are those of its published demo
    ("uniform0_attention", [4, 18], [1, 0.75, 0.25]), which numbers positions anew. Models with
    rotary positions of time, height and width need positions="keep".

    pre_llm: its clips as well, `PreLLM(merge_to=64, per_frames=4)`, for models whose projector does
    not merge. The default leaves that out: it fits every family, and VideoChat-Flash itself, whose
    clips are merged before they come here. model: takes layer 18 to the nearest where its text can
    choose; raises `UnsupportedModel` as `patch` does.
    """
    (layer,) = _nearest(model, [18])
    return DropPlan({4: Uniform(0.75), layer: TextTopK(0.25)}, positions, pre_llm)


def pyramid(
    model: nn.Module,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    positions: Positions = "keep",
) -> DropPlan:
    """PyramidDrop: stages of equally many layers; after each, fewer visual tokens, by the text.

    arXiv 2410.17247: layers 8, 16 and 24 of 32, each keeping half of those before. keep: ratios
    of all visual tokens, one for each drop, falling. model: tells the number of layers, and in
    which of them its text can choose: stages begin at the nearest; raises `UnsupportedModel` as
    `patch` does, and `ValueError` for more ratios than such layers. Its released code numbers
    positions anew.
    """
    layers = len(take_apart(model).decoder.layers)
    if not 0 < len(keep) < layers:
        raise ValueError(f"keep must have 1 to {layers - 1} ratios, got {len(keep)}")
    starts = _nearest(model, [(i + 1) * layers // (len(keep) + 1) for i in range(len(keep))])
    return DropPlan(dict(zip(starts, map(TextTopK, keep), strict=True)), positions)


def fastv(layer: int = 2, keep: float = 0.5, *, model: nn.Module | None = None) -> DropPlan:
    """FastV: from layer 2 on the half of the visual tokens that are attended to most.

    arXiv 2403.06764, "after layer 2", K = 2 and R = 50 %. There the layer before the drop says,
    with the mean over all tokens that ask; here, as in all plans, the last prompt token in the
    first layer that sees fewer, so no attention map is made. model: takes the layer to the nearest
    where its text can choose; raises `UnsupportedModel` as `patch` does.
    """
    (layer,) = _nearest(model, [layer])
    return DropPlan({layer: TextTopK(keep)})


def _nearest(model: nn.Module | None, wanted: Sequence[int]) -> Sequence[int]:
    """For each ascending layer the nearest where text can choose, the earlier of two; all different
    and ascending as well.
    """
    if model is None:
        return wanted
    fine, found = scoring_layers(take_apart(model).decoder), []
    if len(wanted) > len(fine):
        raise ValueError(
            f"keep must have at most {len(fine)} ratios for this model, whose text can choose in "
            f"layers {', '.join(map(str, fine))}, got {len(wanted)}"
        )
    for index, layer in enumerate(wanted):
        last = len(fine) - len(wanted) + index + 1  # leave one for each that follows
        left = [other for other in fine[:last] if not found or other > found[-1]]
        found.append(min(left, key=lambda other: abs(other - layer)))
    return found
