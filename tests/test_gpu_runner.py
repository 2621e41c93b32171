"""make gpu without a GPU: no part loses another's results, limits hold, the report is whole."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from hico_kernels import ops
from hico_kernels.testing import gpu, gpu_table

PYTEST = """
tests/test_x.py .F
SKIPPED [2] tests/test_x.py:9: needs two CUDA devices
FAILED tests/test_x.py::test_y[merge_tokens-triton-cuda] - AssertionError
1 failed, 340 passed, 2 skipped in 3.21s
"""


def python(source, seconds=20, copies=1, needs=()):
    return gpu.Part(seconds, ((sys.executable, "-c", source),) * copies, needs)


def work(tmp_path, **parts):
    code = gpu.work(parts, tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    return code, report["parts"], (tmp_path / "gpu.md").read_text()


def test_a_failure_does_not_lose_the_results_of_others(tmp_path):
    code, parts, page = work(
        tmp_path,
        first=python("print('1 passed in 1s')"),
        second=python("import sys; print('no such thing'); sys.exit(3)"),
        third=python("print('2 passed in 1s')"),
    )
    assert code == 1
    outcomes = [part["outcome"] for part in parts.values()]
    assert outcomes == ["passed", "failed with exit code 3", "passed"]
    assert parts["second"]["commands"][0]["last_lines"] == ["no such thing"]
    assert "| third | 0 | passed | 2 passed |" in page
    assert "### second: failed with exit code 3" in page
    assert "no such thing" in (tmp_path / "gpu.log").read_text()


def test_what_hangs_is_asked_to_end_and_then_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    child = tmp_path / "child"
    hang = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *_: print("asked to end", flush=True))
code = "import time; time.sleep(4); open({str(child)!r}, 'w')"
subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(2, signal.SIG_IGN); " + code])
while True: time.sleep(0.1)
"""
    start = time.monotonic()
    code, parts, _ = work(tmp_path, hanging=python(hang, seconds=2), after=python(""))
    assert code == 1
    assert parts["hanging"]["outcome"] == "stopped at the time limit"
    assert "asked to end" in (tmp_path / "gpu.log").read_text()
    assert parts["after"]["outcome"] == "passed"
    time.sleep(max(0, 7 - (time.monotonic() - start)))
    assert not child.exists()


def test_commands_of_a_part_run_side_by_side(tmp_path):
    _, parts, _ = work(tmp_path, pair=python("import time; time.sleep(2)", copies=4))
    assert parts["pair"]["outcome"] == "passed"
    assert 2 <= parts["pair"]["seconds"] < 6


def test_what_is_not_installed_is_left_out_and_said(tmp_path):
    code, parts, page = work(tmp_path, lacking=python("", needs=("json", "no_such_module")))
    assert code == 0
    assert parts["lacking"]["why"] == "not installed: no_such_module"
    assert "| lacking | 0 | left out | not installed: no_such_module |" in page


def test_pytest_is_read(tmp_path):
    _, parts, page = work(tmp_path, tests=python(f"print({PYTEST!r}.strip()); raise SystemExit(1)"))
    (command,) = parts["tests"]["commands"]
    assert command["counts"] == {"failed": 1, "passed": 340, "skipped": 2}
    assert len(command["failures"]) == 1
    assert "test_y[merge_tokens-triton-cuda]" in page
    assert "needs two CUDA devices" in page


def test_commands_find_the_checkout_and_the_model(tmp_path):
    source = "import hico_kernels, hico_model, bench; print(hico_kernels.__file__)"
    _, parts, _ = work(tmp_path, imports=python(source))
    assert parts["imports"]["outcome"] == "passed", (tmp_path / "gpu.log").read_text()
    assert str(gpu.ROOT / "hico_kernels") in (tmp_path / "gpu.log").read_text()


def test_all_parts_together_end_within_nine_minutes():
    parts = gpu.chosen(None, Path("out"))
    assert parts.keys() == gpu.parts(Path("out")).keys() - {*gpu.ASKED_FOR}
    assert sum(part.seconds + gpu.GRACE for part in parts.values()) < 9 * 60


@pytest.mark.parametrize("name", ["bench_table", "bench_merge", "bench_patch"])
def test_a_part_has_all_of_the_time_when_it_runs_alone(name):
    alone, among = (gpu.chosen(x, Path("out")) for x in ([name], ["info", name]))
    assert list(among) == ["info", name]
    assert among[name] == gpu.parts(Path("out"))[name]
    assert 500 < alone[name].seconds + gpu.GRACE < 9 * 60
    assert alone[name].commands == among[name].commands


def test_every_operation_and_benchmark_has_its_command():
    parts = gpu.parts(Path("out"))
    words = [w for part in parts.values() for command in part.commands for w in command]
    for word in words:
        if word.endswith(".py"):
            assert (gpu.ROOT / word).exists(), word
    for name in ("merge", "select", "attention"):
        assert str(gpu.ROOT / f"bench/test_{name}.py") in words


def test_every_test_of_an_operation_is_in_one_process():
    commands = gpu.parts(Path("out"))["tests"].commands
    contracts = [c for c in commands if "tests/test_contracts.py" in c]
    wanted = [Expression.compile(c[c.index("-k") + 1]) for c in contracts]
    for operation in ops.SCHEMAS:
        names = [f"{operation}-mixed-triton-cuda-{dtype}" for dtype in ("f32", "bf16", "f16")]
        names += [f"{operation}-mixed-reference-cuda-f64", f"{operation}-triton-cuda"]
        for name in names:
            chosen = [e.evaluate(lambda part, name=name: part in name) for e in wanted]
            assert sum(chosen) == 1, name
        on_cpu = f"{operation}-mixed-triton-cpu-f32"
        assert not any(e.evaluate(lambda part, name=on_cpu: part in name) for e in wanted)
    assert set(gpu.SLOW_TO_COMPILE) <= set(ops.SCHEMAS)
    files = {part for command in commands for part in command if part.startswith("tests/")}
    on_device = {f"tests/{file.name}" for file in (gpu.ROOT / "tests").glob("test_gpu*.py")}
    assert on_device - {"tests/test_gpu_runner.py"} <= files


def test_the_page_shows_limits_and_operations():
    ops_found = [
        {
            "name": "merge_tokens-umt224_clip-bf16-hico",
            "median_s": 2.5e-5,
            "percent_of_floor": 26.0,
            "times_as_fast": {"eager": 9.5},
        }
    ]
    page = gpu_table.markdown(
        {
            "device": "a device",
            "torch": "2.11",
            "date": "2026-01-01",
            "parts": {},
            "limits": {"copy, GB/s": 4000.0},
            "bench": [{"ops": {"results": ops_found}}, {}],
        }
    )
    assert "| copy, GB/s | 4000.0 |" in page
    assert "| merge_tokens-umt224_clip-bf16-hico | 25.0 | 26.0 | eager 9.50x |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_device_nothing_is_run(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out"), "--only", "info"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", "x", "--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_a_benchmark_that_was_interrupted_is_not_in_the_report(tmp_path):
    ended = {"percent_of_floor": 50.0}
    stats = {"min": 1e-6, "median": 2e-6}
    run = {
        "machine_info": {"device": "a device", "type": "cuda", "torch": "2.11", "limits": {}},
        "benchmarks": [
            {"name": "gather-b-f32-hico", "extra_info": ended, "stats": stats},
            {"name": "gather-c-f32-hico", "extra_info": {}, "stats": stats},
        ],
    }
    (tmp_path / "bench_x.json").write_text(json.dumps(run))
    _, _, page = work(tmp_path, bench_x=python("", seconds=5))
    assert "| gather-b-f32-hico | 2.0 | 50.0 |" in page
    assert "gather-c" not in page


def test_benchmarks_are_timed_where_pytest_benchmark_is_missing(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import itertools, pytest\n"
        "clock = itertools.accumulate(itertools.count()).__next__  # 0 1 3 6 10 15: rounds grow\n"
        "def pytest_collection_modifyitems(items):\n"
        "    for item in items: item.add_marker(pytest.mark.benchmark(timer=clock))\n"
        "def pytest_benchmark_update_machine_info(config, machine_info):\n"
        "    machine_info['device'] = 'a device'\n"
    )
    (tmp_path / "test_one.py").write_text(
        "def test_one(benchmark):\n"
        "    calls = []\n"
        "    benchmark.name = 'gather-a-f32-hico'\n"
        "    benchmark.pedantic(lambda: calls.append(1), rounds=3, warmup_rounds=2)\n"
        "    assert len(calls) == 5 and not benchmark.disabled\n"
        "    benchmark.extra_info['median'] = benchmark.stats.stats.median\n"
        "def test_that_times_nothing(benchmark):\n"
        "    pass\n"
    )
    plugin = ("-p", "no:benchmark", "-p", "hico_kernels.testing.plain_benchmark")
    command = (sys.executable, "-m", "pytest", "-q", *plugin, str(tmp_path), "--benchmark-only")
    command += (f"--rootdir={tmp_path}", f"--benchmark-json={tmp_path / 'found.json'}")
    _, parts, _ = work(tmp_path, tests=gpu.Part(60, (command,)))
    assert parts["tests"]["commands"][0].get("counts") == {"passed": 2}, (
        tmp_path / "gpu.log"
    ).read_text()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine_info"] == {"device": "a device"}
    (line,) = found["benchmarks"]
    assert line["stats"] == {"min": 1, "median": 3}
    assert line["extra_info"] == {"median": 3}
