"""pytest-benchmark in seconds of device time.

pytest bench --benchmark-only            measure here
pytest bench --benchmark-disable         run every benchmark once, untimed, so that none can rot

A benchmark is called op-shape-dtype-impl, on CPUs with -tN for N threads: a test sets the first
three as `benchmark.group` and has the last as its parameter `impl`. Names stay, since commits are
compared by them.
"""

import contextlib
import os
import time

import pytest
import torch

from bench import limits, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class DeviceClock:
    """A clock that the measured function moves, so that every statistic, file and comparison of
    pytest-benchmark is in seconds of device time."""

    __name__ = "device_clock"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = DeviceClock()


class Turns:
    """Rounds in turn with another process: a byte is read before each and one written after it."""

    def __init__(self, descriptors: str):
        self._read, self._write = map(int, descriptors.split(","))

    def __enter__(self):
        os.read(self._read, 1)  # b"" when the other one has ended: then nobody is waited for

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write, b".")


def pytest_addoption(parser):
    group = parser.getgroup("hico_kernels")
    group.addoption("--rounds", type=int, help="of every benchmark of an operation")
    group.addoption("--turns", metavar="READ,WRITE", help="file descriptors: see bench/compare.py")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _cuda_seconds(fn) -> float:
    limits.flush_l2()
    torch.cuda._sleep(1_000_000)  # the stream is busy while the host enqueues: no launch gap
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_seconds(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


device_seconds = _cuda_seconds if DEVICE == "cuda" else _host_seconds


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_generate_tests(metafunc):
    if "threads" in metafunc.fixturenames:
        once = DEVICE == "cuda" or metafunc.config.getoption("benchmark_disable")
        counts = [1] if once else limits.THREADS
        metafunc.parametrize("threads", counts, ids="threads{}".format, indirect=True)


@pytest.fixture
def threads(request):
    """How many threads the CPU works with."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark, request):
    """Time `fn` and note its least time on this machine: what it must move and compute."""
    option = request.config.getoption
    turns = Turns(option("turns")) if option("turns") else contextlib.nullcontext()

    def run(fn, *, dtype: torch.dtype, bytes_: int = 0, flops: int = 0, rounds: int = 10):
        def once():
            with turns:
                CLOCK.now += device_seconds(fn)

        _name(benchmark, request.node.callspec.params["impl"])
        benchmark.pedantic(once, rounds=option("rounds") or rounds, warmup_rounds=2)
        if benchmark.disabled or option("turns"):  # no floor of a machine that is shared
            return
        floor = limits.floor_seconds(DEVICE, dtype, bytes_, flops)
        median = benchmark.stats.stats.median
        assert floor <= 1.05 * median, (
            f"faster than the limit ({floor:.2e} s, took {median:.2e} s): the count is wrong"
        )
        benchmark.extra_info.update(
            bytes=bytes_, flops=flops, floor_us=floor * 1e6, percent_of_floor=100 * floor / median
        )

    return run


@pytest.fixture
def timed(request) -> bool:
    """Whether times are kept, or the code is only run."""
    return not request.config.getoption("benchmark_disable")


@pytest.fixture
def observe(benchmark, request, timed):
    """Run `fn` once, with all threads when timed, and keep what it says; "seconds" is the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(limits.THREADS[-1] if timed else 1)

    def run(fn) -> dict:
        found = {}

        def once():
            found.update(fn())
            CLOCK.now += found.pop("seconds")

        _name(benchmark, request.node.callspec.params["impl"])
        benchmark.pedantic(once, rounds=1)
        benchmark.extra_info["observed"] = found
        return found

    yield run
    torch.set_num_threads(before)


def _name(benchmark, impl: str) -> None:
    """Call it by operation, shape and dtype (its group so far), and by implementation."""
    threads = torch.get_num_threads() if DEVICE == "cpu" else None
    name = results.Name.parse(f"{benchmark.group}-{impl}")._replace(threads=threads)
    benchmark.name = benchmark.fullname = str(name)
    benchmark.group = name.problem


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(limits.machine(DEVICE))


def pytest_benchmark_compare_machine_info(
    config, benchmarksession, machine_info, compared_benchmark
):
    theirs = compared_benchmark["machine_info"].get("device")
    if theirs != machine_info["device"]:
        raise pytest.UsageError(
            f"comparing {machine_info['device']} with {theirs}: pick a result of the same device"
        )
