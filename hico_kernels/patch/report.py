"""What a prompt cost, layer by layer."""

from dataclasses import asdict, dataclass

from torch import nn

from hico_kernels.patch.call import Call
from hico_kernels.patch.plan import DropPlan


@dataclass(frozen=True)
class Report:
    """The last prompt with visual tokens: what each layer saw, and what that saved."""

    rows: list[int]  # tokens per layer, of the longest sequence of the batch
    visual: list[list[int]]  # visual tokens per layer, for each sequence
    length: int  # tokens of the prompt, padding included
    kv_bytes: int  # keys and values of the prompt in all layers
    kv_bytes_saved: int
    milliseconds: dict[str, float]  # scoring, compacting

    @classmethod
    def of(cls, plan: DropPlan, decoder: nn.Module, call: Call | None) -> "Report":
        """The report of a call; empty before the first."""
        if call is None:
            return cls([], [], 0, 0, 0, {})
        visual, left = [], call.prompt.num_visual
        for layer in range(len(call.widths)):
            left = call.kept[layer].visual if layer in call.kept else left
            visual.append(list(left))
        config = decoder.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * heads * size * decoder.dtype.itemsize
        return cls(
            list(call.widths),
            visual,
            call.length,
            sum(call.held) * each,
            sum(call.length * call.batch - rows for rows in call.held) * each,
            call.clock.milliseconds(),
        )

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.rows:
            return "no prompt with visual tokens yet"
        lines = ["layers    tokens  visual tokens of each sequence"]
        first = 0
        for layer in range(1, len(self.rows) + 1):
            last = layer == len(self.rows)
            if last or (self.rows[layer], self.visual[layer]) != (
                self.rows[first],
                self.visual[first],
            ):
                span = f"{first}-{layer - 1}" if layer - 1 > first else f"{first}"
                counts = ", ".join(map(str, self.visual[first]))
                lines.append(f"{span:<8}{self.rows[first]:>8}  {counts}")
                first = layer
        saved = self.kv_bytes_saved / max(self.kv_bytes + self.kv_bytes_saved, 1)
        lines.append(f"KV cache {self.kv_bytes / 2**20:.1f} MiB, {saved:.0%} saved")
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.milliseconds.items())
        return "\n".join([*lines, times] if times else lines)
