"""Checks and measures the library on a CUDA device: ``python -m hico_kernels.testing.gpu --out
DIR``.

Runs from a checkout. Each part has its own time limit and writes DIR/<part>.txt as it goes, so a
failure in one does not lose another's results; the benchmarks also write DIR/bench.json.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"info": 60, "tests": 240, "bench": 240}


def _command(part: str, out: Path) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    return {
        "info": [sys.executable, "-m", "hico_kernels.info"],
        "tests": [*pytest, "tests", "-k", "cuda"],
        "bench": [*pytest, "bench", "--benchmark-only", f"--benchmark-json={out / 'bench.json'}"],
    }[part]


def run(part: str, out: Path) -> str:
    """Run one part and say in a line how it went."""
    start = time.perf_counter()
    with (out / f"{part}.txt").open("w") as log:
        try:
            code = subprocess.run(
                _command(part, out), cwd=ROOT, stdout=log, stderr=log, timeout=SECONDS[part]
            ).returncode
            outcome = "passed" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: stopped after {SECONDS[part]} s"
    return f"{part:<6} {time.perf_counter() - start:6.1f} s  {outcome}"


def main() -> int:
    """Run the parts that were asked for; 0 when all passed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="hico_kernels.testing.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", choices=SECONDS, action="append", help="this part (repeatable)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this torch sees none", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for part in args.only or SECONDS:
        lines.append(run(part, out))
        print(lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
