"""Sample inputs of the operations that do two things in one pass, like those of samples.py."""

import torch
from torch import Tensor

from hico_kernels.testing.samples import Draw, Sample, Samples, _strided
from hico_kernels.testing.shapes import RAGGED, cu_seqlens


def rotary_tables(d: Draw, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, width] as a model makes them, with positions that are not the rows."""
    places = torch.arange(rows).flip(0)[:, None] * 3 + 1
    angles = places * 10000.0 ** -torch.arange(0, 1, 2 / max(width, 2))[None, : width // 2]
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(d.device, dtype), angles.sin().to(d.device, dtype)


def text_guided_scores_rotary(device: str, dtype: torch.dtype) -> Samples:
    """q [R, H, D], k [S, Hkv, D], cu_seqlens_q, cu_seqlens_k, cos, sin [S, D]; scale."""
    d = Draw(device, dtype, seed=9)

    def call(name, rows, keys, heads=4, groups=2, width=16, tables=None, **kwargs) -> Sample:
        q, k = d.normal(sum(rows), heads, width), d.normal(sum(keys), groups, width)
        ends = (cu_seqlens(rows, device), cu_seqlens(keys, device))
        tables = rotary_tables(d, sum(keys), width, tables or dtype)
        return Sample(name, (q, k, *ends, *tables), kwargs)

    yield call("ragged", (2, 0, 1, 5), RAGGED["mixed"])
    yield call("tables_in_float32", (1, 2), (9, 6), tables=torch.float32)
    yield call("tile_edges", (1, 2, 3, 17, 1), RAGGED["tile_edges"])
    yield call("gqa7-d128", (1, 1), (70, 20), heads=28, groups=4, width=128)
    yield call("d72", (6,), (30,), heads=2, groups=1, width=72)
    yield call("d256", (3,), (20,), heads=2, groups=1, width=256)
    yield call("sharp", (1, 2), (33, 20), scale=8.0)
    yield call("large", (1, 3), (4000, 1500), heads=8, groups=2, width=64)
    yield call("no_text", (0, 0), (4, 5))
    yield call("no_keys", (2, 1), (0, 5))
    yield call("no_sequences", (), ())
    yield call("no_width", (1, 2), (3, 4), width=0)
    _, (q, k, *ends, cos, sin), _ = call("", (2, 1), (9, 6))
    halves = d.normal(15, 16), d.normal(15, 16)  # of any rotation or none: no half equals the other
    yield Sample("unequal_halves", (q, k, *ends, *halves))
    for name, args, kwargs in _strided(q, k, *ends, cos, sin):
        yield Sample(f"q-{name}", args, kwargs)
    for name, (view, *_), kwargs in _strided(k):
        yield Sample(f"k-{name}", (q, view, *ends, cos, sin), kwargs)
