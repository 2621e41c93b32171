"""Comparing two commits: turns, pairs, and when a difference is called one."""

import json
import os
import random
import subprocess
import sys
import threading

import pytest

from bench import compare
from bench.conftest import Turns


def test_the_interval_holds_the_median_as_often_as_it_says():
    random.seed(0)
    hits = 0
    for _ in range(2000):
        low, high = compare.interval([random.gauss(1, 0.1) for _ in range(30)])
        hits += low <= 1 <= high
    assert 0.985 < hits / 2000 < 0.997


def test_a_difference_is_only_called_one_outside_of_the_interval():
    noise = [1 + 0.01 * (i % 5) for i in range(30)]
    base = {"a-s-f32-hico": noise, "b-s-f32-hico": [2 * x for x in noise], "old-s-f32-hico": noise}
    this = {
        "a-s-f32-hico": noise[::-1],
        "b-s-f32-hico": noise,
        "new-s-f32-hico": noise,
    }
    lines = compare.table(base, this)
    assert len(lines) == 4
    assert "no difference seen" in lines[1]
    assert lines[2].split()[-1] == "faster"
    assert "2.000" in lines[2]
    assert lines[3].endswith("not in the base")
    assert compare.table(this, base)[2].split()[-1] == "slower"


def test_a_run_that_wrote_nothing_compares_with_nothing(tmp_path):
    file = tmp_path / "run.json"
    assert compare.seconds(file) == {}
    file.touch()
    assert compare.seconds(file) == {}
    file.write_text(json.dumps({"benchmarks": [{"name": "a", "stats": {"data": [1.0, 2.0]}}]}))
    assert compare.seconds(file) == {"a": [1.0, 2.0]}


def test_rounds_take_turns_and_nobody_waits_for_one_that_has_ended():
    (read_a, write_a), (read_b, write_b) = os.pipe(), os.pipe()
    os.write(write_a, b".")
    happened = []

    def run(name, descriptors, rounds):
        turns = Turns(descriptors)
        for i in range(rounds):
            with turns:
                happened.append((name, i))
        os.close(int(descriptors.split(",")[1]))

    threads = [
        threading.Thread(target=run, args=("a", f"{read_a},{write_b}", 3)),
        threading.Thread(target=run, args=("b", f"{read_b},{write_a}", 5)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert happened[:6] == [(name, i) for i in range(3) for name in "ab"]
    assert happened[6:] == [("b", 3), ("b", 4)]


@pytest.mark.parametrize("base", ["no-such-commit", "--help"])
def test_a_base_that_is_no_commit_ends_in_a_line(base, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.compare", "--", base])
    assert compare.main() == 1
    assert "failed" in capsys.readouterr().err


def test_a_benchmark_takes_its_turn():
    (read, theirs), (ours, write) = os.pipe(), os.pipe()
    os.write(theirs, b".")
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_select.py", "--benchmark-disable"]
    command += ["-k", "uniform_indices and 256frames and hico", f"--turns={read},{write}"]
    done = subprocess.run(command, cwd=compare.ROOT, pass_fds=(read, write), capture_output=True)
    assert done.returncode == 0, done.stdout
    os.close(write)
    assert os.read(ours, 10) == b"."
