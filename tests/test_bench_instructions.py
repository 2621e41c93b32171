"""The instruction gate: what it reads from callgrind, and when it fails. Counting itself is
`make check-instructions`.
"""

import json
import shutil
import subprocess

import pytest

from bench import instruction_cases, instructions
from hico_kernels import dispatch, native
from hico_kernels.merge import cpu as merge_cpu
from hico_kernels.select import cpu as select_cpu

DUMP = """\
# callgrind format
desc: Trigger: Client Request: merge-f32

events: Ir
summary: 0

ob=/usr/lib/python
fl=eval.c
fn=eval
10 1000
cob=/there/_C_cpu.so
cfn=merge
calls=1 20
10 777

ob=/there/_C_cpu.so
fl=merge.cpp
fn=merge
20 5
21 6
cob=/usr/lib/libc.so
cfn=memcpy
calls=2 300
21 400
22 7

fn=product
30 100

ob=/usr/lib/libc.so
fn=memcpy
300 400
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A file of kept figures, and a count that finds what the test puts in its place."""
    file = tmp_path / "instructions.json"
    monkeypatch.setattr(instructions, "KEPT", file)
    monkeypatch.setattr(instructions, "missing", lambda: None)
    monkeypatch.setattr(instructions, "compiler", lambda: "GCC: 12")
    monkeypatch.setattr("sys.argv", ["bench.instructions"])

    def put(counts, found, compiler="GCC: 12"):
        file.write_text(json.dumps({"compiler": compiler, "path": "avx2", "counts": counts}))
        monkeypatch.setattr(instructions, "count", lambda: found)

    return put


def test_what_is_counted_are_the_modules_own_instructions():
    assert instructions.read(DUMP, "/there/_C_cpu.so") == ("merge-f32", 5 + 6 + 7 + 100)


@pytest.mark.parametrize(
    ("found", "code", "says"),
    [
        ({"a": 1000, "b": 1009}, 0, "2 kernels count as kept"),
        ({"a": 1000, "b": 1020}, 1, "FAILED b: 1,000 -> 1,020 instructions (+2.0%)"),
        ({"a": 900, "b": 1000}, 0, "fewer than kept: a: 1,000 -> 900 instructions (-10.0%)"),
        ({"a": 1000}, 1, "FAILED b: kept but not counted"),
        ({"a": 1000, "b": 1000, "c": 1}, 1, "FAILED c: counted but not kept"),
    ],
    ids=["within", "regression", "improvement", "lost", "new"],
)
def test_the_gate(kept, capsys, found, code, says):
    kept({"a": 1000, "b": 1000}, found)
    assert instructions.main() == code
    out = capsys.readouterr()
    assert says in out.out + out.err


def test_another_compiler_is_said_and_skipped(kept, capsys):
    kept({"a": 1000}, {"a": 2000}, compiler="GCC: 13")
    assert instructions.main() == 0
    assert "skipped, figures are of GCC: 13, here is GCC: 12" in capsys.readouterr().out


def test_a_processor_without_the_path_is_said_and_skipped(monkeypatch, capsys):
    host = type("host", (), {"cpu_paths": staticmethod(lambda: ["baseline"])})
    monkeypatch.setattr(instructions.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(native, "loaded", {"_C_cpu": None, "_host": host})
    monkeypatch.setattr("sys.argv", ["bench.instructions"])
    assert instructions.main() == 0
    assert capsys.readouterr().out == "instructions: skipped: this processor has no avx2\n"


def test_without_valgrind_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda tool: None)
    monkeypatch.setattr("sys.argv", ["bench.instructions"])
    assert instructions.main() == 0
    assert capsys.readouterr().out == "instructions: skipped: there is no valgrind here\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_ci_compares_and_make_instructions_writes():
    root = instructions.ROOT
    assert "make check-instructions" in (root / ".ci" / "run").read_text()
    for target, last in (
        ("instructions", "bench.instructions --write"),
        ("check-instructions", "bench.instructions"),
    ):
        command = ["make", "--dry-run", "--no-print-directory", target]
        said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert said.stdout.splitlines()[-1].endswith(f"python -m {last}")
        assert said.stderr == ""


@pytest.mark.skipif("_C_cpu" not in native.loaded, reason="no CPU kernels here")
def test_every_cpu_kernel_is_counted_and_kept():
    names = instruction_cases.cases()
    assert list(json.loads(instructions.KEPT.read_text())["counts"]) == list(names)
    counted = {name.split("-")[0] for name in names}
    composed = [name for module in (merge_cpu, select_cpu) for name in vars(module)]
    made_of_others = {name.removesuffix("_cpu") for name in composed if name.endswith("_cpu")}
    assert counted == {op for op, impl in dispatch._DTYPES if impl == "cpu"} - made_of_others
    for run in names.values():
        run()


@pytest.mark.skipif("_C_cpu" not in native.loaded, reason="no CPU kernels here")
def test_the_compiler_is_read_from_the_module():
    assert instructions.compiler() != "unknown"
