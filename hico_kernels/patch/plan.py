"""Which layers of a language model drop visual tokens, by which rule, and how many tokens stay.

VideoChat-Flash (arXiv 2501.00574, section 3.1) drops uniformly in shallow layers and by what the
text attends to in deep ones: ``DropPlan({4: Uniform(keep=0.75), 18: TextTopK(keep=0.25)})``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from hico_kernels.patch.prellm import PreLLM

Positions = Literal["keep", "renumber"]


@dataclass(frozen=True)
class PerFrame:
    """As `keep`: `tokens` visual tokens for every frame of the prompt, an int of at least 1. It is
    a budget of the whole sequence, tokens x frames; the rule says which ones stay.

    A frame is one time step that the language model sees (Qwen-VL makes one of two pictures).
    """

    tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int):
            raise TypeError(f"PerFrame: tokens must be an int, got {self.tokens!r}")
        if self.tokens < 1:
            raise ValueError(f"PerFrame: tokens must be at least 1, got {self.tokens}")


Keep = float | int | PerFrame


def _check_keep(self: "Rule") -> None:
    rule, keep = type(self).__name__, self.keep
    if isinstance(keep, bool) or not isinstance(keep, Keep):
        raise TypeError(
            f"{rule}: keep must be a ratio (float), a count (int) or PerFrame, got {keep!r}"
        )
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{rule}: keep as a ratio must be in (0, 1], got {keep}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{rule}: keep as a count must be at least 1, got {keep}")
    object.__setattr__(self, "is_ratio", isinstance(keep, float))  # 1 and 1.0 are different rules


@dataclass(frozen=True)
class Uniform:
    """Keep visual tokens at even spacing. keep: ratio in (0, 1] (float), a count (int) per
    sequence, or `PerFrame`.
    """

    keep: Keep
    is_ratio: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_keep(self)


@dataclass(frozen=True)
class TextTopK:
    """Keep the visual tokens that the last prompt token attends to most. keep: as in `Uniform`."""

    keep: Keep
    is_ratio: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_keep(self)


Rule = Uniform | TextTopK
_RULES = {rule.__name__: rule for rule in get_args(Rule)}


@dataclass(frozen=True)
class DropPlan:
    """Layer index -> rule. Layers before the index see the old tokens, the layer itself and later
    ones the kept.

    A ratio counts from the visual tokens of the *prompt*, not from those left by an earlier drop
    (as in the paper): ``{4: Uniform(0.75), 18: TextTopK(0.25)}`` leaves 75 %, then 25 %. A count
    keeps at most that many.

    positions: "keep" leaves every kept token its rotary position; "renumber" gives 0..len-1 anew
    after each drop, which is what VideoChat-Flash does.

    pre_llm: merge every clip in front of the first layer as well (the whole of HiCo). Ratios then
    count from the visual tokens that merging leaves, and "keep" means the position after merging;
    frames, for `PerFrame`, are as many as before.
    """

    drops: Mapping[int, Rule]
    positions: Positions = "keep"
    pre_llm: PreLLM | None = None

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be 'keep' or 'renumber', got {self.positions!r}")
        if self.pre_llm is not None and not isinstance(self.pre_llm, PreLLM):
            raise TypeError(f"pre_llm must be a PreLLM or None, got {self.pre_llm!r}")
        if not isinstance(self.drops, Mapping):
            raise TypeError(f"drops must map layers to rules, got {self.drops!r}")
        for layer, rule in self.drops.items():
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"drops: a layer must be an int, got {layer!r}")
            if layer < 0:
                raise ValueError(f"drops: a layer must be >= 0, got {layer}")
            if not isinstance(rule, Rule):
                raise TypeError(f"drops[{layer}] must be Uniform or TextTopK, got {rule!r}")
        ordered = dict(sorted(self.drops.items()))
        ratios = [rule.keep for rule in ordered.values() if rule.is_ratio]
        if ratios != sorted(ratios, reverse=True):
            raise ValueError(
                f"drops: keep ratios count from all tokens and cannot rise, got {ratios}"
            )
        object.__setattr__(self, "drops", MappingProxyType(ordered))

    def __reduce__(self) -> tuple:
        given = dict(self.drops), self.positions, self.pre_llm
        return DropPlan, given  # a proxy cannot be pickled or copied

    def __hash__(self) -> int:
        return hash((tuple(self.drops.items()), self.positions, self.pre_llm))

    def check_layers(self, num_layers: int) -> None:
        """Raise when a drop lies outside a model of `num_layers` layers."""
        for layer in self.drops:
            if layer >= num_layers:
                layers = f"the model has layers 0 to {num_layers - 1}"
                raise ValueError(f"drops: layer {layer} is out of range, {layers}")

    @property
    def per_frame(self) -> bool:
        """Whether `counts` needs the number of frames."""
        return any(isinstance(rule.keep, PerFrame) for rule in self.drops.values())

    def counts(self, num_visual: int, num_frames: int | None = None) -> dict[int, int]:
        """Visual tokens that stay at each drop layer, for a prompt with `num_visual` of them in
        `num_frames` frames (host ints); with `pre_llm`, of those that merging leaves. Raises
        `ValueError` for `PerFrame` without the frames.
        """
        if self.per_frame and num_frames is None:
            raise ValueError("num_frames must be given for a plan with PerFrame, got None")
        left, out = num_visual, {}
        for layer, rule in self.drops.items():
            if isinstance(rule.keep, PerFrame):
                want = rule.keep.tokens * num_frames
            else:
                want = int(num_visual * rule.keep) if rule.is_ratio else rule.keep
            left = out[layer] = min(left, want)
        return out

    def to_json(self) -> str:
        """As text, for a model's config; `from_json` gives an equal plan back."""
        drops = {
            str(layer): {"rule": type(rule).__name__, "keep": _keep_to_json(rule.keep)}
            for layer, rule in self.drops.items()
        }
        merging = {} if self.pre_llm is None else {"pre_llm": asdict(self.pre_llm)}
        return json.dumps({"drops": drops, "positions": self.positions, **merging})

    @classmethod
    def from_json(cls, text: str) -> "DropPlan":
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        drops = {
            int(layer): _RULES[rule["rule"]](_keep_from_json(rule["keep"]))
            for layer, rule in data["drops"].items()
        }
        merging = data.get("pre_llm")
        return cls(drops, data["positions"], None if merging is None else PreLLM(**merging))


def _keep_to_json(keep: Keep) -> float | int | dict[str, int]:
    return {"per_frame": keep.tokens} if isinstance(keep, PerFrame) else keep


def _keep_from_json(keep: float | int | dict[str, int]) -> Keep:
    return PerFrame(keep["per_frame"]) if isinstance(keep, dict) else keep
