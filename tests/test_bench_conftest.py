"""What all benchmarks share: names, and what is compared."""

from types import SimpleNamespace

import pytest

from bench import conftest


def test_a_benchmark_is_called_by_problem_implementation_and_threads(monkeypatch):
    benchmark = SimpleNamespace(group="merge-clip_x16-f32")
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    conftest._name(benchmark, "eager")  # tests run with one thread
    assert benchmark.name == benchmark.fullname == "merge-clip_x16-f32-eager-t1"
    assert benchmark.group == "merge-clip_x16-f32-t1"
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    conftest._name(benchmark := SimpleNamespace(group="merge-clip-f32"), "hico")
    assert (benchmark.name, benchmark.group) == ("merge-clip-f32-hico", "merge-clip-f32")
    with pytest.raises(ValueError, match="op-shape-dtype-impl"):
        conftest._name(SimpleNamespace(group="merge"), "hico")


def test_results_of_another_device_are_refused():
    here, there = {"device": "A"}, {"machine_info": {"device": "B"}}
    conftest.pytest_benchmark_compare_machine_info(None, None, here, {"machine_info": here})
    with pytest.raises(pytest.UsageError, match="comparing A with B"):
        conftest.pytest_benchmark_compare_machine_info(None, None, here, there)
