"""What is kept of a benchmark run."""

import json

import pytest

from bench import results
from bench.results import Name


def line(name, median, percent=50.0):
    return {
        "name": name,
        "stats": {"min": median / 2, "median": median},
        "extra_info": {"percent_of_floor": percent},
    }


def run(*lines, device="Some CPU, 2 CPUs"):
    machine = {"device": device, "type": "cpu", "torch": "2.13.0", "limits": {"threads": [1, 2]}}
    return {"machine_info": {**machine, "node": "my-host"}, "benchmarks": list(lines)}


OPS = run(
    line("merge-clip-f32-hico-t1", 0.00212345678),
    line("merge-clip-f32-eager-t1", 0.004),
    line("merge-clip-f32-compiled-t1", 0.001),
    line("merge-clip-f32-packed-t1", 0.0001),
    line("merge-clip-f32-hico-t2", 0.001, percent=0.0),
    line("merge-clip-bf16-eager-t1", 0.5),
)
FAILED = line("merge-clip-bf16-hico-t1", 0.1)
FAILED["extra_info"] = {}
OPS["benchmarks"].append(FAILED)


def test_names_are_read_as_they_are_written():
    name = Name("merge", "clip_x16", "f32", "hico", 2)
    assert str(name) == "merge-clip_x16-f32-hico-t2"
    assert Name.parse(str(name)) == name
    assert name.problem == "merge-clip_x16-f32-t2"
    assert name._replace(threads=None).problem == "merge-clip_x16-f32"


@pytest.mark.parametrize("text", ["merge", "merge-clip-f32", "a-b-c-d-t1-e", "a--c-d", ""])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="op-shape-dtype-impl"):
        Name.parse(text)


def test_a_run_becomes_one_small_file(tmp_path):
    file, history = results.write(OPS, tmp_path)
    assert file == tmp_path / "some-cpu-2-cpus" / "ops.json"
    kept = json.loads(file.read_text())
    assert kept["device"] == "Some CPU, 2 CPUs"
    assert "my-host" not in file.read_text()
    assert kept["results"][0] == {
        "name": "merge-clip-f32-hico-t1",
        "min_s": 0.001062,
        "median_s": 0.002123,
        "percent_of_floor": 50.0,
        "times_as_fast": {"eager": 1.884, "compiled": 0.471},
    }
    assert kept["results"][4] == {
        "name": "merge-clip-f32-hico-t2",
        "min_s": 0.0005,
        "median_s": 0.001,
        "times_as_fast": {},
    }
    assert "times_as_fast" not in kept["results"][5]
    assert len(kept["results"]) == 6  # not the one that failed
    medians = {"merge-clip-f32-hico-t1": 0.002123, "merge-clip-f32-hico-t2": 0.001}
    assert json.loads(history.read_text())["results"][0]["median_s"] == medians


def test_the_history_has_a_run_for_each_commit(tmp_path, monkeypatch):
    for commit in ("aaa", "bbb", "bbb"):
        monkeypatch.setattr(results, "commit", lambda commit=commit: commit)
        _, history = results.write(OPS, tmp_path)
    assert [x["commit"] for x in json.loads(history.read_text())["results"]] == ["aaa", "bbb"]
    assert json.loads(history.with_name("ops.json").read_text())["commit"] == "bbb"


def test_the_benchmarks_of_make_gpu_become_one_file_of_each_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "")
    one = line("merge-clip-f32-hico", 0.1), line("merge-clip-f32-eager", 0.3)
    table = line("first_token-64frames-bf16-longva", 1.0)
    table["extra_info"] = {"observed": {"frames": 64}}
    runs = [run(*one), run(line("score-clip-f32-hico", 0.2)), run(table)]
    report = {"device": "Some GPU", "bench": [results.compact(x) for x in runs]}
    monkeypatch.setattr(results, "commit", lambda: "abc")
    results.write(report, tmp_path)
    (ops,), (tables,) = (results.load(kind, tmp_path) for kind in ("ops", "tables"))
    names = [x["name"] for x in ops["results"]]
    assert names == ["merge-clip-f32-hico", "merge-clip-f32-eager", "score-clip-f32-hico"]
    assert ops["results"][0]["times_as_fast"] == {"eager": 3.0}
    assert tables["results"] == [{"name": "first_token-64frames-bf16-longva", "frames": 64}]
    assert ops["commit"] == tables["commit"] == "abc"


def test_results_of_gpus_are_loaded_first(tmp_path):
    results.write(OPS, tmp_path)
    gpu = run(line("merge-clip-f32-hico", 0.1), device="Some GPU")
    gpu["machine_info"]["type"] = "cuda"
    results.write(gpu, tmp_path)
    assert [x["device"] for x in results.load("ops", tmp_path)] == ["Some GPU", "Some CPU, 2 CPUs"]
    assert results.load("tables", tmp_path) == []


def test_kept_results_are_of_committed_code_and_have_names_that_are_read():
    for kept in results.load("ops"):
        assert not kept["commit"].endswith("+")
        for entry in kept["results"]:
            assert str(Name.parse(entry["name"])) == entry["name"]


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() == ""
    monkeypatch.setattr(results.shutil, "which", lambda tool: None)
    monkeypatch.setattr(results.subprocess, "run", None)
    assert results.commit() == ""


def test_the_device_is_named_without_its_host():
    import platform

    name = results.device_name("cpu")
    assert name.endswith(" CPUs")
    assert platform.node() not in name
