"""What a CUDA device can do: ``python -m hico_kernels.testing.gpu_limits FILE.json``, from a
checkout.

Bandwidth and matrix rates are those that benchmarks take for their floors (bench/limits.py); the
cost of a launch tells how many of them an operation can afford.
"""

import json
import sys
import time
from pathlib import Path

import torch

from bench import limits
from hico_kernels import uniform_indices, why_not

LAUNCHES = 1000


def _seconds(fn, repeats: int) -> float:
    """Device time of one call, the least of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _cached_copy() -> float:
    """Bytes per second, read plus written, of copies within 32 MiB, which an L2 can hold."""
    x = torch.rand(4 << 20, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (_seconds(lambda: [y.copy_(x) for _ in range(20)], 20) / 20)


def _in_a_graph() -> float:
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            x.add_(1)
    graph.replay()
    return _seconds(graph.replay, 5) / LAUNCHES


def _from_the_host(fn) -> float:
    fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        fn()
    seconds = (time.perf_counter() - start) / LAUNCHES
    torch.cuda.synchronize()
    return seconds


def measure() -> dict[str, float]:
    """Every limit by its name and unit."""
    x = torch.zeros(1, device="cuda")
    found = {
        "copy, GB/s": limits.bandwidth("cuda", 1) / 1e9,
        "copy within L2, GB/s": _cached_copy() / 1e9,
        "launch in a graph, us": _in_a_graph() * 1e6,
        "launch by torch, us of the host": _from_the_host(lambda: x.add_(1)) * 1e6,
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found[f"product in {name}, TFLOP/s"] = limits.arithmetic_rate("cuda", dtype, 1) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = True
    limits.arithmetic_rate.cache_clear()
    found["product in tf32, TFLOP/s"] = limits.arithmetic_rate("cuda", torch.float32, 1) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    if why_not("uniform_indices", "triton", device="cuda") is None:

        def triton():
            return uniform_indices(9, 3, device="cuda", impl="triton")

        found["operation of one Triton launch, us of the host"] = _from_the_host(triton) * 1e6
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def main(file: str) -> int:
    """Measure, print and write."""
    found = measure()
    Path(file).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
