"""As much of pytest-benchmark as bench/ uses, for machines that lack it and cannot fetch it:
``pytest bench -p hico_kernels.testing.plain_benchmark --benchmark-only --benchmark-json=FILE``.
"""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest


class Hooks:
    """Those that bench/conftest.py implements."""

    def pytest_benchmark_update_machine_info(self, config, machine_info):
        """Add to what the file says of the machine."""

    def pytest_benchmark_compare_machine_info(
        self, config, benchmarksession, machine_info, compared_benchmark
    ):
        """Comparing is pytest-benchmark's."""


class Benchmark:
    """The fixture: times what it is given by the clock of the test's marker."""

    disabled = False

    def __init__(self, timer):
        self._timer = timer
        self.name = self.fullname = self.group = None
        self.extra_info: dict = {}
        self.stats = None

    def pedantic(self, fn, *, rounds: int = 1, warmup_rounds: int = 0):
        """Call `fn` so often, and keep the times of the rounds."""
        for _ in range(warmup_rounds):
            fn()
        seconds = []
        for _ in range(rounds):
            start = self._timer()
            fn()
            seconds.append(self._timer() - start)
        found = SimpleNamespace(min=min(seconds), median=statistics.median(seconds))
        self.stats = SimpleNamespace(stats=found)


RUN = pytest.StashKey[list[Benchmark]]()


def pytest_addhooks(pluginmanager):  # noqa: D103
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser):  # noqa: D103
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark-json", type=Path, help="file of the results")
    group.addoption("--benchmark-only", action="store_true", help="what this always does")
    group.addoption("--benchmark-disable", action="store_true", help="not here")


def pytest_configure(config):  # noqa: D103
    config.addinivalue_line("markers", "benchmark: the timer of a benchmark")
    config.stash[RUN] = []


@pytest.fixture
def benchmark(request):
    """As pytest-benchmark's."""
    marker = request.node.get_closest_marker("benchmark")
    made = Benchmark(marker.kwargs["timer"])
    yield made
    if made.stats is not None:
        request.config.stash[RUN].append(made)


def pytest_sessionfinish(session):  # noqa: D103
    config = session.config
    if (file := config.getoption("benchmark_json")) is None:
        return
    machine: dict = {}
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
    lines = [
        {
            "name": x.name,
            "fullname": x.fullname,
            "group": x.group,
            "extra_info": x.extra_info,
            "stats": vars(x.stats.stats),
        }
        for x in config.stash[RUN]
    ]
    file.write_text(json.dumps({"machine_info": machine, "benchmarks": lines}, indent=1))
