"""Plans from papers, for `hico_kernels.patch`. Layers count from 0, as in `DropPlan`."""

from collections.abc import Sequence

from torch import nn

from hico_kernels.patch.families import take_apart
from hico_kernels.patch.plan import DropPlan, Positions, TextTopK, Uniform
from hico_kernels.patch.prellm import PreLLM


def videochat_flash(positions: Positions = "renumber", pre_llm: PreLLM | None = None) -> DropPlan:
    """VideoChat-Flash: 75 % evenly from layer 4 on, 25 % by text from layer 18 on, of 28 layers.

    arXiv 2501.00574, section 3.1; layers and ratios are those of its published demo
    ("uniform0_attention", [4, 18], [1, 0.75, 0.25]), which numbers positions anew. Models with
    rotary positions of time, height and width need positions="keep".

    pre_llm: its clips as well, `PreLLM(merge_to=64, per_frames=4)`, for models whose projector does
    not merge. The default leaves that out: it fits every family, and VideoChat-Flash itself, whose
    clips are merged before they come here.
    """
    return DropPlan({4: Uniform(0.75), 18: TextTopK(0.25)}, positions, pre_llm)


def pyramid(
    model: nn.Module,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    positions: Positions = "keep",
) -> DropPlan:
    """PyramidDrop: stages of equally many layers; after each, fewer visual tokens, by the text.

    arXiv 2410.17247: layers 8, 16 and 24 of 32, each keeping half of those before. keep: ratios
    of all visual tokens, one for each drop, falling. model: tells the number of layers; raises
    `UnsupportedModel` as `patch` does. Its released code numbers positions anew.
    """
    layers = len(take_apart(model).decoder.layers)
    if not 0 < len(keep) < layers:
        raise ValueError(f"keep must have 1 to {layers - 1} ratios, got {len(keep)}")
    starts = [(i + 1) * layers // (len(keep) + 1) for i in range(len(keep))]
    return DropPlan(dict(zip(starts, map(TextTopK, keep), strict=True)), positions)


def fastv(layer: int = 2, keep: float = 0.5) -> DropPlan:
    """FastV: from layer 2 on the half of the visual tokens that are attended to most.

    arXiv 2403.06764, "after layer 2", K = 2 and R = 50 %. There the layer before the drop says,
    with the mean over all tokens that ask; here, as in all plans, the last prompt token in the
    first layer that sees fewer, so no attention map is made.
    """
    return DropPlan({layer: TextTopK(keep)})
