"""Sample inputs of every operation: usual, ragged, empty, strided, tied, NaN. Small and fixed.

Where a choice depends on the values they leave a margin: between the best and the second best of
random vectors, or exact ties that no order of summation breaks. So every precision chooses alike.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hico_kernels.testing.poison import layouts
from hico_kernels.testing.shapes import RAGGED, cu_seqlens


class Sample(NamedTuple):
    """One call of a public function, without `impl`."""

    id: str
    args: tuple
    kwargs: dict = {}  # noqa: RUF012  never changed


Samples = Iterator[Sample]


class Draw:
    """Random tensors of one device and dtype, the same ones every time."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, drawn in float32: the same numbers up to rounding in all precisions."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def directions(self, n: int, t: int, c: int, run: int) -> Tensor:
        """[n, t, c] one-hot tokens in runs of equal ones: similarities are 0 or 1, full of ties."""
        kinds = self.whole(0, c, n, -(-t // run)).repeat_interleave(run, dim=1)[:, :t]
        return torch.nn.functional.one_hot(kinds, c).to(self.dtype)

    def unit_grid(self, n: int, t: int, c: int) -> Tensor:
        """[n, t, c] tokens with four entries of -1 or 1: products are exact quarters, many tie."""
        places = torch.rand(n, t, c, generator=self.generator).argsort(dim=-1)[..., :4]
        signs = torch.randint(0, 2, (n, t, 4), generator=self.generator) * 2 - 1
        grid = torch.zeros(n, t, c, dtype=torch.int64).scatter_(2, places, signs)
        return grid.to(self.device, self.dtype)


def _strided(x: Tensor, *rest, **kwargs) -> Samples:
    """A stride of 0, and two of the layouts; promises.any_layout goes through all of them.

    Equal rows, not equal columns: those tie up to rounding in matching, so any of them may win.
    """
    views = dict(layouts(x))
    yield Sample("expanded_rows", (x[:1].expand_as(x), *rest), kwargs)
    yield Sample("stepped", (views["stepped"], *rest), kwargs)
    yield Sample("transposed", (views["transposed"], *rest), kwargs)


def merge_tokens(device: str, dtype: torch.dtype) -> Samples:
    """x [N, T, C], num_tokens; num_heads."""
    d = Draw(device, dtype, seed=1)
    for n, t, k, c, h in (
        (2, 12, 5, 24, 4),
        (3, 13, 6, 16, 1),
        (2, 784, 64, 256, 16),
        (2, 65, 64, 8, 2),
    ):
        yield Sample(f"{t}to{k}-h{h}", (d.normal(n, t, c), k), {"num_heads": h})
    yield Sample("large", (d.normal(5, 256, 96), 64), {"num_heads": 4})
    like = d.normal(2, 21, 10)
    yield Sample("metric", (d.normal(2, 21, 6), 7), {"metric": like})
    yield Sample("metric-float32", (d.normal(2, 21, 6), 7), {"metric": like.float()})
    yield Sample(
        "metric-stepped", (d.normal(2, 21, 6), 7), {"metric": dict(layouts(like))["stepped"]}
    )
    x = d.normal(2, 9, 8)
    yield Sample("to_one", (x, 1))
    yield Sample("to_all", (x, 9))
    yield Sample("one_token", (d.normal(2, 1, 8), 1))
    yield Sample("no_clips", (d.normal(0, 9, 8), 4))
    yield Sample("no_channels", (d.normal(2, 9, 0), 4))
    yield Sample("ties", (d.directions(2, 128, 6, run=8), 16))
    yield Sample("ties_partial_round", (d.directions(2, 26, 3, run=2), 11))
    yield Sample("all_zero", (torch.zeros_like(x), 4))
    odd = x.clone()
    odd[0, 2], odd[1, 5, 3] = torch.nan, torch.nan
    yield Sample("nan_tokens", (odd, 6))
    yield from _strided(d.normal(2, 12, 8), 5, num_heads=2)
    yield Sample("transposed_to_all", (d.normal(2, 8, 9).mT, 9))


def bipartite_soft_matching(device: str, dtype: torch.dtype) -> Samples:
    """Metric [N, T, D], r; class_token, distill_token."""
    d = Draw(device, dtype, seed=2)
    x = d.normal(2, 17, 8)
    for r in (0, 1, 5, 8):
        yield Sample(f"r{r}", (x, r))
    both = {"class_token": True, "distill_token": True}
    yield Sample("class_token", (x, 5), {"class_token": True})
    yield Sample("class_and_distill_token", (x, 5), both)
    yield Sample("class_and_distill_token-all", (x, 7), both)
    yield Sample("197tokens-r16", (d.normal(3, 197, 64), 16), {"class_token": True})
    yield Sample("large", (d.normal(5, 400, 32), 150))
    yield Sample("no_clips", (d.normal(0, 9, 8), 3))
    yield Sample("no_tokens", (d.normal(2, 0, 8), 0))
    yield Sample("one_token", (d.normal(2, 1, 8), 0))
    yield Sample("no_channels", (d.normal(2, 9, 0), 3))
    for r in (6, 20):
        yield Sample(f"ties-r{r}", (d.unit_grid(2, 40, 6), r))
    odd = x.clone()
    odd[:, 4], odd[:, 9], odd[1, 0] = torch.nan, torch.nan, 0
    yield Sample("nan_and_zero_tokens", (odd, 6))
    yield Sample("all_nan", (torch.full_like(x, torch.nan), 6))
    yield from _strided(d.normal(3, 14, 6), 4)


def merge_apply(device: str, dtype: torch.dtype) -> Samples:
    """x [N, T, C], assignment [N, T], num_tokens, sizes."""
    d = Draw(device, dtype, seed=3)
    x, into = d.normal(2, 12, 20), d.whole(0, 5, 2, 12, dtype=torch.int32)
    sizes = d.whole(1, 9, 2, 12, dtype=torch.int32)
    yield Sample("unweighted", (x, into, 5, None))
    yield Sample("int_sizes", (x, into, 5, sizes))
    yield Sample("float_sizes", (x, into, 5, sizes.float() / 4))
    yield Sample("sizes_of_own_dtype", (x, into, 5, sizes.to(dtype)))
    yield Sample("empty_position", (x, into, 7, sizes))
    yield Sample("zero_sizes", (x, into, 5, torch.zeros_like(sizes)))
    many = d.whole(0, 2, 1, 700, dtype=torch.int32)
    yield Sample("many_members", (d.normal(1, 700, 33) + 1, many, 2, None))
    spread = d.whole(0, 64, 4, 784, dtype=torch.int32)
    yield Sample("large", (d.normal(4, 784, 96), spread, 64, 1 + spread % 5))
    yield Sample("no_clips", (x[:0], into[:0], 5, None))
    yield Sample("no_tokens", (x[:, :0], into[:, :0], 3, None))
    yield Sample("no_positions", (x[:, :0], into[:, :0], 0, None))
    yield Sample("no_channels", (x[..., :0], into, 5, sizes))
    yield from _strided(x, into, 5, sizes)


def merge_backward(device: str, dtype: torch.dtype) -> Samples:
    """Grad [N, K, C], assignment [N, T], merged_sizes [N, K], sizes."""
    d = Draw(device, dtype, seed=4)
    into = d.whole(0, 5, 2, 12, dtype=torch.int32)
    sizes = d.whole(1, 9, 2, 12, dtype=torch.int32)
    merged = torch.zeros(2, 5, dtype=torch.int32, device=device)
    weighted = merged.scatter_add(1, into.long(), sizes)
    merged = merged.scatter_add(1, into.long(), torch.ones_like(sizes))
    grad = d.normal(2, 5, 20)
    yield Sample("unweighted", (grad, into, merged, None))
    yield Sample("weighted", (grad, into, weighted, sizes))
    yield Sample("float_sizes", (grad, into, weighted / 4, sizes / 4))
    yield Sample("nothing_merged", (grad, into, torch.zeros_like(merged), None))
    spread = d.whole(0, 64, 4, 784, dtype=torch.int32)
    yield Sample("large", (d.normal(4, 64, 96), spread, 1 + spread[:, :64] % 9, None))
    yield Sample("no_clips", (grad[:0], into[:0], merged[:0], None))
    yield Sample("no_channels", (grad[..., :0], into, merged, None))
    yield from _strided(grad, into, weighted, sizes)


def text_guided_scores(device: str, dtype: torch.dtype) -> Samples:
    """q [R, H, D], k [S, Hkv, D], cu_seqlens_q, cu_seqlens_k; scale."""
    d = Draw(device, dtype, seed=5)

    def call(name, rows, keys, heads=4, groups=2, width=16, cu=torch.int32, **kwargs) -> Sample:
        q, k = d.normal(sum(rows), heads, width), d.normal(sum(keys), groups, width)
        ends = (cu_seqlens(rows, device, cu), cu_seqlens(keys, device, cu))
        return Sample(name, (q, k, *ends), kwargs)

    yield call("last_row", (1, 1, 1), (9, 40, 3))
    yield call("ragged", (2, 0, 1, 5), RAGGED["mixed"])
    yield call("tile_edges", (1, 2, 3, 17, 1), RAGGED["tile_edges"])
    yield call("gqa7-d128", (1, 1), (70, 20), heads=28, groups=4, width=128)
    yield call("mha-odd_width-int64", (2, 1), (5, 8), heads=3, groups=3, width=7, cu=torch.int64)
    yield call("sharp", (1, 2), (33, 20), scale=8.0)
    yield call("large", (1, 3), (4000, 1500), heads=8, groups=2, width=64)
    yield call("no_text", (0, 0), (4, 5))
    yield call("no_keys", (2, 1), (0, 5))
    yield call("no_rows_at_all", (0, 0), (0, 0))
    yield call("no_sequences", (), ())
    yield call("no_width", (1, 2), (3, 4), width=0)
    _, (q, k, *ends), _ = call("", (2, 1), (9, 6))
    for name, args, kwargs in _strided(q, k, *ends):
        yield Sample(f"q-{name}", args, kwargs)
    for name, (view, *_), kwargs in _strided(k):
        yield Sample(f"k-{name}", (q, view, *ends), kwargs)


def select_topk(device: str, dtype: torch.dtype) -> Samples:
    """Scores [S], cu_seqlens, keep."""
    d = Draw(device, dtype, seed=6)

    def call(name: str, scores: Tensor, lengths, keep, cu: torch.dtype = torch.int32) -> Sample:
        return Sample(name, (scores, cu_seqlens(lengths, device, cu), list(keep)))

    for name, lengths in RAGGED.items():
        yield call(name, d.normal(sum(lengths)), lengths, (n // 2 for n in lengths))
    yield call("all-int64", d.normal(9), (5, 4), (5, 4), torch.int64)
    yield call("none", d.normal(9), (5, 4), (0, 0))
    yield call("large", d.normal(30000), (9000, 21000), (3000, 9000))
    yield call("no_sequences", d.normal(0), (), ())
    yield call("no_rows", d.normal(0), (0, 0), (0, 0))
    yield call("all_equal", d.normal(1).expand(40), (25, 15), (11, 4))
    close = 1 + torch.randperm(200, generator=d.generator).to(device, dtype) * 2**-23
    yield call("differ_in_the_last_bit", close, (150, 50), (70, 20))
    yield call("ties", d.whole(0, 4, 300).to(dtype), (170, 130), (60, 31))
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40], dtype=dtype)
    odd = odd[torch.randint(0, 7, (120,), generator=d.generator)].to(device)
    for keep in (1, 30, 60, 90, 110, 119):
        yield call(f"nan_inf_zeros-{keep}", odd, (120,), (keep,))
    yield call("all_nan", torch.full_like(odd, torch.nan), (50, 70), (3, 70))
    yield call("stepped", d.normal(75)[::3], (10, 15), (3, 7))


def uniform_indices(device: str, dtype: torch.dtype) -> Samples:
    """num_tokens, keep; device."""
    for n, keep in (
        (0, 0),
        (1, 1),
        (7, 0),
        (7, 1),
        (7, 2),
        (7, 7),
        (43, 39),
        (1024, 768),
        (16000, 5333),
    ):
        yield Sample(f"{n}to{keep}", (n, keep), {"device": device})
    yield Sample("large", (160000, 40000), {"device": device})


def gather_tokens(device: str, dtype: torch.dtype) -> Samples:
    """x [S, C], index [M]."""
    d = Draw(device, dtype, seed=7)
    x, index = d.normal(40, 24), d.whole(0, 40, 17)
    yield Sample("usual", (x, index))
    yield Sample("ascending", (x, torch.arange(0, 40, 3, device=device)))
    yield Sample("all_one_row", (x, index[:1].expand(9)))
    yield Sample("odd_width", (d.normal(40, 7), index))
    yield Sample("wide", (d.normal(9, 4099), d.whole(0, 9, 30)))
    yield Sample("large", (d.normal(4000, 128), d.whole(0, 4000, 3000)))
    yield Sample("nothing_taken", (x, index[:0]))
    yield Sample("no_rows", (x[:0], index[:0]))
    yield Sample("no_channels", (x[:, :0], index))
    yield from _strided(x, index)
    yield Sample("index-stepped", (x, d.whole(0, 40, 51)[::3]))


def gather_tokens_backward(device: str, dtype: torch.dtype) -> Samples:
    """Grad [M, C], index [M], num_rows."""
    d = Draw(device, dtype, seed=8)
    grad, index = d.normal(17, 24), d.whole(0, 40, 17)
    yield Sample("usual", (grad, index, 40))
    often = torch.full((1000,), 2, device=device)
    yield Sample("one_row_often", (1 + d.normal(1000, 3), often, 5))
    yield Sample("large", (d.normal(3000, 128), d.whole(0, 4000, 3000), 4000))
    yield Sample("nothing_taken", (grad[:0], index[:0], 40))
    yield Sample("no_rows", (grad[:0], index[:0], 0))
    yield Sample("no_channels", (grad[:, :0], index, 40))
    yield from _strided(grad, index, 40)
