"""What was measured on a GPU of the rows of the tables: bench/results of a checkout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
NOT_MEASURED, OUT_OF_MEMORY = "not measured", "oom"


class Measured(NamedTuple):
    """The results of one GPU by benchmark name: op-shape-dtype-impl."""

    entries: Mapping[str, Mapping[str, Any]]
    where: str | None = None  # GPU, commit and date; None when nothing was measured

    def value(self, name: str, quantity: str) -> float | str:
        """The quantity, "oom" for what did not fit into 80 GB, or "not measured"."""
        entry = self.entries.get(name)
        if entry is None:
            return NOT_MEASURED
        return OUT_OF_MEMORY if "oom_at_gb" in entry else entry[quantity]

    @property
    def note(self) -> str:
        """For below a table."""
        if self.where is None:
            return "measured: nothing so far; `make bench` on a CUDA device fills the column"
        return f"measured: {self.where}, random weights, bfloat16, 80 GB at most"


def read(folder: Path = RESULTS) -> Measured:
    """Of the first GPU in the folder that has any; an installed package has no folder."""
    for file in sorted(folder.glob("*/tables.json")):
        kept = json.loads(file.read_text())
        if kept["type"] == "cuda":
            where = f"{kept['device']}, commit {kept['commit']}, {kept['date']}"
            return Measured({entry["name"]: entry for entry in kept["results"]}, where)
    return Measured({})
