"""Sample inputs of the attention operations; the others are in samples.py."""

import torch
from torch import Tensor

from hico_kernels.attention.reference import ragged_attention_reference
from hico_kernels.testing.poison import layouts
from hico_kernels.testing.samples import Draw, Sample, Samples
from hico_kernels.testing.shapes import RAGGED, cu_seqlens

# name -> lengths of queries, lengths of keys, heads, key heads, head width
_SHAPES = {
    "mixed": (RAGGED["mixed"], RAGGED["mixed"], 4, 2, 16),
    "tile_edges": (RAGGED["tile_edges"], RAGGED["tile_edges"], 2, 1, 32),
    "one_long": (RAGGED["one_long"], RAGGED["one_long"], 2, 2, 64),
    "fewer_queries": ((2, 1, 7), (9, 70, 8), 4, 2, 16),
    "more_queries": ((9, 70, 8), (2, 1, 7), 4, 2, 16),
    "one_query_each": ((1, 1, 1), (9, 70, 1), 4, 1, 16),
    "gqa7-d128": ((40, 3), (40, 50), 28, 4, 128),
    "odd_width": ((5, 9), (5, 9), 3, 3, 7),
    "d24": ((5, 9), (5, 9), 2, 1, 24),  # a multiple of 8, not of 16, as 72 is
    "with_empty": ((0, 6, 0, 2, 3), (0, 6, 4, 2, 0), 2, 1, 8),
    "large": ((300, 90), (300, 90), 8, 2, 64),
    "no_rows": ((0, 0), (0, 0), 2, 1, 8),
    "no_sequences": ((), (), 2, 1, 8),
    "no_width": ((3, 2), (3, 4), 2, 1, 0),
}


def _packed(d: Draw, shape: str, cu: torch.dtype = torch.int32) -> tuple:
    """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    rows, keys, heads, groups, width = _SHAPES[shape]
    q = d.normal(sum(rows), heads, width)
    k, v = d.normal(sum(keys), groups, width), d.normal(sum(keys), groups, width)
    ends = cu_seqlens(rows, d.device, cu), cu_seqlens(keys, d.device, cu)
    return q, k, v, *ends, max(rows, default=0), max(keys, default=0)


def ragged_attention(device: str, dtype: torch.dtype) -> Samples:
    """q, k, v, both cu_seqlens, both max_seqlen; causal, scale, key_bias, return_lse."""
    d = Draw(device, dtype, seed=11)

    def call(name: str, shape: str, cu: torch.dtype = torch.int32, **kwargs) -> Sample:
        return Sample(name, _packed(d, shape, cu), {"return_lse": True, **kwargs})

    for shape in _SHAPES:
        yield call(shape, shape)
    for shape in ("mixed", "tile_edges", "more_queries", "with_empty"):
        yield call(f"full-{shape}", shape, causal=False)
    for shape in ("mixed", "fewer_queries", "tile_edges"):
        sizes = d.whole(1, 9, sum(_SHAPES[shape][1]))
        yield call(f"key_bias-{shape}", shape, key_bias=sizes.float().log())
    some = d.normal(sum(RAGGED["mixed"]), dtype=torch.float32)
    hidden = some.masked_fill(some < 0, -torch.inf)
    yield call("key_bias-hides_keys", "mixed", causal=False, key_bias=hidden)
    yield call("key_bias-hides_all", "mixed", key_bias=torch.full_like(some, -torch.inf))
    yield call("key_bias-own_dtype-stepped", "mixed", key_bias=d.normal(2 * len(some))[::2])
    yield call("sharp", "tile_edges", scale=8.0)
    yield call("int64", "mixed", torch.int64)
    *args, max_q, max_k = _packed(d, "mixed")
    yield Sample("generous_max_seqlen", (*args, max_q + 90, max_k + 300), {"return_lse": True})
    yield from _strided(_packed(d, "mixed"), 3, {"return_lse": True})


def ragged_attention_backward(device: str, dtype: torch.dtype) -> Samples:
    """Grad, q, k, v, out, lse, both cu_seqlens, both max_seqlen, causal, scale, key_bias."""
    d = Draw(device, dtype, seed=12)

    def call(name: str, shape: str, causal: bool = True, bias: Tensor | None = None) -> Sample:
        args = _packed(d, shape)
        scale = 0.3
        out, lse = ragged_attention_reference(*args, causal, scale, bias)
        grad = d.normal(*out.shape)
        return Sample(name, (grad, *args[:3], out, lse, *args[3:], causal, scale, bias), {})

    for shape in _SHAPES:
        yield call(shape, shape)
    yield call("full-more_queries", "more_queries", causal=False)
    yield call("key_bias", "mixed", bias=d.whole(1, 9, sum(RAGGED["mixed"])).float().log())
    for sample in _strided(call("", "mixed").args, 4, {}):
        grad, q, k, v, _, _, *rest = sample.args
        saved = ragged_attention_reference(q, k, v, *rest)  # of these inputs, as autograd has it
        yield Sample(sample.id, (grad, q, k, v, *saved, *rest), {})


def largest_logit(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale, bias) -> float:
    """The condition of exp(logit - lse) in a logit: with lse given and not computed along, the
    logit's own rounding reaches the gradients. One at the size of the logit is in the budget."""
    if not q.numel() or not k.numel():
        return 0.0
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return scale * torch.einsum("qhd,khd->hqk", q.double(), keys).abs().max().item()


def ragged_decode_attention(device: str, dtype: torch.dtype) -> Samples:
    """q, k_cache, v_cache, kv_lengths; scale."""
    d = Draw(device, dtype, seed=13)

    def call(
        name, lengths, longest, heads=4, groups=2, width=16, cu=torch.int32, **kwargs
    ) -> Sample:
        b = len(lengths)
        q = d.normal(b, heads, width)
        k, v = d.normal(b, longest, groups, width), d.normal(b, longest, groups, width)
        lengths = torch.tensor(lengths, dtype=cu, device=device)
        for cache in (k, v):  # what is not valid yet must not be read
            cache.masked_fill_(
                (torch.arange(longest, device=device) >= lengths[:, None])[..., None, None],
                torch.nan,
            )
        return Sample(name, (q, k, v, lengths), kwargs)

    yield call("usual", (5, 1, 9), 12)
    yield call("tile_edges", (63, 64, 65, 128, 1), 128)
    yield call("full", (20, 20), 20)
    yield call("gqa7-d128", (70, 33), 80, heads=28, groups=4, width=128)
    yield call("d24", (5, 9), 12, width=24)
    yield call("mqa-odd_width-int64", (5, 8), 8, heads=3, groups=1, width=7, cu=torch.int64)
    yield call("sharp", (40, 2), 40, scale=8.0)
    yield call("one_long", (2, 700, 3), 700, heads=2, groups=1)
    yield call("empty_sequences", (0, 4, 0), 6)
    yield call("empty_cache", (0, 0), 0)
    yield call("no_sequences", (), 7)
    yield call("no_width", (3, 4), 5, width=0)
    yield call("large", (900, 400, 1000), 1000, heads=8, groups=2, width=64)
    yield from _strided(call("", (9, 5, 1), 12).args, 3, {})


def _strided(args: tuple, count: int, kwargs: dict) -> Samples:
    """Each of the first `count` tensors with a stride of 0, then all of them in two layouts."""
    for i in range(count):
        view = args[i][:1].expand_as(args[i])
        yield Sample(f"{i}-expanded_rows", (*args[:i], view, *args[i + 1 :]), kwargs)
    for layout in ("outer_swapped", "sliced"):
        views = [dict(layouts(x))[layout] for x in args[:count]]
        yield Sample(layout, (*views, *args[count:]), kwargs)
