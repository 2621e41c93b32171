"""hico_kernels/measured.json from bench/results: in which order "auto" tries our implementations on
the GPUs that were measured. `make report` writes it.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import results
from bench.results import BY_NAME, Name


def order(ops: dict[str, Any]) -> dict[str, list[str]]:
    """Operation -> implementations, fastest first by the geometric mean of their medians over the
    problems that all of them ran. An operation with one implementation has no order.
    """
    medians: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in ops["results"]:
        name = Name.parse(line["name"])
        if name.impl in BY_NAME:
            medians[name.op][name.problem][name.impl] = line["median_s"]
    found = {}
    for op, problems in medians.items():
        impls = {impl for ran in problems.values() for impl in ran}
        shared = [ran for ran in problems.values() if impls <= set(ran)]
        if len(impls) > 1 and shared:
            found[op] = sorted(impls, key=lambda x: math.prod(ran[x] for ran in shared))
    return found


def table(folder: Path = results.FOLDER) -> dict[str, dict[str, Any]]:
    """What measured.json holds for the results in the folder: of two GPUs with one compute
    capability the one that was measured last.
    """
    measured = [ops for ops in results.load("ops", folder) if "capability" in ops]
    return {
        ops["capability"]: {x: ops[x] for x in ("device", "date", "commit")} | {"order": order(ops)}
        for ops in sorted(measured, key=lambda ops: ops["date"])
    }


def text(folder: Path = results.FOLDER) -> str:
    """The file."""
    return json.dumps(table(folder), indent=1) + "\n"
