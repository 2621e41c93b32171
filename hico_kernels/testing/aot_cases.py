"""Calls of real shapes for compiling ahead of time: nothing is computed, tensors stay empty."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hico_kernels.testing.samples import Sample
from hico_kernels.testing.shapes import CLIPS, cu_seqlens

WIDTHS = (64, 72, 128, 256)  # of a head; 80, 96 and 192 have the tiles of 128 and 256


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _merge_tokens(dtype: torch.dtype) -> Iterator[tuple]:
    for name in ("umt224_clip", "internvideo2_clip", "siglip_frame"):
        s = CLIPS[name]
        yield (_empty(16, s.tokens, s.channels, dtype=dtype), s.keep), {"num_heads": s.heads}


def _bipartite_soft_matching(dtype: torch.dtype) -> Iterator[tuple]:
    yield (_empty(8, 577, 64, dtype=dtype), 16), {"class_token": True}
    yield (_empty(8, 576, 768, dtype=dtype), 288), {}


def _merge_apply(dtype: torch.dtype) -> Iterator[tuple]:
    x, into = _empty(8, 577, 1024, dtype=dtype), _empty(8, 577, dtype=torch.int32)
    for sizes in (None, torch.float32, torch.int32):
        yield (x, into, 561, sizes and _empty(8, 577, dtype=sizes)), {}


def _merge_similar(dtype: torch.dtype) -> Iterator[tuple]:
    x, sizes = _empty(64, 577, 1024, dtype=dtype), _empty(64, 577, dtype=torch.int32)
    yield (x, _empty(64, 577, 64, dtype=torch.float32), 16, sizes, x), {"class_token": True}
    x = _empty(8, 729, 1152, dtype=dtype)
    yield (x, _empty(8, 729, 72, dtype=torch.float32), 16), {"spatial": False}


def _merge_backward(dtype: torch.dtype) -> Iterator[tuple]:
    grad, into = _empty(16, 64, 1024, dtype=dtype), _empty(16, 784, dtype=torch.int32)
    merged = _empty(16, 64, dtype=torch.int32)
    yield (grad, into, merged, None), {}
    yield (grad, into, merged.float(), into.float()), {}


def _layer_norm_metric(dtype: torch.dtype) -> Iterator[tuple]:
    for name in ("umt224_clip", "internvideo2_clip", "siglip_frame"):
        s = CLIPS[name]
        w = _empty(s.channels, dtype=dtype)
        yield (_empty(16, s.tokens, s.channels, dtype=dtype), w, w, 1e-6, s.heads), {}


def _layer_norm_backward(dtype: torch.dtype) -> Iterator[tuple]:
    for args, _ in _layer_norm_metric(dtype):
        yield (args[0], *args[:2], 1e-6), {}


def _text_guided_scores(dtype: torch.dtype) -> Iterator[tuple]:
    for rows, keys in ((1, 16000), (16, 16000), (100, 4096)):
        q, k = _empty(rows, 28, 128, dtype=dtype), _empty(keys, 4, 128, dtype=dtype)
        yield (q, k, cu_seqlens([rows]), cu_seqlens([keys])), {}


def _text_guided_scores_rotary(dtype: torch.dtype) -> Iterator[tuple]:
    wide = _empty(100, 8, 256, dtype=dtype), _empty(4096, 4, 256, dtype=dtype)
    calls = [args for args, _ in _text_guided_scores(dtype)]
    for q, k, *ends in (*calls, (*wide, *calls[-1][2:])):
        tables = (_empty(k.shape[0], k.shape[2], dtype=dtype) for _ in range(2))
        yield (q, k, *ends, *tables), {}


def _select_topk(dtype: torch.dtype) -> Iterator[tuple]:
    for lengths in ([160000], [1000, 500]):
        keep = [n // 2 for n in lengths]
        yield (_empty(sum(lengths), dtype=torch.float32), cu_seqlens(lengths), keep), {}


def _uniform_indices(dtype: torch.dtype) -> Iterator[tuple]:
    yield (16000, 8000), {}


def _gather_tokens(dtype: torch.dtype) -> Iterator[tuple]:
    yield (_empty(16000, 3584, dtype=dtype), _empty(8000, dtype=torch.int64)), {}


def _gather_many(dtype: torch.dtype) -> Iterator[tuple]:
    x, index = _empty(16000, 3584, dtype=dtype), _empty(8000, dtype=torch.int64)
    tables = [_empty(16000, 128, dtype=dtype) for _ in range(2)]
    yield (x, index, [_empty(16000, dtype=torch.int64), *tables], cu_seqlens([9000, 7000])), {}


def _gather_rms_norm(dtype: torch.dtype) -> Iterator[tuple]:
    for width in (1536, 3584, 8192):
        x, index = _empty(16000, width, dtype=dtype), _empty(8000, dtype=torch.int64)
        yield (x, index, _empty(width, dtype=dtype), 1e-6), {}


def _rms_norm_backward(dtype: torch.dtype) -> Iterator[tuple]:
    for width in (1536, 3584, 8192):
        rows = _empty(8000, width, dtype=dtype)
        yield (rows, rows, rows, _empty(width, dtype=dtype), 1e-6), {}


def _gather_tokens_backward(dtype: torch.dtype) -> Iterator[tuple]:
    yield (_empty(8000, 3584, dtype=dtype), _empty(8000, dtype=torch.int64), 16000), {}


def _widths(dtype: torch.dtype) -> tuple[int, ...]:
    return (64, 128) if dtype == torch.float32 else WIDTHS  # in float32 each takes seconds


def _qkv(rows: int, keys: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    sizes = ((rows, heads), (keys, heads // 4), (keys, heads // 4))
    return tuple(_empty(*size, width, dtype=dtype) for size in sizes)


def _ragged_attention(dtype: torch.dtype) -> Iterator[tuple]:
    ends = cu_seqlens([1000, 3096])
    for width in _widths(dtype):
        q, k, v = _qkv(4096, 4096, 28, width, dtype)
        yield (q, k, v, ends, ends, 3096, 3096), {}
    bias = _empty(4096, dtype=torch.float32)
    q, k, v = _qkv(4096, 4096, 16, 64, dtype)
    yield (q, k, v, ends, ends, 3096, 3096), {"causal": False, "key_bias": bias}
    for width in (64, 72):  # of a vision tower: as many key heads as heads
        q = _empty(4096, 16, width, dtype=dtype)
        yield (q, q, q, ends, ends, 3096, 3096), {"causal": False}


def _ragged_attention_backward(dtype: torch.dtype) -> Iterator[tuple]:
    ends = cu_seqlens([1000, 3096])
    for width in _widths(dtype):
        q, k, v = _qkv(4096, 4096, 28, width, dtype)
        lse = _empty(28, 4096, dtype=torch.float32)
        yield (q, q, k, v, q, lse, ends, ends, 3096, 3096, True, width**-0.5), {}


def _ragged_decode_attention(dtype: torch.dtype) -> Iterator[tuple]:
    for width in _widths(dtype):
        q, cache = _empty(2, 28, width, dtype=dtype), _empty(2, 16384, 4, width, dtype=dtype)
        yield (q, cache, cache, _empty(2, dtype=torch.int32)), {}


def cases(operation: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of a public operation whose kernels together are all there are."""
    for args, kwargs in globals()[f"_{operation}"](dtype):
        yield Sample(operation, args, kwargs)
