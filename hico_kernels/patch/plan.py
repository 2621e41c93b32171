"""Which layers of a language model drop visual tokens, by which rule, and how many tokens stay.

VideoChat-Flash (arXiv 2501.00574, section 3.1) drops uniformly in shallow layers and by what the
text attends to in deep ones: ``DropPlan({4: Uniform(keep=0.75), 18: TextTopK(keep=0.25)})``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

Positions = Literal["keep", "renumber"]


def _check_keep(self: "Rule") -> None:
    rule, keep = type(self).__name__, self.keep
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"{rule}: keep must be a ratio (float) or a count (int), got {keep!r}")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{rule}: keep as a ratio must be in (0, 1], got {keep}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{rule}: keep as a count must be at least 1, got {keep}")
    object.__setattr__(self, "is_ratio", isinstance(keep, float))  # 1 and 1.0 are different rules


@dataclass(frozen=True)
class Uniform:
    """Keep visual tokens at even spacing. keep: ratio in (0, 1] (float) or a count (int) per
    sequence.
    """

    keep: float | int
    is_ratio: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_keep(self)


@dataclass(frozen=True)
class TextTopK:
    """Keep the visual tokens that the last prompt token attends to most. keep: as in `Uniform`."""

    keep: float | int
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
    """

    drops: Mapping[int, Rule]
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be 'keep' or 'renumber', got {self.positions!r}")
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
        return DropPlan, (dict(self.drops), self.positions)  # a proxy cannot be pickled or copied

    def __hash__(self) -> int:
        return hash((tuple(self.drops.items()), self.positions))

    def check_layers(self, num_layers: int) -> None:
        """Raise when a drop lies outside a model of `num_layers` layers."""
        for layer in self.drops:
            if layer >= num_layers:
                layers = f"the model has layers 0 to {num_layers - 1}"
                raise ValueError(f"drops: layer {layer} is out of range, {layers}")

    def counts(self, num_visual: int) -> dict[int, int]:
        """Visual tokens that stay at each drop layer, for a prompt with `num_visual` of them
        (host ints).
        """
        left, out = num_visual, {}
        for layer, rule in self.drops.items():
            want = int(num_visual * rule.keep) if rule.is_ratio else rule.keep
            left = out[layer] = min(left, want)
        return out

    def to_json(self) -> str:
        """As text, for a model's config; `from_json` gives an equal plan back."""
        drops = {str(k): {"rule": type(r).__name__, "keep": r.keep} for k, r in self.drops.items()}
        return json.dumps({"drops": drops, "positions": self.positions})

    @classmethod
    def from_json(cls, text: str) -> "DropPlan":
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        drops = {int(k): _RULES[r["rule"]](r["keep"]) for k, r in data["drops"].items()}
        return cls(drops, data["positions"])
