"""Runs every CPU kernel once with callgrind counting, for `bench.instructions`, which starts it.

Sizes are small: a count needs no real ones, and valgrind takes 50 times as long as the processor.
"""

import ctypes
import sys
from collections.abc import Callable

import torch

from bench.results import short
from hico_kernels.testing.shapes import cu_seqlens

OPS = torch.ops.hico


def cases() -> dict[str, Callable]:
    """Name, op-shape-dtype, -> a call of the kernel alone."""
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, run in (_merging(dtype) | _selecting(dtype) | _attending(dtype)).items():
            found[f"{name}-{short(dtype)}"] = run
    scores, cu = torch.randn(4096), cu_seqlens([4096])
    found["select_topk-4096to1024-f32"] = lambda: OPS.select_topk(scores, cu, [1024])
    found["uniform_indices-4096to3072-i64"] = lambda: OPS.uniform_indices(4096, 3072, "cpu")
    return found


def _merging(dtype: torch.dtype) -> dict[str, Callable]:
    x, metric = torch.randn(1, 784, 128, dtype=dtype), torch.randn(1, 197, 64, dtype=dtype)
    tokens, sizes, assignment = OPS.merge_tokens(x, 64, 2)
    step, x2 = OPS.bipartite_soft_matching(metric, 16, True, False), x[:, :197]
    return {
        "merge_tokens-784x128": lambda: OPS.merge_tokens(x, 64, 2),
        "merge_backward-784x128": lambda: OPS.merge_backward(tokens, assignment, sizes, None),
        "bipartite_soft_matching-197x64_r16": lambda: OPS.bipartite_soft_matching(
            metric, 16, True, False
        ),
        "merge_apply-197x128_r16": lambda: OPS.merge_apply(x2, step, 181, None),
    }


def _selecting(dtype: torch.dtype) -> dict[str, Callable]:
    q, k = torch.randn(4, 8, 128, dtype=dtype), torch.randn(512, 2, 128, dtype=dtype)
    cu_q, cu_one, cu_k = cu_seqlens([4]), cu_seqlens([1]), cu_seqlens([512])
    x, index = torch.randn(1024, 128, dtype=dtype), torch.arange(0, 1024, 2)
    grad = x[:512]
    return {
        "text_guided_scores-R4_S512": lambda: OPS.text_guided_scores(q, k, cu_q, cu_k, 0.1),
        "text_guided_scores-R1_S512": lambda: OPS.text_guided_scores(q[:1], k, cu_one, cu_k, 0.1),
        "gather_tokens-1024to512": lambda: OPS.gather_tokens(x, index),
        "gather_tokens_backward-512to1024": lambda: OPS.gather_tokens_backward(grad, index, 1024),
    }


def _attending(dtype: torch.dtype) -> dict[str, Callable]:
    lengths = [30, 90]
    cu, rows, longest = cu_seqlens(lengths), sum(lengths), max(lengths)
    q = torch.randn(rows, 4, 128, dtype=dtype)
    k, v = torch.randn(2, rows, 1, 128, dtype=dtype).unbind()
    rest = (cu, cu, longest, longest, True, 0.1, None)
    out, lse = OPS.ragged_attention(q, k, v, *rest)
    keys, values = torch.randn(2, 1, 512, 1, 128, dtype=dtype).unbind()
    one, length = q[:1], torch.tensor([500], dtype=torch.int32)
    return {
        "ragged_attention-30_90": lambda: OPS.ragged_attention(q, k, v, *rest),
        "ragged_attention_backward-30_90": lambda: OPS.ragged_attention_backward(
            out, q, k, v, out, lse, *rest
        ),
        "ragged_decode_attention-500": lambda: OPS.ragged_decode_attention(
            one, keys, values, length, 0.1
        ),
    }


def main() -> None:
    """Count each case into a file of callgrind's: with the switch argv[1], on the path argv[2]."""
    torch.set_num_threads(1)
    OPS.use_cpu_path(sys.argv[2])
    callgrind = ctypes.CDLL(sys.argv[1])
    for name, run in cases().items():
        run()  # not its first call: what is set up once is not counted
        callgrind.start()
        run()
        callgrind.stop(name.encode())


if __name__ == "__main__":
    main()
