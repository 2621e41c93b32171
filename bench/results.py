"""What is kept of a benchmark run: one small JSON file a device and kind, bench/results/<device>/.

python -m bench.results FILE.json [--to FOLDER]

takes the file that ``pytest bench --benchmark-only --benchmark-json=FILE.json`` wrote, or the
gpu.json of ``make gpu``. "ops.json" has the operations, "tables.json" what stands beside tables 1,
5 and 7 of the papers, "history.json" the medians of our own operations for each commit measured.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hico_kernels import why_not

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_name("results")
SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int64: "i64",
}
OURS = ("hico", "patched")  # what stands for us in comparisons
BY_NAME = ("triton", "cuda", "flash")  # "hico" is the one of them that "auto" takes on a GPU
ALSO_OURS = ("packed", *BY_NAME)  # kept, but neither ours in comparisons nor a rival

APART = ("peak_bytes", "kv_bytes", "milliseconds")  # of models: memory, and parts of the time


class Name(NamedTuple):
    """A benchmark's name in its parts: op-shape-dtype-impl, on CPUs with the number of threads."""

    op: str
    shape: str
    dtype: str
    impl: str
    threads: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Name":
        """The name from `str` of it. Raises ValueError for anything else."""
        parts = text.split("-")
        if len(parts) not in (4, 5) or not all(parts):
            raise ValueError(f"a benchmark is named op-shape-dtype-impl[-tN], got {text!r}")
        threads = int(parts[4].removeprefix("t")) if len(parts) == 5 else None
        return cls(*parts[:4], threads)

    @property
    def problem(self) -> str:
        """What is the same for all implementations that are compared."""
        return str(self._replace(impl="")).replace("--", "-").removesuffix("-")

    def __str__(self) -> str:
        threads = () if self.threads is None else (f"t{self.threads}",)
        return "-".join([*self[:4], *threads])


def short(dtype: torch.dtype) -> str:
    """A dtype in the name of a benchmark."""
    return SHORT[dtype]


def by_name(operation: str) -> list[str]:
    """Implementations of an operation that are measured under their own names: on a GPU those that
    can run, where there are several; bench/order.py compares them.
    """
    if not torch.cuda.is_available():
        return []
    impls = [impl for impl in BY_NAME if why_not(operation, impl, device="cuda") is None]
    return impls if len(impls) > 1 else []


def device_name(device: str) -> str:
    """The hardware, with nothing of whose machine it is."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    except OSError:
        found = {}
    model = found.get("model name", platform.machine())
    if "cpu family" in found:  # under KVM the model's name may be a vendor's alone
        model += f", family {found['cpu family']} model {found['model']}"
    return f"{model}, {os.cpu_count()} CPUs"


def folder_of(name: str) -> str:
    """The name of a device as that of its folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit that is measured, "+" with changes to what is measured; "" outside of git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "hico_kernels", "model", "bench/*.py")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def compact(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is kept of pytest-benchmark's JSON: kind -> content of its file. A benchmark that failed
    or did not come to its end is left out.
    """
    machine = run["machine_info"]
    head = {
        "device": machine["device"],
        "type": machine["type"],
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {"torch": machine["torch"], "python": platform.python_version()},
        "limits": machine["limits"],
    }
    if "capability" in machine:
        head["capability"] = machine["capability"]
    kinds: dict[str, list[dict[str, Any]]] = {"ops": [], "tables": []}
    for line in run["benchmarks"]:
        entry = {"name": line["name"]}
        if "observed" in line["extra_info"]:
            kinds["tables"].append(entry | line["extra_info"]["observed"])
            continue
        if "percent_of_floor" not in line["extra_info"]:
            continue
        stats = line["stats"]
        entry |= {"min_s": _digits(stats["min"]), "median_s": _digits(stats["median"])}
        if percent := line["extra_info"]["percent_of_floor"]:
            entry["percent_of_floor"] = round(percent, 1)
        for name in APART:
            if name in line["extra_info"]:
                entry[name] = line["extra_info"][name]
        if overhead := line["extra_info"].get("overhead_percent"):
            entry["overhead_percent"] = overhead  # median, and its 99 % confidence interval
        kinds["ops"].append(entry)
    _add_ratios(kinds["ops"])
    return {kind: {**head, "results": lines} for kind, lines in kinds.items() if lines}


def _add_ratios(lines: list[dict[str, Any]]) -> None:
    """To every result of ours: how many times as long each alternative takes, by the medians."""
    for line in lines:
        name = Name.parse(line["name"])
        if name.impl not in OURS:
            continue
        line["times_as_fast"] = {
            other.impl: round(rival["median_s"] / line["median_s"], 3)
            for rival in lines
            if (other := Name.parse(rival["name"])).problem == name.problem
            and other.impl not in (*OURS, *ALSO_OURS)
        }


def of_gpu(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """As `compact` of what `make gpu` wrote, whose benchmarks are in several runs. A run outside of
    git, as on a machine that got the files alone, is taken for one of the commit here."""
    kinds: dict[str, dict[str, Any]] = {}
    for part in run["bench"]:
        for kind, content in part.items():
            kept = kinds.setdefault(kind, {**content, "results": []})
            kept["results"] += content["results"]
            kept["commit"] = kept["commit"] or commit()
    return kinds


def write(run: dict[str, Any], to: Path = FOLDER) -> list[Path]:
    """Keep a run of pytest-benchmark or of `make gpu`; the files that were written."""
    kinds = compact(run) if "benchmarks" in run else of_gpu(run)
    written = []
    for kind, content in kinds.items():
        folder = to / folder_of(content["device"])
        folder.mkdir(parents=True, exist_ok=True)
        written.append(_write_lines(folder / f"{kind}.json", content))
    if "ops" in kinds:
        written.append(_write_history(written[0].with_name("history.json"), kinds["ops"]))
    return written


def _write_history(file: Path, ops: dict[str, Any]) -> Path:
    lines = ops["results"]
    medians = {x["name"]: x["median_s"] for x in lines if Name.parse(x["name"]).impl in OURS}
    now = {"commit": ops["commit"], "date": ops["date"], "median_s": medians}
    before = json.loads(file.read_text())["results"] if file.exists() else []
    runs = [x for x in before if x["commit"] != now["commit"]] + [now]
    return _write_lines(file, {"device": ops["device"], "results": runs})


def _write_lines(file: Path, content: dict[str, Any]) -> Path:
    """As JSON with a line for each result, so that a diff shows what changed."""
    head = {k: v for k, v in content.items() if k != "results"}
    rows = ",\n".join("  " + json.dumps(x, ensure_ascii=False) for x in content["results"])
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    file.write_text(f'{text},\n "results": [\n{rows}\n ]\n}}\n')
    return file


def load(kind: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All kept files of a kind, those of GPUs first."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{kind}.json"))]
    return sorted(found, key=lambda x: x["type"] != "cuda")


def history(kept: dict[str, Any], folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The runs of the device of a kept file, oldest first."""
    file = folder / folder_of(kept["device"]) / "history.json"
    return json.loads(file.read_text())["results"] if file.exists() else []


def _digits(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def main(arguments: Iterable[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="bench.results", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="of pytest-benchmark, or gpu.json")
    parser.add_argument("--to", type=Path, default=FOLDER, help="default: bench/results")
    args = parser.parse_args(arguments)
    for file in write(json.loads(args.file.read_text()), args.to):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
