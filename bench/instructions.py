"""Instructions that every CPU kernel executes, as a gate against regressions.

python -m bench.instructions            compare with bench/instructions.json; exit 1 on a regression
python -m bench.instructions --write    count again and keep the figures (make instructions)

Times on a shared machine differ by far more than most regressions; instruction counts do not differ
at all. They are counted by valgrind's callgrind, inside the kernels' own module only, on the AVX2
path with one thread (valgrind 3.19 knows no AVX-512, whose paths are compiled from the same source
text). A count does not see cache misses, waiting and the library functions that a kernel calls.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hico_kernels import native

KEPT = Path(__file__).with_name("instructions.json")
ROOT = Path(__file__).parents[1]
PATH = "avx2"  # the best that valgrind knows
TOLERANCE = 0.01  # the same machine code counts the same; what is left is other torch's random data
SWITCH = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(const char *name) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS_AT(name); }
"""


def missing() -> str | None:
    """What counting needs and this machine lacks."""
    for tool in ("valgrind", "g++"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    if {"_C_cpu", "_host"} - native.loaded.keys():
        return "the CPU kernels are not built"
    if PATH not in native.loaded["_host"].cpu_paths():
        return f"this processor has no {PATH}"
    return None


def compiler() -> str:
    """The one that made the kernels' module, as it wrote itself into it."""
    found = re.search(rb"(?:GCC: |clang version )[^\0]+", module().read_bytes())
    return found[0].decode() if found else "unknown"


def module() -> Path:
    """The file of the CPU kernels."""
    return Path(native.loaded["_C_cpu"].__file__)


def count() -> dict[str, int]:
    """Name of a case -> instructions. Half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        switch, out = Path(folder, "switch.so"), Path(folder, "out")
        build = ["g++", "-x", "c", "-", "-O1", "-shared", "-fPIC", "-o", str(switch)]
        subprocess.run(build, input=SWITCH, text=True, check=True)
        options = ["--instr-atstart=no", "--compress-strings=no", "--compress-pos=no"]
        command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *options]
        command += [sys.executable, "-m", "bench.instruction_cases", str(switch), PATH]
        subprocess.run(command, cwd=ROOT, check=True)
        parts = sorted(Path(folder).glob("out.*"), key=lambda part: int(part.suffix[1:]))
        return dict(read(part.read_text(), str(module())) for part in parts)


def read(text: str, ours: str) -> tuple[str, int]:
    """Name of a dump of callgrind's, and the instructions in it that are of the object `ours`.

    Format: https://valgrind.org/docs/manual/cl-format.html. A line after "calls=" is the cost of
    what was called, and counted there.
    """
    name, total, inside, called = "", 0, False, False
    for line in text.splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.removeprefix("desc: Trigger: Client Request: ")
        elif line.startswith("ob="):
            inside = line[3:] == ours
        elif line.startswith("calls="):
            called = True
        elif line[:1].isdigit():
            if inside and not called:
                total += int(line.split()[1])
            called = False
    return name, total


def differences(kept: dict[str, int], found: dict[str, int]) -> tuple[list[str], list[str]]:
    """What is wrong with `found`, and what is only worth saying: a line each."""
    wrong, notes = [], []
    for name in sorted(kept.keys() | found.keys()):
        if name not in found or name not in kept:
            where = "kept but not counted" if name in kept else "counted but not kept"
            wrong.append(f"{name}: {where}")
            continue
        change = found[name] / kept[name] - 1
        line = f"{name}: {kept[name]:,} -> {found[name]:,} instructions ({change:+.1%})"
        if change > TOLERANCE:
            wrong.append(line)
        elif change < -TOLERANCE:
            notes.append(line)
    return wrong, notes


def write(found: dict[str, int]) -> None:
    """Keep the figures in the repository."""
    text = json.dumps({"compiler": compiler(), "path": PATH, "counts": found}, indent=1)
    KEPT.write_text(text + "\n")
    print(f"instructions: wrote {len(found)} counts to {KEPT.relative_to(ROOT)}")


def check() -> int:
    """Compare with the kept figures; 1 on a regression."""
    kept = json.loads(KEPT.read_text())
    if compiler() != kept["compiler"]:
        print(f"instructions: skipped, figures are of {kept['compiler']}, here is {compiler()}")
        return 0
    found = count()
    wrong, notes = differences(kept["counts"], found)
    for line in notes:
        print(f"instructions: fewer than kept: {line}")
    for line in wrong:
        print(f"instructions: FAILED {line}", file=sys.stderr)
    if wrong or notes:
        print("instructions: `make instructions` keeps the new counts")
    else:
        print(f"instructions: {len(found)} kernels count as kept")
    return int(bool(wrong))


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="bench.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the counts of this build")
    args = parser.parse_args()
    if reason := missing():
        print(f"instructions: skipped: {reason}")
        return int(args.write)
    if not args.write:
        return check()
    write(count())
    return 0


if __name__ == "__main__":
    sys.exit(main())
