"""What a prompt cost, layer by layer."""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from hico_kernels.flops import visible_pairs
from hico_kernels.patch.call import Call
from hico_kernels.patch.picture import draw

_TIMES = ("merging", "scoring", "compacting", "attention")


@dataclass(frozen=True)
class Report:
    """The last prompt with visual tokens: what each layer saw, and what that saved.

    FLOPs are those of the language model reading the prompt, scoring included, the logits not, by
    the convention "prefill_causal" of `hico_kernels.flops`; padding that runs counts. Times are
    those of the device, on the CPU of the host, and none of compiled code; attention is that of all
    layers with its projections.
    """

    rows: list[int]  # tokens per layer, of the longest sequence of the batch
    visual: list[list[int]]  # visual tokens per layer, for each sequence
    length: int  # tokens of the prompt, padding included
    kv_bytes: int  # keys and values of the prompt in all layers
    kv_bytes_saved: int
    flops: int
    flops_saved: int
    milliseconds: dict[str, float]  # merging, scoring, compacting, attention

    @classmethod
    def of(cls, decoder: nn.Module, call: Call | None) -> "Report":
        """The report of a call; empty before the first."""
        if call is None:
            return cls([], [], 0, 0, 0, 0, 0, {})
        visual, left = [], call.prompt.num_visual
        for layer in range(len(call.held)):
            left = call.kept[layer].visual if layer in call.kept else left
            visual.append(list(left))
        whole = [[call.length] * call.batch] * len(call.held)
        kv, kv_whole = (
            2 * decoder.dtype.itemsize * sum(map(_held, decoder.layers, held))
            for held in (call.held, whole)
        )
        took = call.clock.milliseconds()
        flops = _flops(decoder, call.held, call.last)
        flops += sum(_scoring(decoder, layer, rows) for layer, rows in call.scored.items())
        return cls(
            [max(held) for held in call.held],
            visual,
            call.length,
            kv,
            kv_whole - kv,
            flops,
            _flops(decoder, whole, call.last) - flops,
            {name: took[name] for name in _TIMES if name in took},
        )

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Draw tokens per layer, of the longest sequence, into an SVG file."""
        if not self.rows:
            raise ValueError("report: no prompt with visual tokens yet, nothing to draw")
        visual = [max(counts) for counts in self.visual]
        saved = self._saved()
        title = f"Tokens in {len(self.rows)} layers: {', '.join(saved)}"
        picture = draw(self.rows, visual, self.length, title, self.milliseconds)
        Path(path).write_text(picture, encoding="utf-8")

    def _saved(self) -> list[str]:
        flops = self.flops_saved / max(self.flops + self.flops_saved, 1)
        kv = self.kv_bytes_saved / max(self.kv_bytes + self.kv_bytes_saved, 1)
        return [
            f"KV cache {self.kv_bytes / 2**20:.1f} MiB, {kv:.0%} saved",
            f"{self.flops / 1e12:.3g} TFLOP, {flops:.0%} saved",
        ]

    def _times(self) -> list[str]:
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.milliseconds.items())
        return [times] if times else []

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
        return "\n".join([*lines, *self._saved(), *self._times()])


def _heads(decoder: nn.Module, layer: nn.Module) -> int:
    """Width of the queries of a layer."""
    return decoder.config.num_attention_heads * layer.self_attn.head_dim


def _kv_width(layer: nn.Module) -> int:
    """Of the keys that a layer makes: none in linear attention, or where an earlier one's serve."""
    keys = getattr(getattr(layer, "self_attn", None), "k_proj", None)
    return 0 if keys is None else keys.out_features


def _held(layer: nn.Module, rows: list[int]) -> int:
    return _kv_width(layer) * sum(rows)


def _flops(decoder: nn.Module, held: list[list[int]], last: list[int | None]) -> int:
    """Of all layers: layer l sees held[l] rows of each sequence, of which last[l] or all run."""
    total = 0
    for layer, seen, few in zip(decoder.layers, held, last, strict=True):
        rows = seen if few is None else [few] * len(seen)
        total += 2 * _macs(decoder, layer) * sum(rows)
        if hasattr(layer, "self_attn"):
            pairs = sum(visible_pairs(n, keys) for n, keys in zip(rows, seen, strict=True))
            total += 4 * _heads(decoder, layer) * pairs
        else:  # a state per head is read, updated and read, a row at a time
            state = layer.linear_attn
            size = state.num_v_heads * state.head_k_dim * state.head_v_dim
            total += 6 * size * sum(rows)
    return total


def _macs(decoder: nn.Module, layer: nn.Module) -> int:
    """Multiply-adds of a row in the matrices of a layer; of experts, those that it is sent to."""
    config, total = decoder.config, 0
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3 and hasattr(module, "num_experts"):
                sent = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
                total += weight.numel() * sent // module.num_experts
            elif weight.dim() > 1:
                total += weight.numel()
    return total


def _scoring(decoder: nn.Module, index: int, rows: list[int]) -> int:
    """Keys of all rows, one query, their products: `hico_kernels.flops.Decoder.scoring_flops`."""
    layer, hidden = decoder.layers[index], decoder.config.hidden_size
    query = _heads(decoder, layer)
    return sum(2 * (hidden * _kv_width(layer) * n + hidden * query + query * n) for n in rows)
