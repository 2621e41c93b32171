"""A run as text: the table of stages, and what merging and dropping saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hico_kernels import DropPlan
from hico_kernels.flops import rows_per_layer
from hico_model.config import Config, presets
from hico_model.trace import Answer, Trace

TIMES = "\N{MULTIPLICATION SIGN}"
HEAD = ("stage", "shape", "tokens", "kept", "time", "share")
PEERS = {144: "as LongVA", 196: "as LongVILA"}  # tokens per frame: arXiv 2406.16852, 2408.10188
REAL_SIZE = "7b-448"  # also shown for a run of another size
REAL_TEXT = 60  # text tokens of a usual prompt in its tokenizer


@dataclass(frozen=True)
class Run:
    """An answer and what it was made from."""

    answer: Answer
    question: str
    video: str
    config: Config
    plan: DropPlan
    weights: str  # one line: where they are from
    trained: bool
    value_bytes: int  # of one number in the KV cache
    credit: str = ""  # whose video it is


class StageTable(NamedTuple):
    """Cells under `HEAD` for every stage, then the sum; `shares` of the time, without the sum."""

    rows: list[tuple[str, ...]]
    shares: list[float]


def stage_table(trace: Trace) -> StageTable:
    """tokens are the visual ones, kept their share of the patches that came out of the encoder."""
    patches = trace.assignment.numel()
    total = sum(s.seconds for s in trace.stages)
    shares = [s.seconds / total for s in trace.stages]
    rows = []
    for stage, share in zip(trace.stages, shares, strict=True):
        in_llm = stage.name.startswith(("LLM", "drop"))
        tokens = stage.tokens - trace.num_text if in_llm else stage.tokens
        visual = stage.name not in ("frames", "clips", "decode")
        rows.append(
            (
                stage.name,
                f" {TIMES} ".join(f"{n:,}" for n in stage.shape),
                f"{tokens:,}" if visual else "",
                f"{tokens / patches:.1%}" if visual else "",
                _milliseconds(stage.seconds),
                f"{share:.1%}",
            )
        )
    rows.append(("total", "", "", "", _milliseconds(total), "100.0%"))
    return StageTable(rows, shares)


def table_note(trace: Trace) -> str:
    """What the table leaves out."""
    return (
        f"tokens: visual ones; the language model has {trace.num_text} text tokens besides, "
        f"and wrote {len(trace.new_tokens)}"
    )


@dataclass(frozen=True)
class Case:
    """One way to give the same frames to the same language model."""

    label: str
    tokens: int  # visual, in the first layer
    kv_bytes: int  # after the prompt
    flops: int  # of the prefill


def cases(
    config: Config, frames: int, text: int, rows: Sequence[int], value_bytes: int
) -> list[Case]:
    """With `rows` in each layer, without drops, and with two other models' tokens per frame."""
    per_frame = config.tokens_per_clip // config.frames_per_clip
    decoder = config.decoder

    def case(label: str, tokens: int, rows: Sequence[int]) -> Case:
        flops = sum(decoder.prefill_flops(rows).values())
        return Case(label, tokens, decoder.kv_bytes(rows, value_bytes), flops)

    out = []
    for tokens, name in {per_frame: "no drops", **PEERS}.items():
        full = rows_per_layer(frames * tokens, text, config.num_layers)
        if tokens == per_frame and list(rows) != full:
            out.append(case(f"{tokens} tokens a frame, with drops", frames * tokens, rows))
        out.append(case(f"{tokens} tokens a frame, {name}", frames * tokens, full))
    return out


def savings(run: Run) -> dict[str, list[Case]]:
    """Title -> cases, the run first; then the same frames in a model of real size, computed."""
    trace = run.answer.trace
    frames, text = len(trace.times), trace.num_text
    title = f"{run.config.name}, as run: {frames} frames and {text} text tokens"
    out = {title: cases(run.config, frames, text, trace.layer_tokens, run.value_bytes)}
    if run.config.name != REAL_SIZE:
        real = presets[REAL_SIZE]
        visual = frames * real.tokens_per_clip // real.frames_per_clip
        plan = run.plan.counts(visual)
        rows = rows_per_layer(visual, REAL_TEXT, real.num_layers, plan)
        title = f"{REAL_SIZE}, computed: {frames} frames and {REAL_TEXT} text tokens, bfloat16"
        out[title] = cases(real, frames, REAL_TEXT, rows, 2)
    return out


def si(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: si(57344, "B") is "57.3 kB"."""
    power = 0
    while value >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    digits = 0 if not power or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {' kMGT'[power].strip()}{unit}"


def ratio(value: float, to: float) -> str:
    """How many times `to`, as "12.3 x"."""
    return f"{value / to:.1f} {TIMES}"


def printable(text: str) -> str:
    """Control and other invisible characters as escapes; new lines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def answer(run: Run) -> str:
    """What the model said, or what to say where it wrote bytes that are no text."""
    said = printable(run.answer.text)
    if said and not said.strip("\ufffd "):
        return f"({len(run.answer.trace.new_tokens)} tokens that spell no text)"
    return said or "(nothing)"


def text(run: Run, *, colour: bool) -> str:
    """The whole report for a terminal."""

    def bold(line: str) -> str:
        return f"\033[1m{line}\033[0m" if colour else line

    def dim(line: str) -> str:
        return f"\033[2m{line}\033[0m" if colour else line

    head, *body = _aligned([HEAD, *stage_table(run.answer.trace).rows], right=(2, 3, 4, 5))
    lines = [bold(head), dim("─" * len(head)), *body[:-1], dim("─" * len(head)), bold(body[-1])]
    lines.append(dim(table_note(run.answer.trace)))
    for title, group in savings(run).items():
        first = group[0]
        table = [("", "visual tokens", "KV cache", "ratio", "prefill", "ratio")]
        table += [
            (
                c.label,
                f"{c.tokens:,}",
                si(c.kv_bytes, "B"),
                ratio(c.kv_bytes, first.kv_bytes),
                si(c.flops, "FLOP"),
                ratio(c.flops, first.flops),
            )
            for c in group
        ]
        head, ours, *others = _aligned(table, right=(1, 2, 3, 4, 5))
        lines += ["", bold(title), dim(head), ours, *others]
    lines += ["", bold(run.question), answer(run)]
    if not run.trained:
        lines += [f"({run.weights}: this text and the choice of tokens mean nothing)"]
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows of cells as lines with straight columns; the columns in `right` end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
