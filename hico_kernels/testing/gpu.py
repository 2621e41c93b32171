"""Checks and measures the library on a CUDA device: ``python -m hico_kernels.testing.gpu --out
DIR``.

Runs from a checkout, installed or not, without network, in less than 9 minutes. Each part has its
own processes and time limit, so a failure in one does not lose another's results: DIR/gpu.json and
DIR/gpu.md (what gpu_table.py makes of it) are written after every part, DIR/gpu.log has all output.
What this machine lacks is left out, and said.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hico_kernels import ops
from hico_kernels.testing import gpu_table

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5  # seconds between asking a command to end and ending it
ALONE = 9 * 60 - 2 * GRACE  # seconds of a part that runs alone
ASKED_FOR = ("bench_patch", "bench_tome")  # whole models: too long to be among the others


@dataclass(frozen=True)
class Part:
    """Commands that run side by side, what they need, and how long they may take together."""

    seconds: int
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()  # modules


# Their kernels take Triton's compiler the longest: a process for each dtype, and one for the rest.
SLOW_TO_COMPILE = (
    "merge_tokens",
    "text_guided_scores",
    "ragged_attention",
    "ragged_attention_backward",
    "ragged_decode_attention",
)


def selections(operation: str) -> list[str]:
    """What pytest's -k gets for the tests of an operation on a GPU, in as many processes."""
    if operation not in SLOW_TO_COMPILE:
        return [f"cuda and {operation}-"]
    dtypes = ("cuda-f32", "cuda-bf16", "cuda-f16")  # how names of tests with a dtype end
    rest = f"cuda and {operation}- and not ({' or '.join(dtypes)})"
    return [*(f"{operation}- and {dtype}" for dtype in dtypes), rest]


def parts(out: Path) -> dict[str, Part]:
    """What there is to do, in order. Tests go side by side, since most of their time is Triton's
    compiler.
    """
    python = (sys.executable,)
    pytest = (*python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider")
    contracts = ("tests/test_contracts.py", "tests/test_gpu.py")
    drawn = ("test_triton.py", "test_triton_merge.py", "test_triton_select.py")
    others = (*drawn, "test_triton_attention.py")
    others = tuple(f"tests/{file}" for file in others if (ROOT / "tests" / file).exists())
    models = [
        (*pytest, "tests/test_gpu_models.py", "-k", which)
        for which in ("float64", "float32", "not float64 and not float32")
    ]
    plain = () if _here("pytest_benchmark") else ("-p", "hico_kernels.testing.plain_benchmark")
    bench = {"merge": 90, "select": 35, "attention": 40, "table": 60, "patch": ALONE, "tome": ALONE}
    return {
        "build": Part(
            80,
            ((*python, "setup.py", "-q", "build_ext", "--inplace"),),
            ("setuptools",),
        ),
        "info": Part(10, ((*python, "-m", "hico_kernels.info"),)),
        "limits": Part(
            25, ((*python, "-m", "hico_kernels.testing.gpu_limits", str(out / "limits.json")),)
        ),
        "tests": Part(
            150,
            (
                *((*pytest, *contracts, "-k", x) for name in ops.SCHEMAS for x in selections(name)),
                (*pytest, *others),
                *(models if _here("transformers") else []),
            ),
            ("pytest", "triton"),
        ),
        **{
            f"bench_{name}": Part(
                seconds,
                (
                    (
                        *pytest,
                        *plain,
                        *map(str, sorted((ROOT / "bench").glob(f"test_{name}*.py"))),
                        "--benchmark-only",
                        f"--benchmark-json={out / f'bench_{name}.json'}",
                    ),
                ),
                ("pytest",),
            )
            for name, seconds in bench.items()
        },
    }


def chosen(names: list[str] | None, out: Path) -> dict[str, Part]:
    """The parts of these names, or all that go together. One that runs alone has all of the time:
    the papers' tables at their real sizes and large batches take minutes.
    """
    every = parts(out)
    if names and len(names) == 1:
        return {names[0]: replace(every[names[0]], seconds=ALONE)}
    return {name: every[name] for name in names or every if names or name not in ASKED_FOR}


def missing(part: Part) -> list[str]:
    """Modules that a part needs and that are not here."""
    return [name for name in part.needs if not _here(name)]


def _here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(part: Part, log: Path) -> dict:
    """Run a part's commands together; what came of it."""
    if absent := missing(part):
        return {"outcome": "left out", "why": f"not installed: {', '.join(absent)}", "seconds": 0}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.symlink(ROOT / "model", Path(scratch, "hico_model"))  # as an installation would have it
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(ROOT), scratch, os.environ.get("PYTHONPATH")))
            )
        }
        running = [_start(c, Path(scratch, str(i)), env) for i, c in enumerate(part.commands)]
        outcomes = [_finish(process, start + part.seconds) for process in running]
        texts = [
            Path(scratch, str(i)).read_text(errors="replace") for i in range(len(part.commands))
        ]
    with log.open("a") as file:
        for command, outcome, text in zip(part.commands, outcomes, texts, strict=True):
            file.write(f"\n$ {' '.join(command)}\n{text}\n[{outcome}]\n")
    return {
        "outcome": next((x for x in outcomes if x != "passed"), "passed"),
        "seconds": round(time.monotonic() - start, 1),
        "commands": [
            {"command": " ".join(command[1:]), "outcome": outcome, **_said(text)}
            for command, outcome, text in zip(part.commands, outcomes, texts, strict=True)
        ],
    }


def _start(command: tuple[str, ...], output: Path, env: dict) -> subprocess.Popen:
    with output.open("w") as file:  # a session of its own: its children end with it
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )


def _finish(process: subprocess.Popen, deadline: float) -> str:
    try:
        code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped at the time limit"
    return "passed" if code == 0 else f"failed with exit code {code}"


def _said(text: str) -> dict:
    """Pytest's counts, failures and reasons for leaving out; the last lines where it broke off."""
    lines = text.splitlines()
    said = {"failures": [x for x in lines if re.match(r"(FAILED|ERROR) ", x)]}
    said["skipped"] = [x for x in lines if x.startswith("SKIPPED ")]
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1] if lines else "")
    said["counts"] = {name: int(number) for number, name in counts}
    if not counts:
        said["last_lines"] = lines[-5:]
    return {name: value for name, value in said.items() if value}


def _gathered(done: dict, out: Path) -> dict:
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "parts": done,
    }
    found = {name: out / f"{name}.json" for name in done}
    found = {name: json.loads(file.read_text()) for name, file in found.items() if file.exists()}
    if "limits" in found:
        report["limits"] = found.pop("limits")
    report["bench"] = [_compact(run) for run in found.values()]
    return report


def _compact(run: dict) -> dict:
    """What bench/results.py keeps."""
    from bench import results  # of the checkout

    return results.compact(run)


def work(todo: dict[str, Part], out: Path) -> int:
    """Run the parts one after the other and write what is known after each; 0 when none failed."""
    out.mkdir(parents=True, exist_ok=True)
    log, done = out / "gpu.log", {}
    log.write_text("")
    for name, part in todo.items():
        done[name] = run(part, log)
        line = f"{name:<7}{done[name]['seconds']:7.1f} s  {done[name]['outcome']}"
        print(line, done[name].get("why", ""), flush=True)
        report = _gathered(done, out)
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu.md").write_text(gpu_table.markdown(report))
    return int(any(x["outcome"] not in ("passed", "left out") for x in done.values()))


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for; 0 when none failed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="hico_kernels.testing.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    names = list(parts(Path()))
    parser.add_argument("--only", choices=names, action="append", help="this part (repeatable)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this torch sees none", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    return work(chosen(args.only, args.out.resolve()), args.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
