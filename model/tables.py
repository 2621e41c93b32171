"""VideoChat-Flash's cost tables again: what is printed, what a formula gives, what torch counts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.flops import (
    CARD_BYTES,
    QWEN2_7B,
    SIGLIP_TABLE5,
    UMT_L,
    UMT_L_TABLE5,
    Convention,
    VisionEncoder,
    cost,
)
from hico_model import counted, measured
from hico_model.config import presets
from hico_model.measured import Measured
from hico_model.paper_tables import TABLE1, TABLE5, TABLE7, Table7

SOURCE = "VideoChat-Flash, arXiv 2501.00574"
OWN = {1: "paper", 5: None, 7: "profiler"}  # table -> the convention that it follows
CONFIG = presets["7b-224"]
FRAMES, TEXT = 1000, 60  # of Table 7, see `hico_kernels.flops.cost`
TIME = "first_token_s"
# Model and tokens per frame -> its name in the measurements; at the printed 14 there is no model.
MEASURED = {
    ("VideoChat-Flash", 16): "videochat_flash",
    ("LongVA", 144): "longva",
    ("LongVILA", 196): "longvila",
}
RULES = {"uniform": Uniform, "attention": TextTopK}
COUNTED_NOTE = (
    "counted: torch's FLOP counter on hico_model's modules at this size, on the meta device, one "
    "prefill of Qwen2-7B"
)
PAIRS_NOTE = {
    True: "; of the causal attention the pairs which the mask leaves",
    False: "; all pairs of the causal attention, as torch counts it",
}


class Cell(NamedTuple):
    """A quantity of one row."""

    quantity: str
    unit: str
    paper: str | None  # as printed; None where the paper has no such row
    recomputed: float | None  # None: the convention does not define it
    counted: float | None = None
    agrees: bool | None = None  # recomputed with printed; None under another convention
    measured: float | str | None = None  # or why there is none; None where it cannot be measured


class Table(NamedTuple):
    """Rows are their labels and their cells; all rows have the same quantities."""

    number: int
    title: str
    convention: Convention | None
    labels: tuple[str, ...]
    rows: list[tuple[tuple[str | int, ...], list[Cell]]]
    notes: list[str]


def tables(
    numbers: Sequence[int] = (1, 5, 7),
    convention: Convention | None = None,
    results: Path = measured.RESULTS,
) -> list[Table]:
    """The tables `numbers`; convention None takes each table's own. Table 5 has none.

    results: the folder with what was measured, a folder for each device.
    """
    found, make = measured.read(results), {1: table1, 7: table7}
    return [make[n](convention or OWN[n], found) if n in make else table5(found) for n in numbers]


def as_printed(value: float) -> str:
    """To one decimal, but 6 digits in all: 1 289 489.9 is printed as 1289490.0."""
    return f"{float(f'{value:.6g}'):.1f}"


def memory_as_printed(gigabytes: float) -> str:
    """As the paper would: "oom" for what its card does not hold."""
    return "oom" if gigabytes * 1e9 > CARD_BYTES else as_printed(gigabytes)


def table1(convention: Convention, found: Measured) -> Table:
    """The language model's prefill from 64 to 10,000 frames."""
    causal, own = convention == "prefill_causal", convention == OWN[1]
    rows = []
    for printed in TABLE1:
        sizes = {printed.tokens_per_frame: printed}
        if printed.model == "VideoChat-Flash":
            sizes[CONFIG.tokens_per_clip // CONFIG.frames_per_clip] = None
        for tokens, line in sizes.items():
            result = cost(
                QWEN2_7B, frames=printed.frames, tokens_per_frame=tokens, convention=convention
            )
            visual = printed.frames * tokens
            flops = counted.prefill(CONFIG, visual, 128, DropPlan({}))
            flops = flops.causal if causal else flops.full
            agree = _prints_as if own else None
            cells = [_flops(line and line.teraflops, result.flops, flops, agree)]
            system = MEASURED.get((printed.model, tokens))
            time, peak = (
                system and found.value(f"first_token-{printed.frames}frames-bf16-{system}", of)
                for of in (TIME, "peak_gb")
            )
            if own:  # the only convention that defines memory
                train, infer = (x / 1e9 for x in (result.train_bytes, result.infer_bytes))
                cells += [
                    _memory("train", line and line.train_gigabytes, train),
                    _memory("infer", line and line.infer_gigabytes, infer, peak),
                ]
            cells.append(Cell("first token", "s", None, None, measured=time))
            rows.append(((printed.frames, printed.model, tokens), cells))
    notes = [
        "the figures follow from 14 tokens a frame for VideoChat-Flash; the model has 16, as the "
        "rows without a printed figure. 128 text tokens, Qwen2-7B for all three models (LongVILA's "
        "own is Llama-3-8B)",
        COUNTED_NOTE + PAIRS_NOTE[causal],
        found.note + ". VideoChat-Flash from pixels on and at 16 tokens a frame; of the others the "
        "language model alone, LongVILA's at Llama-3-8B's sizes",
    ]
    if own:
        notes[1:1] = [
            f"oom: more than {CARD_BYTES / 1e9:.0f} GB",
            "*: not as printed. All other cells of the column follow this line, so the printed "
            "figure is taken for a mistake",
        ]
    labels = ("frames", "model", "tokens/frame")
    title = f"FLOPs{' and memory' * own} of the language model"
    return Table(1, title, convention, labels, rows, notes)


def table5(found: Measured) -> Table:
    """The vision encoders on 8 frames."""
    umt, siglip = TABLE5
    frames, clip = 8, UMT_L.frames
    nominal, deployed = UMT_L_TABLE5.layers, UMT_L.layers
    head = SIGLIP_TABLE5.layers
    shorter = replace(SIGLIP_TABLE5, layers=head - 1, pooling_head=False)
    classed = replace(UMT_L_TABLE5, class_token=True)

    def row(
        name: str, variant: str, vision: VisionEncoder, printed=None, flops=None, measure=None
    ) -> tuple:
        macs = frames // vision.frames * sum(vision.macs().values())
        gigaflops = printed and printed.gigaflops
        agrees = _close(macs / 1e9, gigaflops) if printed else None
        counted = None if flops is None else flops / 2e9
        seconds = measure and found.value(f"encoder-{frames}frames-bf16-{measure}", "latency_s")
        latency = seconds * 1e3 if isinstance(seconds, float) else seconds
        paper = printed and printed.milliseconds
        return (name, variant), [
            Cell("MACs", "G", gigaflops, macs / 1e9, counted, agrees),
            Cell("latency", "ms", paper, None, measured=latency),
        ]

    rows = [
        row(
            umt.encoder,
            f"{nominal} blocks, 8 frames in one pass",
            UMT_L_TABLE5,
            umt,
            counted.umt(CONFIG, nominal, frames),
            "umt_l",
        ),
        row(
            siglip.encoder,
            f"{head} blocks and pooling head, 8 images",
            SIGLIP_TABLE5,
            siglip,
            counted.siglip(frames),
            "siglip_so400m",
        ),
        row(umt.encoder, f"{nominal} blocks, 8 frames in one pass, class token", classed),
        row(
            umt.encoder,
            f"as deployed: {deployed} blocks, 2 passes of {clip} frames",
            UMT_L,
            flops=frames // clip * counted.umt(CONFIG, deployed, clip),
        ),
        row(
            siglip.encoder,
            f"features after block {head - 1}, no head",
            shorter,
            flops=counted.siglip(frames, layers=head - 1, head=False),
        ),
    ]
    notes = [
        "the G of the paper are multiply-adds, and for 8 frames: inferred. Matrix products alone, "
        "within 0.1 %",
        "counted: torch's FLOP counter, halved, on hico_model's UMT-L and transformers' SigLIP",
        found.note,
    ]
    title = "Compute of the vision encoders on 8 frames"
    return Table(5, title, None, ("encoder", "variant"), rows, notes)


def table7(convention: Convention, found: Measured) -> Table:
    """Dropping visual tokens inside the language model."""
    causal, own, alone = convention == "prefill_causal", convention == OWN[7], convention == "paper"
    tokens = CONFIG.tokens_per_clip // CONFIG.frames_per_clip
    rows = []
    for printed in TABLE7:
        plan = plan_of(printed)
        result = cost(
            QWEN2_7B,
            frames=FRAMES,
            tokens_per_frame=tokens,
            text=TEXT,
            drops=plan,
            vision=None if alone else UMT_L,
            convention=convention,
        )
        flops = counted.prefill(CONFIG, FRAMES * tokens, TEXT, plan)
        flops = flops.causal if causal else flops.full
        flops += 0 if alone else counted.vision(CONFIG, FRAMES)
        rules = ", ".join(f"{rule}/{keep}" for rule, keep in printed.drops.values())
        name = f"dropping-{FRAMES}frames-bf16-{plan_name(plan)}"
        seconds = Cell("first token", "s", printed.seconds, None, measured=found.value(name, TIME))
        label = (rules or "none", ", ".join(map(str, printed.drops)))
        agree = _close if own else None
        rows.append((label, [_flops(printed.teraflops, result.flops, flops, agree), seconds]))
    part = "the language model alone" if alone else "with encoder, merge and projector"
    notes = [
        f"{FRAMES} frames of {tokens} tokens and {TEXT} text tokens, {part}: frames, text tokens "
        "and unit (printed G, meant T) are inferred",
        COUNTED_NOTE + PAIRS_NOTE[causal],
        found.note + ". The first token is timed from pixels on",
    ]
    if own:
        notes[1:1] = ["within 0.1 %; the profiler saw no attention products, the counter does"]
    title = "FLOPs of a prefill that drops visual tokens"
    return Table(7, title, convention, ("drop rule/share", "layer"), rows, notes)


def plan_name(plan: DropPlan) -> str:
    """A plan in the name of a measurement: uniform4x0.75_text18x0.25."""
    names = {Uniform: "uniform", TextTopK: "text"}
    drops = [f"{names[type(rule)]}{at}x{rule.keep}" for at, rule in plan.drops.items()]
    return "_".join(drops) or "none"


def plan_of(printed: Table7) -> DropPlan:
    """The plan of a line of Table 7."""
    return DropPlan({at: RULES[rule](keep) for at, (rule, keep) in printed.drops.items()})


def _prints_as(value: float, paper: str) -> bool:
    return as_printed(value) == paper


def _close(value: float, paper: str) -> bool:
    return abs(value / float(paper) - 1) < 1e-3


def _flops(paper: str | None, recomputed: int, counted: int, agree: Callable | None) -> Cell:
    """agree: says whether the recomputed figure is that of the paper; None where it need not be."""
    value = recomputed / 1e12
    agrees = agree(value, paper) if agree and paper else None
    return Cell("FLOPs", "T", paper, value, counted / 1e12, agrees)


def _memory(
    quantity: str, paper: str | None, gigabytes: float, peak: float | str | None = None
) -> Cell:
    agrees = None if paper is None else memory_as_printed(gigabytes) == paper
    return Cell(quantity, "GB", paper, gigabytes, agrees=agrees, measured=peak)
