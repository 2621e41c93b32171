"""What this machine can do, measured on it, and the least time that follows for an amount of
work.
"""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import results
from hico_kernels import measured, native

THREADS = sorted({1, os.cpu_count() or 1})  # what CPU benchmarks run with


def _best_seconds(fn, device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def bandwidth(device: str, threads: int) -> float:
    """Bytes per second, read plus written, of the best of 10 copies of 256 MiB."""
    x = torch.rand(64 << 20, device=device)
    y = torch.empty_like(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = _best_seconds(lambda: y.copy_(x), device, 10)
    torch.set_num_threads(before)
    return 2 * x.nbytes / best


@functools.cache
def arithmetic_rate(device: str, dtype: torch.dtype, threads: int) -> float:
    """FLOPs per second: on the CPU of multiply-adds in registers, best of 20 runs of all threads at
    once; on a GPU of the best of 5 square products of random matrices."""
    if device == "cpu":
        rate = native.loaded["_host"].fma_rate
        with ThreadPoolExecutor(threads) as pool:
            bfloat16 = [dtype == torch.bfloat16] * threads
            return max(sum(pool.map(rate, bfloat16)) for _ in range(20))
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: a @ b, device, 5)


def floor_seconds(device: str, dtype: torch.dtype, bytes_: int, flops: int) -> float:
    """The least time for moving `bytes_` and computing `flops` with the threads set now."""
    threads = torch.get_num_threads()
    moving = bytes_ / bandwidth(device, threads) if bytes_ else 0.0
    return max(moving, flops / arithmetic_rate(device, dtype, threads) if flops else 0.0)


@functools.cache
def _l2_scratch() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def flush_l2() -> None:
    """Put something else into the L2 cache of the current CUDA device."""
    _l2_scratch().zero_()


def machine(device: str) -> dict:
    """What must be known about this machine to read a result."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    capability = {"capability": measured.capability(None)} if device == "cuda" else {}
    return capability | {
        "device": results.device_name(device),
        "type": device,
        "torch": torch.__version__,
        "limits": {
            "threads": THREADS,
            "copy_gb_per_s": [round(bandwidth(device, n) / 1e9, 1) for n in THREADS],
        }
        | {
            f"{name}_gflop_per_s": [round(arithmetic_rate(device, dtype, n) / 1e9) for n in THREADS]
            for name, dtype in dtypes.items()
        },
    }
