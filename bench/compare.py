"""Compares this working tree with another commit, on one machine and at one time.

python -m bench.compare BASE [-k EXPRESSION] [--rounds N]

BASE is built in a git worktree below build/base. The benchmarks of this tree then run in two
processes, each with one of the two libraries, that take turns round by round: what else happens on
the machine happens to both. Printed are, for each benchmark, the medians, how many times as fast
this tree is (the median of base / this over the pairs of rounds), and its 99 % confidence interval.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench.results import OURS

ROOT = Path(__file__).parents[1]
CONFIDENCE = 0.99


def build(base: str) -> Path:
    """The worktree of the commit, built, with the benchmarks of this tree. Raises
    CalledProcessError when there is no such commit or it does not build."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return run.stdout.strip()

    tree = ROOT / "build" / "base" / git("rev-parse", "--short", "--verify", f"{base}^{{commit}}")
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), tree.name)
    print(f"building {base} in {tree.relative_to(ROOT)} (minutes, once)", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with tree.with_suffix(".txt").open("w") as log:
        subprocess.run(command, cwd=tree, check=True, stdout=log, stderr=log)
    shutil.rmtree(tree / "bench")
    shutil.copytree(ROOT / "bench", tree / "bench")
    return tree


def alternate(trees: list[Path], expression: str, rounds: int) -> list[dict[str, list[float]]]:
    """Run the benchmarks in both trees in turn: name -> seconds of every round, for each tree."""
    pipes = [os.pipe(), os.pipe()]
    os.write(pipes[0][1], b".")  # the first one begins
    files = [ROOT / "build" / f"compare-{i}.json" for i in range(2)]
    runs = []
    for i, (tree, file) in enumerate(zip(trees, files, strict=True)):
        file.unlink(missing_ok=True)
        turns = pipes[i][0], pipes[1 - i][1]
        command = [sys.executable, "-m", "pytest", "-q", "bench", "--ignore-glob=*test_table*"]
        command += [
            "-k",
            f"({' or '.join(OURS)}) and ({expression})",
            "--benchmark-only",
            f"--rounds={rounds}",
        ]
        command += [f"--benchmark-json={file}", f"--turns={turns[0]},{turns[1]}"]
        log = file.with_suffix(".txt").open("w")
        runs.append(subprocess.Popen(command, cwd=tree, pass_fds=turns, stdout=log, stderr=log))
    for end in (*pipes[0], *pipes[1]):
        os.close(end)  # so that who is left alone does not wait
    for run, file in zip(runs, files, strict=True):
        if run.wait():
            print(f"not all ran: see {file.with_suffix('.txt').relative_to(ROOT)}", file=sys.stderr)
    return [seconds(file) for file in files]


def seconds(file: Path) -> dict[str, list[float]]:
    """Name -> seconds of every round, of pytest-benchmark's JSON; nothing where there is none."""
    if not file.exists() or not file.stat().st_size:
        return {}
    found = json.loads(file.read_text())["benchmarks"]
    return {line["name"]: line["stats"]["data"] for line in found}


def interval(values: list[float]) -> tuple[float, float]:
    """A confidence interval of the median, from order statistics: nothing is assumed of the
    distribution."""
    ordered, n = sorted(values), len(values)
    below, outside = 0, 0.0
    while below < n // 2:
        outside += math.comb(n, below) / 2**n
        if 2 * outside > 1 - CONFIDENCE:
            break
        below += 1
    below = max(below - 1, 0)
    return ordered[below], ordered[n - 1 - below]


def table(base: dict[str, list[float]], this: dict[str, list[float]]) -> list[str]:
    """A line for each benchmark that both have."""
    width = max(map(len, this), default=0)
    lines = [f"{'':{width}}  {'base':>10}  {'this':>10}  {'times as fast':>13}  99 % confidence"]
    for name in (name for name in this if name in base):
        ratios = [a / b for a, b in zip(base[name], this[name], strict=False)]
        low, high = interval(ratios)
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference seen"
        times = [f"{median(x[name]) * 1e6:>7.0f} us" for x in (base, this)]
        lines.append(
            f"{name:{width}}  {times[0]}  {times[1]}  {median(ratios):>13.3f}"
            f"  {low:.3f} to {high:.3f}  {verdict}"
        )
    missing = [name for name in this if name not in base]
    return lines + [f"{name:{width}}  not in the base" for name in missing]


def main() -> int:
    """See the module's text; 1 when nothing could be compared."""
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a commit, as main or HEAD~3")
    parser.add_argument("-k", dest="expression", default="", help="which, as for pytest")
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    args = parser.parse_args()
    if args.rounds < 8:
        parser.error(f"--rounds must be at least 8 for the interval, got {args.rounds}")
    try:
        tree = build(args.base)
    except subprocess.CalledProcessError as e:
        command = " ".join(map(str, e.cmd))
        print(f"bench.compare: {command} failed; a build's log is in build/base", file=sys.stderr)
        return 1
    base, this = alternate([tree, ROOT], args.expression or " or ".join(OURS), args.rounds)
    print("\n".join(table(base, this)))
    return int(not base.keys() & this.keys())


if __name__ == "__main__":
    sys.exit(main())
