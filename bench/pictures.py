"""The pictures of `bench.report`, as SVG for light and for dark pages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import report, results
from bench.results import Name
from hico_kernels.flops import CARD_BYTES, QWEN2_7B, cost
from hico_model.paper_tables import TABLE1
from hico_model.tables import CONFIG

INCHES = report.WIDTH / 96  # at the 96 pixels of an inch that browsers have
FRAMES = np.geomspace(64, 10_000, 40).astype(int)


class Theme(NamedTuple):
    """Colours; all of them are told apart with any colour vision (Okabe and Ito's set)."""

    name: str
    text: str
    faint: str
    systems: dict[str, str]
    good: str
    pale: str
    bad: str


THEMES = (
    Theme(
        "light",
        "#1f2328",
        "#d1d9e0",
        {"LongVILA": "#c04a00", "LongVA": "#00855f", "VideoChat-Flash": "#0072b2"},
        "#0072b2",
        "#8fc1e3",
        "#c04a00",
    ),
    Theme(
        "dark",
        "#e6edf3",
        "#3d444d",
        {"LongVILA": "#f08c4a", "LongVA": "#2fc79a", "VideoChat-Flash": "#56b4e9"},
        "#56b4e9",
        "#2b6a94",
        "#f08c4a",
    ),
)
# Names in the measurements -> system, and how its line is drawn.
MEASURED = {
    "longvila": ("LongVILA", "-"),
    "longva": ("LongVA", "-"),
    "videochat_flash": ("VideoChat-Flash", "-"),
    "videochat_flash_drop": ("VideoChat-Flash", ":"),
}


def draw(folder: Path, kept: Path = results.FOLDER) -> list[Path]:
    """Every picture there are results for, in both themes; the files."""
    tables = results.load("tables", kept)
    measured = tables[0] if tables else None
    written = _save(folder, "cost", lambda theme: costs(theme, measured), measured)
    for ops in results.load("ops", kept):
        names = [report.picture_of(ops, kind) for kind in report.PICTURES]
        # Without what stands for itself, in percent over stock.
        found = [each for each in report.problems(ops) if each.runs[0].overhead is None]
        for name, whole in zip(names, (False, True), strict=False):
            rows = [problem for problem in found if problem.whole == whole]
            if rows:
                written += _save(
                    folder, name, lambda theme, rows=rows: operations(theme, rows), ops
                )
        runs = results.history(ops, kept)
        if len(runs) > 1:
            written += _save(folder, names[-1], lambda theme, runs=runs: progress(theme, runs), ops)
    return written


def origin(kept: dict[str, Any] | None) -> str:
    """What a picture says in its file about where its figures are from."""
    return report.device_line(kept) if kept else "no measurements"


def _save(
    folder: Path, name: str, make: Callable[[Theme], Figure], kept: dict[str, Any] | None
) -> list[Path]:
    files = []
    for theme in THEMES:
        style = {
            "font.family": "sans-serif",
            "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
            "font.size": 9,
            "svg.fonttype": "none",  # text stays text: small files, and sharp at any size
            "svg.hashsalt": name,  # the same picture is the same file
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": theme.faint,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "grid.color": theme.faint,
            "grid.linewidth": 0.5,
            "legend.frameon": False,
            "xtick.color": theme.faint,
            "ytick.color": theme.faint,
            "xtick.labelcolor": theme.text,
            "ytick.labelcolor": theme.text,
            "text.color": theme.text,
            "axes.labelcolor": theme.text,
        }
        with matplotlib.rc_context(style):
            figure = make(theme)
            file = folder / f"{name}-{theme.name}.svg"
            about = {"Date": None, "Creator": None, "Description": origin(kept)}
            figure.savefig(file, transparent=True, metadata=about)
            plt.close(figure)
        files.append(file)
    return files


def costs(theme: Theme, measured: dict[str, Any] | None) -> Figure:
    """FLOPs, memory and time to the first token against frames."""
    figure, axes = plt.subplots(1, 3, figsize=(INCHES, 3.1), layout="constrained")
    for system, colour in theme.systems.items():
        printed = [line for line in TABLE1 if line.model == system]
        tokens = printed[0].tokens_per_frame
        _line(axes, tokens, color=colour, label=f"{system}, {tokens} a frame")
        if system == "VideoChat-Flash":
            released = CONFIG.tokens_per_clip // CONFIG.frames_per_clip
            _line(axes, released, color=colour, ls="--", lw=1, label=f"{released} as released")
        for ax, figures in (
            (axes[0], [line.teraflops for line in printed]),
            (axes[1], [line.infer_gigabytes for line in printed]),
        ):
            points = [
                (line.frames, float(y))
                for line, y in zip(printed, figures, strict=True)
                if y != "oom"
            ]
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=4.5)
    card = CARD_BYTES / 1e9
    axes[1].axhline(card, color=theme.text, linewidth=0.8, linestyle="--")
    axes[1].annotate(
        f"{card:.0f} GB: one A100", (64, card), (0, 3), textcoords="offset points", fontsize=8
    )
    axes[0].set_title("LLM FLOPs (T)")
    axes[1].set_title("LLM memory, inference (GB)")
    size = _times(axes[2], theme, measured)
    axes[2].set_title(f"Time to first token{size} (s)")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="frames", xlim=(50, 13_000))
        ax.set_xticks([64, 256, 1000, 10_000], ["64", "256", "1000", "10,000"])
        ax.minorticks_off()
        ax.grid(axis="y")
    axes[1].set_yticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _line(axes: Sequence[Axes], tokens_per_frame: int, **style: Any) -> None:
    """FLOPs and memory of Qwen2-7B as Table 1 has them."""
    sizes = {"tokens_per_frame": tokens_per_frame, "convention": "paper"}
    at = [cost(QWEN2_7B, frames=int(frames), **sizes) for frames in FRAMES]
    axes[0].plot(FRAMES, [x.flops / 1e12 for x in at], **style)
    axes[1].plot(FRAMES, [x.infer_bytes / 1e9 for x in at], **style)


def _times(ax: Axes, theme: Theme, measured: dict[str, Any] | None) -> str:
    """Draw what was measured of Table 1 -> of what size, for the title."""
    lines = [
        (Name.parse(x["name"]).impl, x)
        for x in (measured["results"] if measured else [])
        if x["name"].startswith("first_token-") and "first_token_s" in x
    ]
    if not lines:
        ax.set_ylim(0.1, 100)
        ax.text(0.5, 0.5, "not measured so far", ha="center", transform=ax.transAxes)
        return ""
    for impl, (system, style) in MEASURED.items():
        points = [(x["frames"], x["first_token_s"]) for name, x in lines if name == impl]
        if points:
            xs, ys = zip(*points, strict=True)
            ax.plot(xs, ys, "s", color=theme.systems[system], ls=style, markersize=4)
            if style == ":":
                label = {"xytext": (6, -10), "textcoords": "offset points", "fontsize": 8}
                ax.annotate("with drops", points[-2], color=theme.systems[system], **label)
    return f", {lines[0][1]['size']}"


def operations(theme: Theme, found: list[report.Problem]) -> Figure:
    """Percent of the floor, and how many times as fast as the best alternative."""
    counts = sorted({run.threads for problem in found for run in problem.runs}, key=str)
    thick = 0.8 / len(counts)
    height = 0.9 + max(0.17 * len(counts), 0.28) * len(found)  # two lines of text for each
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(INCHES, height), layout="constrained", sharey=True, width_ratios=(2, 3)
    )
    for row, problem in enumerate(found):
        for run in problem.runs:
            place = counts.index(run.threads)
            y = row - 0.4 + thick * (place + 0.5)
            colour = theme.good if place == len(counts) - 1 else theme.pale
            bar = {"height": thick * 0.9, "color": colour}
            if run.percent is not None:
                left.barh(y, run.percent, **bar)
                _beside(left, run.percent, y, f"{run.percent:.0f}")
            else:
                _beside(left, 0, y, "no floor")
            if run.ratio is not None:
                colour = theme.bad if run.ratio < 1 else colour
                right.barh(y, run.ratio - 1, left=1, height=thick * 0.9, color=colour)
                _beside(
                    right, run.ratio, y, f"{report.times(run.ratio)} {run.rival}", run.ratio < 1
                )
        label = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        # Two texts of one line each: of several lines, SVG keeps no alignment.
        left.annotate(problem.op, (0, row - 0.2), **label, fontsize=7.5)
        left.annotate(f"{problem.shape} {problem.dtype}", (0, row + 0.2), **label, fontsize=7)
    left.set_yticks([])
    left.set_ylim(len(found) - 0.4, -0.6)
    left.set(xlim=(0, 108), title="Percent of the measured floor")
    left.axvline(100, color=theme.text, linewidth=0.8, linestyle="--")
    ratios = [run.ratio for problem in found for run in problem.runs if run.ratio is not None]
    right.set(xscale="log", xlim=(min(0.5, *ratios) / 2.5, max(2, *ratios) * 5))
    right.set_title("Times as fast as the best alternative")
    right.axvline(1, color=theme.text, linewidth=0.8)
    right.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.minorticks_off()
    right.spines["left"].set_visible(False)
    for ax in (left, right):
        ax.grid(axis="x")
        ax.set_axisbelow(True)
    if len(counts) > 1:
        for colour, count in zip((theme.pale, theme.good), (counts[0], counts[-1]), strict=True):
            left.bar(0, 0, color=colour, label=f"{count} thread" + "s" * (count > 1))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _beside(ax: Axes, x: float, y: float, text: str, before: bool = False) -> None:
    """Text at the end of a bar."""
    way = {"xytext": (-3 if before else 3, 0), "ha": "right" if before else "left"}
    ax.annotate(text, (x, y), **way, textcoords="offset points", va="center", fontsize=7)


def progress(theme: Theme, runs: list[dict[str, Any]]) -> Figure:
    """How many times as fast as in its first kept run every benchmark is, commit by commit."""
    figure, ax = plt.subplots(figsize=(INCHES, 3.4), layout="constrained")
    first: dict[str, float] = {}
    for run in runs:
        for name, seconds in run["median_s"].items():
            first.setdefault(name, seconds)
    by_op: dict[str, list[str]] = {}
    measured_often = [n for n in first if sum(n in run["median_s"] for run in runs) > 1]
    for name in measured_often:
        by_op.setdefault(Name.parse(name).op, []).append(name)
    colours = plt.get_cmap("tab20").colors
    for i, (op, names) in enumerate(by_op.items()):
        gains = [
            [first[n] / run["median_s"][n] for n in names if n in run["median_s"]] for run in runs
        ]
        points = [(x, np.exp(np.mean(np.log(gain)))) for x, gain in enumerate(gains) if gain]
        ax.plot(*zip(*points, strict=True), "o-", color=colours[i % 20], markersize=4, label=op)
    ax.set_xticks(range(len(runs)), [f"{run['commit']}\n{run['date']}" for run in runs])
    ax.set_title("Times as fast as in the first kept run (geometric mean of an operation's rows)")
    ax.axhline(1, color=theme.text, linewidth=0.8)
    ax.grid(axis="y")
    figure.legend(loc="outside right center", fontsize=8)
    return figure
