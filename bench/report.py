"""Writes what was measured into README.md, and draws it: python -m bench.report

README's part between the markers follows from the files in bench/results and the cost model; so do
the pictures docs/cost-*.svg and those of a device, and build/report.html, one page with all of it.
hico_kernels/measured.json (order.py) follows from the same files.
"""

import sys
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench import order, results
from bench.results import OURS, Name
from hico_kernels import measured

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench: written by `make report` -->", "<!-- /bench -->"
PICTURES = ("ops", "models", "progress")
WIDTH = 830  # pixels of a README


class Run(NamedTuple):
    """Our implementation with some number of threads."""

    threads: int | None
    seconds: float
    percent: float | None  # of the floor, where there is one
    rival: str | None  # the best alternative
    ratio: float | None  # how many times as fast as that we are
    overhead: list[float] | None = None  # percent over the same model as it is, in pairs of runs


class Problem(NamedTuple):
    """What is computed, and our runs of it."""

    op: str
    shape: str
    dtype: str
    whole: bool  # a model, beside the same model as it is
    runs: list[Run]

    @property
    def lost(self) -> list[Run]:
        """Where the alternative is faster."""
        return [run for run in self.runs if run.ratio is not None and run.ratio < 1]


def problems(ops: dict[str, Any]) -> list[Problem]:
    """All problems of a file of results, in its order."""
    found: dict[tuple[str, str, str], Problem] = {}
    for line in ops["results"]:
        name = Name.parse(line["name"])
        if name.impl not in OURS:
            continue
        rival, ratio = min(
            line["times_as_fast"].items(), key=lambda pair: pair[1], default=(None, None)
        )
        percents = line.get("percent_of_floor"), line.get("overhead_percent")
        run = Run(name.threads, line["median_s"], percents[0], rival, ratio, percents[1])
        key = name.op, name.shape, name.dtype
        whole = "stock" in line["times_as_fast"]
        found.setdefault(key, Problem(*key, whole, [])).runs.append(run)
    return list(found.values())


def device_line(kept: dict[str, Any]) -> str:
    """Where and when results were measured."""
    return (
        f"{kept['device']}, torch {kept['versions']['torch']}, commit {kept['commit']}, "
        f"{kept['date']}"
    )


def limits_line(kept: dict[str, Any]) -> str:
    """What the floors are from."""
    names = {
        "copy_gb_per_s": "copy {} GB/s",
        "float32_gflop_per_s": "float32 {} GFLOP/s",
        "bfloat16_gflop_per_s": "bfloat16 {} GFLOP/s",
    }
    found = [
        text.format(" / ".join(map(str, dict.fromkeys(kept["limits"][name]))))
        for name, text in names.items()
        if name in kept["limits"]
    ]
    return f"measured limits: {', '.join(found)}" if found else "no limits measured"


def verdict(found: list[Problem]) -> str:
    """In how many comparisons we win, and every one that we lose."""
    runs = [run for problem in found for run in problem.runs if run.ratio is not None]
    lost = [(problem, run) for problem in found for run in problem.lost]
    won = f"Faster than the best alternative in {len(runs) - len(lost)} of {len(runs)} comparisons"
    if not lost:
        return won + "."
    named = [
        f"{run.rival} in {problem.op} {problem.shape} {problem.dtype}{_threads(run)} "
        f"({1 / run.ratio:.2f} x)"
        for problem, run in lost
    ]
    return f"{won}; slower than {', '.join(named)}."


def table(found: list[Problem]) -> list[str]:
    """A row for each problem; where an alternative wins, its cell says so in bold."""
    counts = sorted({run.threads for problem in found for run in problem.runs} - {None})
    threads = f", {' / '.join(map(str, counts))} threads" * bool(counts)
    lines = [
        f"| operation | shape | | time{threads} | % of the floor | beside the best alternative |",
        "|---|---|---|---|---|---|",
    ]
    for problem in found:
        cells = [problem.op, problem.shape, problem.dtype]
        cells += [durations([run.seconds for run in problem.runs])]
        percents = [run.percent for run in problem.runs]
        cells += [" / ".join(f"{x:.0f}" for x in percents if x is not None)]
        cells += [" / ".join(map(beside, problem.runs))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def beside(run: Run) -> str:
    """How a run stands beside its best alternative."""
    if run.overhead is not None:
        middle, low, high = run.overhead
        return f"{middle:+.1f} % over stock, in pairs ({low:+.1f} to {high:+.1f})"
    if run.ratio is None:
        return ""
    if run.ratio < 1:
        return f"**{run.rival} wins: {1 / run.ratio:.2f} x**"
    return f"{times(run.ratio)} x {run.rival}"


def times(ratio: float) -> str:
    """Two digits, and all before the point."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"


def durations(seconds: list[float]) -> str:
    """Three digits of each, in the unit of the longest."""
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, scale = next((x for x in units if max(seconds) * x[1] >= 1), units[-1])
    return f"{' / '.join(f'{x * scale:.3g}' for x in seconds)} {unit}"


def _threads(run: Run) -> str:
    if run.threads is None:
        return ""
    return f" on {run.threads} thread" + "s" * (run.threads > 1)


def stages(tables: dict[str, Any]) -> list[str]:
    """A row for each way through a model that was measured, in seconds."""
    columns = {
        "clips_s": "clips",
        "encode_s": "encode",
        "merge_s": "merge",
        "project_s": "project",
        "prefill_s": "prefill",
        "drop_s": "drop",
        "first_token_s": "first token",
        "frames_per_s": "frames/s",
        "decode_tokens_per_s": "new tokens/s",
        "peak_gb": "peak GB",
    }
    found = [line for line in tables["results"] if "frames" in line]
    columns = {k: v for k, v in columns.items() if any(line.get(k) for line in found)}
    lines = [f"| model, or plan of table 7 | frames | {' | '.join(columns.values())} |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for line in found:
        what = "oom" if "oom_at_gb" in line else ""
        name = Name.parse(line["name"])
        label = f"table 7: {name.impl}" if name.op == "dropping" else name.impl
        cells = [label, str(line["frames"])]
        cells += [f"{x:.3g}" if (x := line.get(column)) else what for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def apart(ops: dict[str, Any]) -> list[str]:
    """A row for each model whose memory was measured: what reading a prompt takes, in parts."""
    parts = ("scoring", "compacting", "attention")
    found = [line for line in ops["results"] if "peak_bytes" in line]
    lines = [
        f"| model, frames, batch | | first token | peak MB | cache MB | {' | '.join(parts)} |",
        "|---|---|---|---|---|" + "---|" * len(parts),
    ]
    for line in found:
        name = Name.parse(line["name"])
        cells = [name.shape, name.impl, durations([line["median_s"]])]
        cells += [f"{line[key] / 1e6:.3g}" for key in ("peak_bytes", "kv_bytes")]
        spent = line.get("milliseconds", {})
        cells += [durations([spent[part] / 1e3]) if part in spent else "" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if found else []


def folded(title: str, lines: list[str]) -> list[str]:
    """A table that opens with a click."""
    return [f"<details><summary>{title}</summary>", "\n".join(lines), "</details>"]


def picture(name: str, text: str) -> str:
    """HTML of a picture that docs/ has for light and dark pages."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="docs/{name}-dark.svg">'
        f'<img src="docs/{name}-light.svg" width="{WIDTH}" alt="{escape(text)}"></picture>'
    )


def picture_of(kept: dict[str, Any], kind: str) -> str:
    """The name of a device's picture of this kind."""
    return f"{kind}-{results.folder_of(kept['device'])}"


def readme_part(folder: Path = results.FOLDER) -> str:
    """What stands between README's markers, for the results in the folder."""
    measured = results.load("tables", folder)
    where = "not measured so far"
    if measured:
        nano = "of `nano` at an eighth of the tokens, " * (measured[0]["type"] == "cpu")
        where = f"{nano}measured: {device_line(measured[0])}"
    caption = (
        "Table 1 of VideoChat-Flash. Lines: `hico_kernels/flops.py`, with so many tokens a frame; "
        f"markers: what the paper prints; time to the first token {where}."
    )
    parts = [picture("cost", "FLOPs, memory and time from 64 to 10,000 frames"), caption]
    if measured:
        parts += folded("Time to the first token by stage", stages(measured[0]))
    for kept in results.load("ops", folder):
        found = problems(kept)
        operations, models, progress = (picture_of(kept, kind) for kind in PICTURES)
        parts += [
            picture(operations, "Operations: percent of the floor, speed beside alternatives"),
            f"{device_line(kept)}; {limits_line(kept)}; medians. {verdict(found)}",
            *folded("All rows", table(found)),
        ]
        if memory := apart(kept):
            title = "Patched models: memory of reading a prompt, and parts of its time"
            parts += folded(title, memory)
        if any(problem.whole for problem in found):
            parts.append(picture(models, "Models: percent of the floor, speed beside the stock"))
        if len(results.history(kept, folder)) > 1:
            parts.append(picture(progress, "Speed of every operation over commits"))
    return "\n\n".join(parts)


def with_part(readme: str, part: str) -> str:
    """README with the part between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def main() -> int:
    """See the module's text."""
    try:
        from bench import page, pictures
    except ModuleNotFoundError as e:
        print(f"bench.report needs {e.name}: pip install '.[bench]'", file=sys.stderr)
        return 1
    readme = ROOT / "README.md"
    readme.write_text(with_part(readme.read_text(), readme_part()))
    measured.FILE.write_text(order.text())
    written = [
        readme,
        measured.FILE,
        *pictures.draw(ROOT / "docs"),
        page.write(ROOT / "build" / "report.html", ROOT / "docs"),
    ]
    for file in written:
        print(f"wrote {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
