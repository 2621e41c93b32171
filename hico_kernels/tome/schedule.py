"""How many tokens every layer of a tower leaves, and the other settings of a patch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Either `r` pairs merge in every layer, or a share `keep` of the tokens is left at the end."""

    r: int | None
    keep: float | None

    def __post_init__(self) -> None:
        if (self.r is None) == (self.keep is None):
            raise ValueError(f"give either r or keep, got r={self.r!r} and keep={self.keep!r}")
        if self.r is not None:
            if isinstance(self.r, bool) or not isinstance(self.r, int):
                raise TypeError(f"r must be an int, got {self.r!r}")
            if self.r < 0:
                raise ValueError(f"r must be at least 0, got {self.r}")
        elif isinstance(self.keep, bool) or not isinstance(self.keep, float | int):
            raise TypeError(f"keep must be a ratio (float), got {self.keep!r}")
        elif not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")

    def pairs(self, num_tokens: int, num_layers: int) -> list[int]:
        """Pairs that each layer merges, at most half of the tokens it has.

        With `keep`, tokens fall by the same number per layer, as with `r` (the constant schedule
        of arXiv 2210.09461, section 3), and earlier only where halving could not reach the end.
        """
        left, out = num_tokens, []
        for layer in range(num_layers):
            merged = min(self._wanted(num_tokens, left, layer, num_layers), left // 2)
            left -= merged
            out.append(merged)
        return out

    def _wanted(self, num_tokens: int, left: int, layer: int, num_layers: int) -> int:
        if self.r is not None:
            return self.r
        final = max(1, int(num_tokens * self.keep)) if num_tokens else 0
        behind = num_layers - 1 - layer
        if layer == 0 and final << num_layers < num_tokens:
            raise ValueError(
                f"keep must be at least 1 / 2**{num_layers} here: a layer can halve its tokens at "
                f"most, and {num_layers} layers cannot take {num_tokens} to {final}"
            )
        even = final + (num_tokens - final) * behind // num_layers
        return left - min(even, final << behind)


@dataclass(frozen=True)
class Settings:
    """What `hico_kernels.tome.patch` was asked for."""

    schedule: Schedule
    prop_attn: bool
    order: str
