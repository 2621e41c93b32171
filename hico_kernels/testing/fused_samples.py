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


def gather_many(device: str, dtype: torch.dtype) -> Samples:
    """x [S, C], index [M], more, cu_seqlens."""
    d = Draw(device, dtype, seed=10)
    x, index = d.normal(40, 24), d.whole(0, 40, 17)
    places, tables = d.whole(0, 99, 40), rotary_tables(d, 40, 16, dtype)
    rising, ends = torch.arange(0, 40, 3, device=device), cu_seqlens((9, 0, 30, 1, 0), device)
    yield Sample("all", (x, rising, [places, *tables], ends))
    yield Sample("no_bounds", (x, index, [places, *tables], None))
    yield Sample("bounds_alone", (x, rising, [], ends.long()))
    shapes = [d.normal(40, 3, 2, 5), d.whole(0, 2, 40, 3).bool(), d.whole(0, 9, 40).int()]
    yield Sample("all_kinds", (x, index, [*shapes, d.normal(40, dtype=torch.float32)], None))
    yield Sample("repeated", (x, index.sort().values, [places], ends))
    ragged = cu_seqlens(RAGGED["tile_edges"], device)
    kept = d.whole(0, 2, 321).bool().cpu().nonzero()[:, 0].to(device)
    yield Sample("ragged", (d.normal(321, 70), kept, [d.whole(0, 9, 321)], ragged))
    yield Sample("one_end_taken", (x, torch.full((3,), 39, device=device), [places], ends))
    many = cu_seqlens([1, 0] * 150 + [8], device)  # more bounds than a program of Triton's has
    yield Sample("many_bounds", (d.normal(158, 3), d.whole(0, 158, 90).sort().values, [], many))
    large = d.whole(0, 4000, 3000).sort().values
    tables = rotary_tables(d, 4000, 64, dtype)
    ends4 = cu_seqlens((1000, 2990, 10), device)
    yield Sample("large", (d.normal(4000, 128), large, [d.whole(0, 9, 4000), *tables], ends4))
    yield Sample("nothing_taken", (x, index[:0], [places], ends))
    yield Sample("no_rows", (x[:0], index[:0], [places[:0]], ends[:1]))
    yield Sample("no_channels", (x[:, :0], index, [places, x[:, :0]], None))
    yield from _strided(x, rising, [places], ends)
    stepped = [d.normal(40, 4, 6)[:, ::2, 1:], d.whole(0, 9, 80)[::2], d.normal(6, 40).mT]
    yield Sample("more-strided", (x, rising, stepped, ends.repeat_interleave(2)[::2]))


def gather_rms_norm(device: str, dtype: torch.dtype) -> Samples:
    """x [S, C], index [M], weight [C], eps."""
    d = Draw(device, dtype, seed=11)
    x, index, weight = d.normal(40, 24), d.whole(0, 40, 17), 1 + d.normal(24) / 4
    yield Sample("usual", (x, index, weight, 1e-6))
    yield Sample("all_one_row", (x, index[:1].expand(9), weight, 1e-6))
    yield Sample("odd_width", (d.normal(40, 7), index, d.normal(7), 1e-5))
    yield Sample("wide", (d.normal(9, 4099), d.whole(0, 9, 5), d.normal(4099), 1e-6))
    yield Sample("one_channel", (d.normal(40, 1), index, d.normal(1), 1e-6))
    sizes = torch.tensor([1e-4, 1.0, 1e3], device=device).to(dtype).repeat(14)[:40, None]
    yield Sample("small_and_large", (x * sizes, index, weight, 1e-6))
    yield Sample("zeros", (0 * x, index, weight, 1e-6))
    yield Sample("large", (d.normal(4000, 128), d.whole(0, 4000, 3000), d.normal(128), 1e-6))
    yield Sample("nothing_taken", (x, index[:0], weight, 1e-6))
    yield Sample("no_rows", (x[:0], index[:0], weight, 1e-6))
    yield Sample("no_channels", (x[:, :0], index, weight[:0], 1e-6))
    yield from _strided(x, index, weight, 1e-6)


def rms_norm_backward(device: str, dtype: torch.dtype) -> Samples:
    """Grad_rows, grad_normed and rows [M, C], weight [C], eps."""
    d = Draw(device, dtype, seed=14)

    def call(name: str, rows: int, width: int, eps: float = 1e-6) -> Sample:
        three = (d.normal(rows, width) for _ in range(3))
        return Sample(name, (*three, 1 + d.normal(width) / 4, eps))

    yield call("usual", 17, 24)
    yield call("many_rows", 700, 5)  # more than one for each program of Triton's
    yield call("odd_width", 9, 7, 1e-5)
    yield call("wide", 5, 4099)
    yield call("one_channel", 9, 1)
    yield call("large", 3000, 128)
    _, (a, b, rows, weight, eps), _ = call("", 42, 24)
    sizes = torch.tensor([1e-2, 1.0, 1e3], device=device).to(dtype).repeat(14)[:, None]
    yield Sample("small_and_large", (a, b, rows * sizes, weight, eps))
    yield Sample("zeros", (a, b, 0 * rows, weight, 1e-2))
    yield Sample("nothing_directly", (0 * a, b, rows, weight, eps))
    yield call("no_rows", 0, 24)
    yield call("no_channels", 9, 0)
    yield from _strided(a, b, rows, weight, eps)
    for name, args, kwargs in _strided(rows, weight, eps):
        yield Sample(f"rows-{name}", (a, b, *args), kwargs)


def layer_norm_backward(device: str, dtype: torch.dtype) -> Samples:
    """Grad and x [N, T, C], weight [C], eps."""
    d = Draw(device, dtype, seed=15)

    def call(name: str, clips: int, tokens: int, width: int, eps: float = 1e-6) -> Sample:
        both = (d.normal(clips, tokens, width) for _ in range(2))
        return Sample(name, (*both, 1 + d.normal(width) / 4, eps))

    yield call("usual", 2, 9, 24)
    yield call("many_rows", 7, 100, 5)
    yield call("odd_width", 2, 5, 7, 1e-5)
    yield call("siglip", 1, 3, 1152)
    yield call("internvideo2", 1, 3, 1408)
    yield call("large", 4, 300, 256)
    _, (grad, x, weight, eps), _ = call("", 2, 9, 24)
    yield Sample("far_from_zero", (grad, x + 30, weight, eps))
    yield Sample("equal_channels", (grad, x[..., :1].expand(-1, -1, 24), weight, 1e-2))
    yield call("one_channel", 2, 5, 1, 1e-2)
    yield call("no_clips", 0, 9, 24)
    yield call("no_tokens", 2, 0, 24)
    yield call("no_channels", 2, 9, 0)
    yield from _strided(grad, x, weight, eps)
    for name, args, kwargs in _strided(x, weight, eps):
        yield Sample(f"x-{name}", (grad, *args), kwargs)


def layer_norm_metric(device: str, dtype: torch.dtype) -> Samples:
    """x [N, T, C], weight [C], bias [C], eps, num_heads."""
    d = Draw(device, dtype, seed=12)
    x, weight, bias = d.normal(2, 9, 24), 1 + d.normal(24) / 4, d.normal(24)
    for heads in (4, 1, 3, 24):
        yield Sample(f"h{heads}", (x, weight, bias, 1e-6, heads))
    yield Sample("far_from_zero", (x + 30, weight, bias, 1e-6, 4))
    yield Sample("siglip", (d.normal(1, 3, 1152), d.normal(1152), d.normal(1152), 1e-6, 16))
    yield Sample("internvideo2", (d.normal(1, 3, 1408), d.normal(1408), d.normal(1408), 1e-6, 16))
    yield Sample("large", (d.normal(4, 300, 256), d.normal(256), d.normal(256), 1e-5, 4))
    yield Sample("equal_channels", (x[..., :1].expand(-1, -1, 24), weight, bias, 1e-6, 4))
    yield Sample("no_clips", (x[:0], weight, bias, 1e-6, 4))
    yield Sample("no_tokens", (x[:, :0], weight, bias, 1e-6, 4))
    yield Sample("no_channels", (x[..., :0], weight[:0], bias[:0], 1e-6, 4))
    yield from _strided(x, weight, bias, 1e-6, 4)


def merge_similar(device: str, dtype: torch.dtype) -> Samples:
    """x [N, T, C], metric [N, T, D], r, sizes, other; front, class_token, distill_token, order."""
    d = Draw(device, dtype, seed=13)
    x, metric = d.normal(2, 17, 20), d.normal(2, 17, 8)
    sizes, other = d.whole(1, 9, 2, 17, dtype=torch.int32), d.normal(2, 17, 6)
    kinds = {
        "plain": (8, {}),
        "class": (8, {"class_token": True}),
        "distill": (7, {"class_token": True, "distill_token": True}),
        "registers": (6, {"front": 3, "class_token": True}),
        "front": (7, {"front": 2}),
    }
    for order in ("spatial", "matching"):
        for kind, (most, options) in kinds.items():
            options = {**options, "spatial": order == "spatial"}
            for r in (3, most):
                yield Sample(f"{kind}-{order}-r{r}", (x, metric, r, sizes, other), options)
    yield Sample("unweighted", (x, metric, 5, None, None))
    yield Sample("float_sizes", (x, metric, 5, sizes.float() / 4, None))
    yield Sample("sizes_of_own_dtype", (x, metric, 5, sizes.to(dtype), other))
    yield Sample("zero_sizes", (x, metric, 5, 0 * sizes, None))
    yield Sample("nothing_merges", (x, metric, 0, sizes, other))
    tiles = d.normal(1, 301, 40), d.normal(1, 301, 24)  # more tokens than a tile
    yield Sample("tiles", (*tiles, 100, None, None), {"class_token": True})
    yield Sample("tiles-matching", (*tiles, 100, None, None), {"spatial": False})
    yield Sample(
        "many_members", (d.normal(1, 40, 3), d.directions(1, 40, 2, run=4), 20, None, None)
    )
    yield Sample("wide_metric", (x, d.normal(2, 17, 200), 5, sizes, None))
    yield Sample("metric_in_float32", (x, metric.float(), 5, sizes, None))
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        beside = d.normal(2, 17, 6, dtype=kind)
        yield Sample(f"other_in_{str(kind)[6:]}", (x, metric, 5, sizes, beside))
    yield Sample("columns", (d.normal(1, 9, 600), d.normal(1, 9, 4), 3, None, d.normal(1, 9, 530)))
    large = d.normal(5, 200, 96), d.normal(5, 200, 32)
    yield Sample("large", (*large, 60, None, None), {"class_token": True})
    for order in ("spatial", "matching"):
        ties, options = d.unit_grid(2, 40, 6), {"spatial": order == "spatial"}
        yield Sample(f"ties-{order}", (d.normal(2, 40, 5), ties, 6, None, None), options)
    odd = metric.clone()
    odd[:, 4], odd[:, 9], odd[1, 0] = torch.nan, torch.nan, 0
    yield Sample("nan_and_zero_metric", (x, odd, 6, sizes, None))
    yield Sample("all_nan", (x, torch.full_like(metric, torch.nan), 6, sizes, None))
    yield Sample("no_clips", (x[:0], metric[:0], 5, None, other[:0]))
    yield Sample("no_tokens", (x[:, :0], metric[:, :0], 0, None, None))
    yield Sample("no_channels", (x[..., :0], metric, 5, sizes, None))
    yield Sample("no_width", (x, metric[..., :0], 5, sizes, None))
    yield from _strided(x, metric, 5, sizes, other)
