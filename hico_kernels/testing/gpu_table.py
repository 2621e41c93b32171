"""What testing/gpu.py found, as Markdown."""


def _table(head: list[str], rows: list[list]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _parts(parts: dict) -> list[str]:
    rows = []
    for name, part in parts.items():
        counts: dict[str, int] = {}
        for command in part.get("commands", ()):
            for kind, number in command.get("counts", {}).items():
                counts[kind] = counts.get(kind, 0) + number
        said = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        rows.append([name, f"{part['seconds']:.0f}", part["outcome"], part.get("why", said)])
    return ["", *_table(["part", "s", "outcome", ""], rows)]


def _troubles(parts: dict) -> list[str]:
    lines = []
    for name, part in parts.items():
        for command in part.get("commands", ()):
            if command["outcome"] == "passed":
                continue
            lines += ["", f"### {name}: {command['outcome']}", "", f"`{command['command']}`", ""]
            lines += [f"    {x}" for x in command.get("failures", command.get("last_lines", ()))]
    return ["", "## What failed", *lines] if lines else []


def _left_out(parts: dict) -> list[str]:
    reasons = [
        line
        for part in parts.values()
        for command in part.get("commands", ())
        for line in command.get("skipped", ())
    ]
    return ["", "## Left out by tests and benchmarks", "", *(f"* {x}" for x in reasons[:60])] * (
        len(reasons) > 0
    )


def _limits(limits: dict) -> list[str]:
    return ["", "## Limits", "", *_table(["limit", "measured"], [list(x) for x in limits.items()])]


def _bench(runs: list[dict]) -> list[str]:
    rows = []
    for line in (x for kinds in runs for x in kinds.get("ops", {}).get("results", ())):
        others = ", ".join(f"{name} {x:.2f}x" for name, x in line.get("times_as_fast", {}).items())
        floor = line.get("percent_of_floor", "")
        rows.append([line["name"], f"{line['median_s'] * 1e6:.1f}", floor, others])
    head = ["benchmark", "median, us", "% of floor", "others take"]
    return ["", "## Operations", "", *_table(head, rows)] if rows else []


def markdown(report: dict) -> str:
    """The report of `gpu.work` as one page."""
    lines = [f"# {report['device']}, torch {report['torch']}, {report['date']}"]
    lines += _parts(report["parts"]) + _troubles(report["parts"])
    if "limits" in report:
        lines += _limits(report["limits"])
    lines += _bench(report["bench"])
    return "\n".join([*lines, *_left_out(report["parts"])]) + "\n"
